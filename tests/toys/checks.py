"""Checks of what CONTRIBUTING.md adds; `tests/test_contributing.py` runs them in a copy of the repository."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.hub import create_card
from peft_ncgeo.hub.record import Component
from peft_ncgeo.models import describe
from peft_ncgeo.training import Recipe

from ..hub.test_card import record
from ..models.survey import __main__ as survey
from ..models.survey.specs import V
from ..models.survey.table import PAGE, read_results
from ..training.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", autouse=True)
def _toys():
    """The tower as if Transformers had it."""
    name = "transformers.models.toy.modeling_toy"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("tower.py"))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    transformers.ToyConfig, transformers.ToyModel = module.ToyConfig, module.ToyModel


def test_a_recipe_finds_the_loss_which_trains_under_a_budget(tmp_path):
    recipe = Recipe.from_dict("drift", {"losses": [{"ImageDrift": {"budget": 1e-4}}]})
    run = trainer(tmp_path / "run", losses=recipe.losses(), max_steps=2)
    run.train()
    first, second = run.state.log_history[:2]
    assert 0 < first["loss/drift"] < 2
    assert second["lambda/drift"] > first["lambda/drift"]  # far above the budget
    assert "images held to the frozen ones" in create_card(record=record(terms=[Component("ImageDrift")])).text


def test_the_family_is_described_and_takes_prompts_and_adapters(monkeypatch):
    model = transformers.ToyModel(transformers.ToyConfig(**V)).eval()
    described = describe(model)
    assert described.family == "Toy"
    assert {name for name, why_not in described.methods.items() if not why_not} == {
        *("image prompts", "CoPAConfig, adapt", "residual adapters", "AdaptFormerConfig")
    }
    pixels = torch.randn(2, 3, 32, 32)
    tuned = get_peft_model(model, LoraConfig(target_modules=["qkv"], init_lora_weights=False)).eval()
    with torch.no_grad():
        assert torch.equal(ImageFeatures(tuned)(pixels), tuned(pixels).pooler_output)
    monkeypatch.setattr(sys, "argv", ["survey", "ToyModel"])
    survey.main()
    assert set(read_results()["ToyModel"]["tries"].values()) == {"works"}
    assert "\n| ToyModel | yes | yes | yes |\n" in PAGE.read_text()
