"""Layers below the first prompt run once a step, and the frozen features are the same to the last bit."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode

from peft_ncgeo import NPTConfig
from peft_ncgeo.losses import OTPreservation
from peft_ncgeo.training.features.shared_layers import SharedLayers

from ...conftest import CHECKPOINTING, tiny_clip
from ..runs import Pointwise, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def later(first_layer: int, base=None, **fields):
    torch.manual_seed(3)
    counts = {"num_text_tokens": 2, "num_vision_tokens": 2, "text_depth": 1, "vision_depth": 2}
    return get_peft_model(base or tiny_clip(), NPTConfig(first_layer=first_layer, **{**counts, **fields}))


def run_of(folder, model, share: bool, **options):
    losses = [OTPreservation(weight=1.0), Pointwise(weight=0.3)]
    options = {"augmentation": "crop_flip", "max_steps": 3, **options}  # new views: the frozen model sees them all
    run = trainer(folder, model, losses, **options)
    if not share:
        begin = run.features.begin

        def unshared(texts):
            begin(texts)
            run.features.shared.layers = []

        run.features.begin = unshared
    return run


@pytest.mark.slow
@pytest.mark.parametrize("first_layer", [1, 2])
@pytest.mark.parametrize("options", [{}, {CHECKPOINTING: True}, {"bf16": True}])
def test_training_is_the_same_to_the_last_bit(tmp_path, first_layer, options):
    results = []
    for share in (True, False):
        run = run_of(tmp_path, later(first_layer), share, **options)
        run.train()
        assert len(run.features.shared.layers) == (first_layer + 1 if share else 0)
        assert not any("forward" in vars(module) for module in run.model.modules())
        assert not any(module._forward_pre_hooks for module in run.model.modules())
        results.append(weights(run.model))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_operations_are_saved(tmp_path):
    counts = []
    for share in (True, False):
        with FlopCounterMode(display=False) as counter:
            run_of(tmp_path, later(2), share, max_steps=1).train()
        counts.append(counter.get_total_flops())
    tower = tiny_clip().vision_model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower.encoder.layers[0](torch.randn(8, 5, 40), None)
    assert counts[1] - counts[0] == 2 * counter.get_total_flops()  # two layers of the frozen pass


def test_nothing_to_share():
    assert SharedLayers(later(0)).layers == []
    assert SharedLayers(tiny_clip()).layers == []
    assert SharedLayers(get_peft_model(tiny_clip(), NPTConfig.coop(num_text_tokens=2))).layers == []
    lora = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_clip(), "lora")
    assert SharedLayers(later(2, lora)).layers == []
    random = tiny_clip()
    random.config.vision_config.attention_dropout = 0.1
    assert SharedLayers(later(2, random)).layers == []
    model = later(2)
    assert len(SharedLayers(model).layers) == 3
    with model.disable_adapter():
        assert SharedLayers(model).layers == []


def test_a_pass_that_fails_leaves_the_model_whole():
    model = later(2)
    shared = SharedLayers(model)
    pixels = torch.randn(2, 3, 16, 16)
    expected = model.get_image_features(pixel_values=pixels).pooler_output
    for context in (shared.recording, shared.replaying):
        shared.entered = torch.zeros(2, 5, 40)
        with pytest.raises(RuntimeError, match="inside"), context():
            raise RuntimeError("inside")
    assert torch.equal(model.get_image_features(pixel_values=pixels).pooler_output, expected)
