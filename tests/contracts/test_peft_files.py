"""Adapters of every method are saved and loaded in every way that PEFT has."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from packaging.version import Version
from peft import (
    AutoPeftModel,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from transformers.integrations.peft import MIN_PEFT_VERSION

from ..cases import Tuner
from .tuned import adapted, assert_same, outputs

pytestmark = pytest.mark.filterwarnings("ignore:.*all of them get prompts")


def saved(case: Tuner, tmp_path, with_base: bool = False):
    """An adapter on disk; `with_base` saves the base beside it, as a hub would have it."""
    model = adapted(case)
    if with_base:
        case.build().save_pretrained(tmp_path / "base")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


@torch.no_grad()
def test_save_and_load(case, tmp_path):
    model, path = saved(case, tmp_path)
    assert sorted(p.name for p in path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(case.build(), path)
    assert_same(outputs(loaded, case.slots), outputs(model, case.slots), case)
    assert not any(p.requires_grad for p in loaded.parameters())


@torch.no_grad()
def test_load_with_low_cpu_memory(one_of_a_kind, tmp_path):
    model, path = saved(one_of_a_kind, tmp_path)
    loaded = PeftModel.from_pretrained(one_of_a_kind.build(), path, low_cpu_mem_usage=True)
    assert_same(outputs(loaded, one_of_a_kind.slots), outputs(model, one_of_a_kind.slots), one_of_a_kind)


@torch.no_grad()
def test_load_with_auto_peft_model(one_of_a_kind, tmp_path):
    model, path = saved(one_of_a_kind, tmp_path, with_base=True)
    loaded = AutoPeftModel.from_pretrained(path)
    assert type(loaded.get_base_model()) is type(one_of_a_kind.build())
    assert_same(outputs(loaded, one_of_a_kind.slots), outputs(model, one_of_a_kind.slots), one_of_a_kind)


@torch.no_grad()
def test_native_from_pretrained(one_of_a_kind, tmp_path):
    model, path = saved(one_of_a_kind, tmp_path, with_base=True)
    loaded = type(one_of_a_kind.build()).from_pretrained(path)
    assert_same(outputs(loaded, one_of_a_kind.slots), outputs(model, one_of_a_kind.slots), one_of_a_kind)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"this Transformers asks for PEFT {MIN_PEFT_VERSION}"
)
@torch.no_grad()
def test_native_load_adapter(one_of_a_kind, tmp_path):
    model, path = saved(one_of_a_kind, tmp_path)
    loaded = one_of_a_kind.build().requires_grad_(False)
    base = outputs(loaded, one_of_a_kind.slots)
    info = loaded.load_adapter(path, adapter_name="mine")
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert_same(outputs(loaded, one_of_a_kind.slots), outputs(model, one_of_a_kind.slots), one_of_a_kind)
    loaded.disable_adapters()
    assert torch.equal(outputs(loaded, one_of_a_kind.slots), base)


@torch.no_grad()
def test_injection_by_a_state_dict_is_injection_by_the_config(case, recwarn):
    """PEFT offers both; layers that an adapter needs without a parameter in them are in no state dict."""
    torch.manual_seed(3)
    given = inject_adapter_in_model(case.config(), case.build())
    tensors = get_peft_model_state_dict(given)
    recwarn.clear()
    injected = inject_adapter_in_model(case.config(), case.build(), state_dict=tensors)
    assert not [w for w in recwarn if "inconsistency" in str(w.message)]
    assert not set_peft_model_state_dict(injected, tensors).unexpected_keys
    assert_same(outputs(injected.eval(), case.slots), outputs(given.eval(), case.slots), case)


def test_missing_and_unexpected_keys_are_refused(case, tmp_path):
    _, path = saved(case, tmp_path)
    file = path / "adapter_model.safetensors"
    whole = {key: value.clone() for key, value in load_file(file).items()}  # not the file, which is written over
    for key in whole:
        save_file({k: v for k, v in whole.items() if k != key}, file)
        with pytest.raises(ValueError, match=rf"missing .*{case.prefix}"):
            PeftModel.from_pretrained(case.build(), path)
    extra = re.sub(rf"{case.prefix}[a-z]+", f"{case.prefix}other", key)
    save_file({**whole, extra: whole[key].clone()}, file)
    with pytest.raises(ValueError, match=rf"unexpected .*{case.prefix}other"):
        PeftModel.from_pretrained(case.build(), path)


def test_adapter_file_holds_its_own_tensors_only(case, tmp_path):
    _, path = saved(case, tmp_path)
    tensors = load_peft_weights(str(path), device="cpu")
    assert all(f".{case.prefix}" in name for name in tensors)
    assert sum(v.numel() for v in tensors.values()) == case.parameters + case.constants
