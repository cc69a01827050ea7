"""Adapters of every method in a model: trained, switched, copied, and in every precision."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from peft_ncgeo.models.towers import find_towers
from peft_ncgeo.tuners.own_configs import own_configs

from ..cases import TUNERS
from ..conftest import checkpoint, pixels, texts
from .peft_suite_cases import CASES
from .tuned import adapted, outputs

pytestmark = pytest.mark.filterwarnings("ignore:.*all of them get prompts")


def test_every_method_is_listed():
    own = set(own_configs().values())
    assert {type(case.config()) for case in TUNERS.values()} == own
    assert {case.config_cls for case in CASES} == own  # for PEFT's own tests


def test_only_its_own_parameters_are_trained(case):
    model = adapted(case)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == case.parameters
    assert all(f".{case.prefix}" in name and p.dtype == torch.float32 for name, p in trainable.items())


def test_every_parameter_matters_and_gets_gradient(case):
    model = adapted(case)
    outputs(model, case.slots).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@torch.no_grad()
def test_disabled_adapter_is_the_base_model(case):
    model, base = adapted(case), outputs(case.build().requires_grad_(False), case.slots)
    assert not torch.allclose(outputs(model, case.slots), base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case.slots), base)
    assert not torch.allclose(outputs(model, case.slots), base, atol=1e-3)


@torch.no_grad()
def test_outputs_keep_their_shape(case):
    """Prompts leave no tokens behind: heads that average patches see patches only."""
    base, model = case.build(), adapted(case).get_base_model()
    if hasattr(base, "get_image_features") or hasattr(base, "vision_model"):
        base, model = base.vision_model, model.vision_model
    inputs = texts(max(case.slots, 4)) if "text" in find_towers(base) else {"pixel_values": pixels()}
    for name, value in base(**inputs).items():
        assert model(**inputs)[name].shape == value.shape, name


@torch.no_grad()
def test_two_adapters(case):
    model = adapted(case, name="first")
    first = outputs(model, case.slots)
    torch.manual_seed(5)
    model.add_adapter("second", case.config())
    assert torch.equal(outputs(model, case.slots), first)
    model.set_adapter("second")
    second = outputs(model, case.slots)
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("first")
    assert torch.equal(outputs(model, case.slots), first)
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("second")
    assert model.active_adapters == ["first"]
    assert torch.equal(outputs(model, case.slots), first)
    assert not any("second" in name for name, _ in model.named_parameters())


@torch.no_grad()
def test_deleting_an_inactive_adapter_changes_nothing(case):
    model = adapted(case, name="first")
    first = outputs(model, case.slots)
    model.add_adapter("second", case.config())
    model.delete_adapter("second")
    assert torch.equal(outputs(model, case.slots), first)


def test_two_active_adapters_are_refused(case):
    model = adapted(case)
    model.add_adapter("second", case.config())
    with pytest.raises(ValueError, match="One adapter"):
        model.base_model.set_adapter(["default", "second"])


def test_merging_is_refused(case):
    with pytest.raises(ValueError, match="cannot be merged"):
        adapted(case).merge_and_unload()


@torch.no_grad()
def test_unload_gives_the_base_back(case):
    base = case.build().requires_grad_(False)  # SigLIP's pooling takes another path where weights need gradients
    unloaded = adapted(case).unload()
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in base.named_modules()]
    assert torch.equal(outputs(unloaded, case.slots), outputs(base, case.slots))


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(case, clone):
    model = adapted(case)
    before = outputs(model, case.slots)
    twin = clone(model)
    assert torch.equal(outputs(twin, case.slots), before)
    for name, parameter in twin.named_parameters():
        if case.prefix in name:
            parameter.zero_()
    assert torch.equal(outputs(model, case.slots), before)
    assert not torch.allclose(outputs(twin, case.slots), before, atol=1e-3)


def gradients(model, slots: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    outputs(model, slots).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_changes_nothing(case):
    if not case.transformer:
        assert not case.build().supports_gradient_checkpointing
        return
    model = adapted(case).train()
    expected = gradients(model, case.slots)
    checkpoint(model)
    torch.testing.assert_close(gradients(model, case.slots), expected)


def test_eager_equals_sdpa(case):
    if not case.transformer:
        assert not case.build()._supports_sdpa
        return
    eager, sdpa = (
        gradients(adapted(case, build=lambda i=i: case.build(attn_implementation=i)), case.slots)
        for i in ("eager", "sdpa")
    )
    torch.testing.assert_close(eager, sdpa, atol=5e-5, rtol=1e-4)


def test_bf16_base_keeps_float32_parameters(case):
    full = adapted(case)
    half = adapted(case, build=lambda: case.build().to(torch.bfloat16))
    assert all(p.dtype == torch.float32 for p in half.parameters() if p.requires_grad)
    out = outputs(half, case.slots)
    assert out.dtype == (torch.float32 if case.prefix == "ncgeo_prototype_" else torch.bfloat16)
    torch.testing.assert_close(out.float(), outputs(full, case.slots), atol=0.1, rtol=0.1)
    assert all(torch.isfinite(g).all() for g in gradients(half, case.slots).values())


def test_autocast(case):
    model = adapted(case)
    expected = outputs(model, case.slots)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = outputs(model, case.slots)
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)
