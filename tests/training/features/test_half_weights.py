"""bf16 by one argument: the arithmetic of autocast, without its casts of frozen weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft_ncgeo.losses import OTPreservation
from peft_ncgeo.training.features.half_weights import HalfWeights

from ...conftest import CHECKPOINTING, pixels, tiny_images
from ..runs import lora_clip, prompted_clip, trainer, vit, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.slow
@pytest.mark.parametrize("build", [prompted_clip, lora_clip, vit])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_autocasts_own(tmp_path, monkeypatch, build, checkpointing):
    results = []
    for cast in (True, False):
        losses = [] if build is vit else [OTPreservation(weight=1.0)]
        options = {"bf16": True, "max_steps": 4, CHECKPOINTING: checkpointing}
        run = trainer(tmp_path, build(), losses, **options)
        if not cast:
            monkeypatch.setattr(HalfWeights, "__enter__", lambda self: self)
        run.train()
        results.append(weights(run.model))
        monkeypatch.undo()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert value.dtype == torch.float32


def test_the_model_is_as_it_was(tmp_path):
    run = trainer(tmp_path, bf16=True, max_steps=3, eval_dataset=tiny_images(8))
    before = {name: (p, p.detach().clone()) for name, p in run.model.named_parameters() if not p.requires_grad}
    run.train()
    for name, parameter in run.model.named_parameters():
        if not parameter.requires_grad:
            assert parameter is before[name][0]
            assert torch.equal(parameter, before[name][1])
    run.model.get_image_features(pixel_values=pixels())  # outside autocast
    assert 0 <= run.evaluate()["eval_accuracy"] <= 1


def test_copies_are_made_once_and_trained_weights_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    half, seen = HalfWeights(model, torch.bfloat16), []
    for _ in range(2):
        with half:
            seen.append(model[0].weight)
            assert model[0].weight.dtype == model[0].bias.dtype == torch.bfloat16
            assert model[1].weight.dtype == model[2].weight.dtype == torch.float32
    assert seen[0] is seen[1]
    assert model[0].weight.dtype == torch.float32
    with pytest.raises(RuntimeError, match="inside"), half:
        raise RuntimeError("inside")
    assert model[0].weight.dtype == torch.float32
    with HalfWeights(model, None):
        assert model[0].weight.dtype == torch.float32
