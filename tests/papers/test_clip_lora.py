"""CLIP-LoRA, arXiv 2405.18541, and the layer norms of 2SFS, arXiv 2503.11609: what their recipes make PEFT compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel

from peft_ncgeo.training import Recipe

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def pattern(n: int, d: int, s: int) -> np.ndarray:
    k = np.arange(n * d)
    return (((k**2 + 3 * k + s) % 13 - 6) / 6).reshape(n, d)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)


def test_the_update_is_divided_by_the_root_of_the_rank():
    config = Recipe.read(RECIPES / "clip_lora.yaml").config()
    model = get_peft_model(Layer(), config).eval().double()
    layer = model.base_model.model.q_proj
    x, a, b = (torch.tensor(pattern(*shape)) for shape in ((2, 4, 1), (2, 4, 2), (3, 2, 3)))
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b)
        update = model(x) - layer.base_layer(x)
    expected = pattern(2, 4, 1) @ pattern(2, 4, 2).T @ pattern(3, 2, 3).T / np.sqrt(2)
    np.testing.assert_allclose(update.numpy(), expected, atol=1e-12)
    published = [[-0.481225, -0.962451, -0.183324], [0.137493, 0.274986, -0.137493]]
    np.testing.assert_allclose(update.numpy(), published, atol=5e-7)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize(("recipe", "values"), [("clip_lora", 184_320), ("ln_tuning", 61_440)])
def test_as_many_values_train_on_vit_b16_as_in_the_papers_code(recipe, values):
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(projection_dim=512, vision_config={"patch_size": 16}))
        model = get_peft_model(clip, Recipe.read(RECIPES / f"{recipe}.yaml").config())
    assert model.get_nb_trainable_parameters()[0] == values
