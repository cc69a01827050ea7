"""A model with other modules at some places: it computes with them, and the model itself stays as it was."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_ncgeo.models.image_encoder import encode_and_classify
from peft_ncgeo.models.substitution import Recorder, substitute

from ..conftest import pixels, tiny_vit_classifier


def state(model: nn.Module) -> list:
    """Every module with all that it holds, by identity."""
    return [
        (name, id(module), [(key, id(value)) for key, value in vars(module).items()])
        for name, module in model.named_modules()
    ] + [(key, id(child)) for module in model.modules() for key, child in module._modules.items()]


def test_other_modules_are_run_and_the_model_stays_as_it_was():
    model = tiny_vit_classifier()
    before, expected = state(model), model(pixels()).logits
    double = nn.Linear(32, 5)
    double.weight, double.bias = nn.Parameter(2 * model.classifier.weight), nn.Parameter(2 * model.classifier.bias)
    last = "vit.layers.2.mlp"
    recorder = Recorder(model.get_submodule(last))
    view = substitute(model, {"classifier": double, last: recorder})
    torch.testing.assert_close(view(pixels()).logits, 2 * expected)
    assert recorder.only("left").shape == (3, 5, 32)
    assert state(model) == before
    assert torch.equal(model(pixels()).logits, expected)


def test_gradients_arrive_at_the_models_own_weights():
    model = get_peft_model(tiny_vit_classifier(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    results = []
    for logits in (lambda: model(pixel_values=pixels()).logits, lambda: encode_and_classify(model, pixels())[1]):
        model.zero_grad()
        logits().square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() != set()
    torch.testing.assert_close(results[0], results[1])


class Halve(ModelHook):
    """Changes what enters a module, as Accelerate moves it to another device."""

    def pre_forward(self, module, *args, **kwargs):
        return args, {name: value / 2 for name, value in kwargs.items()}


def test_hooks_of_accelerate_run():
    model = tiny_vit_classifier()
    expected = model(pixel_values=pixels() / 2).logits
    add_hook_to_module(model, Halve())
    features, logits = encode_and_classify(model, pixels())
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(model.classifier(features), expected)


def test_a_module_that_is_not_called_once_has_no_feature():
    model = tiny_vit_classifier()
    unused, twice = Recorder(model.classifier), Recorder(model.classifier)
    substitute(model, {"classifier": nn.Sequential(twice, nn.Linear(5, 32), twice)})(pixels())
    for recorder in (unused, twice):
        with pytest.raises(ValueError, match="Linear"):
            recorder.only("entered")
