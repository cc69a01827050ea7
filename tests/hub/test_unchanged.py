"""A model is changed as a whole or not at all: loads, injections and casts that are refused or stopped at any line."""

from __future__ import annotations

import json
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import peft_ncgeo
from peft_ncgeo import CoPAConfig, FewShotClassifier, NPTConfig, ZeroShotClassifier, adapt
from peft_ncgeo.hub import export_classifier, load_adapter
from peft_ncgeo.models.precision import hold_in_float32
from peft_ncgeo.models.snapshots import unchanged_on_error
from peft_ncgeo.training import align_classifier

from ..conftest import NAMES, pixels, tiny_clip, tiny_images, tiny_processor, tiny_vit, tiny_vit_classifier
from ..states import changes, state

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]
WEIGHTS = "adapter_model.safetensors"
PACKAGE = str(Path(peft_ncgeo.__file__).parent)
PROMPTS = {"num_text_tokens": 3, "num_vision_tokens": 2, "vision_depth": 2, "text_init": [6, 7, 8]}
LORA = partial(LoraConfig, r=2, target_modules=["q_proj"])
KINDS = {
    "prompts": (tiny_clip, partial(NPTConfig, **PROMPTS)),
    "lora": (tiny_vit_classifier, LORA),
    "pissa": (tiny_vit_classifier, partial(LORA, init_lora_weights="pissa")),
    "olora": (tiny_vit_classifier, partial(LORA, init_lora_weights="olora")),
    "biases": (tiny_vit_classifier, partial(LORA, bias="all")),
    "head": (tiny_vit_classifier, partial(LORA, init_lora_weights="olora", modules_to_save=["classifier"])),
}


def saved(kind, folder):
    """Save an adapter far from its start; return a base for it in training mode."""
    build, config = KINDS[kind]
    torch.manual_seed(0)
    model = get_peft_model(build(), config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 if parameter.requires_grad else 0)
    model.save_pretrained(folder)
    return build().train()


def spoil(folder, how):
    """Change a folder's weights to others that do not fit."""
    tensors = load_file(folder / WEIGHTS)
    last = sorted(tensors)[-1]
    if how == "missing":
        tensors.pop(last)
    elif how == "unexpected":
        tensors["base_model.model.more"] = torch.ones(2)
    else:
        tensors[last] = torch.cat([tensors[last], tensors[last]])
    save_file(tensors, folder / WEIGHTS)


class Lines:
    """Counts the lines of this package that run, and raises at the k-th where there is a k."""

    def __init__(self, stop_at=None):
        self.stop_at, self.count = stop_at, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exception):
        sys.settrace(self.before)

    def trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.stop_at:
                raise KeyboardInterrupt
        return self.trace


def lines(call):
    """Lines to stop `call` at: fifteen over all of it, and each of the last ones."""
    call()  # what is done only once makes the first call longer
    with Lines() as seen:
        call()
    return sorted({*range(1, seen.count, max(1, seen.count // 15)), *range(max(1, seen.count - 15), seen.count + 1)})


def stopped(call, at):
    try:
        with Lines(at) as seen:
            call()
    except KeyboardInterrupt:
        return seen.count == at
    finally:
        torch.set_grad_enabled(True)  # the line may be one of torch's own, on the way out of no_grad
    return False


@pytest.mark.parametrize("how", ["missing", "unexpected", "longer"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_adapter_leaves_the_base_bit_for_bit(tmp_path, kind, how):
    base = saved(kind, tmp_path)
    spoil(tmp_path, how)
    before = state(base)
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(tmp_path, base)
    assert changes(before, state(base)) == []


@pytest.mark.parametrize("kind", ["prompts", "head"])
def test_a_load_that_is_stopped_at_any_line(tmp_path, kind):
    """After the last line the adapter is there as it was saved; after no line are there random weights."""
    base = saved(kind, tmp_path)
    if kind == "head":
        (tmp_path / "class_names.json").write_text(json.dumps(NAMES))
    before, build, stops = state(base), KINDS[kind][0], 0
    loaded = state(load_adapter(tmp_path, build()).get_base_model())
    for at in lines(lambda: load_adapter(tmp_path, build())):
        if stopped(partial(load_adapter, tmp_path, base), at):
            stops += 1
            after = state(base)
            assert changes(before, after) == [] or changes(loaded, after) == [], at
            if changes(before, after):
                base = build().train()
    assert stops > 20


def test_an_adapter_in_the_base_survives_another_that_is_refused(tmp_path):
    """Both are called "default", so that the second one's prompts would be written over the first one's."""
    base = saved("prompts", tmp_path)
    inside = load_adapter(tmp_path, base).get_base_model()
    spoil(tmp_path, "unexpected")
    before = state(inside)
    with pytest.raises(ValueError, match="unexpected"):
        load_adapter(tmp_path, inside)
    assert changes(before, state(inside)) == []


def test_classifiers_that_are_refused_after_loading(tmp_path):
    saved("prompts", tmp_path / "prompts")
    heads = adapt(get_peft_model(tiny_vit(), CoPAConfig()), pixels(4), [0, 1, 0, 1], steps=1)
    heads.save_pretrained(tmp_path / "heads")
    (tmp_path / "heads" / "prototypes.safetensors").unlink()
    cases = [
        (ZeroShotClassifier, tmp_path / "prompts", tiny_clip, "No processor"),
        (FewShotClassifier, tmp_path / "heads", tiny_vit, "no prototypes"),
        (FewShotClassifier, tmp_path / "prompts", tiny_clip, "not one of type"),
    ]
    for kind, folder, build, said in cases:
        base = build().train()
        before = state(base)
        with pytest.raises(ValueError, match=said):
            kind.from_pretrained(folder, base)
        assert changes(before, state(base)) == []


def test_prompts_that_are_stopped_while_they_are_put_in():
    """Notes that PEFT writes in the base before anything is put in are PEFT's own and do not count."""

    def inject(base):
        return get_peft_model(base, NPTConfig(**PROMPTS))

    base, stops = tiny_clip(), 0
    before = {key: value for key, value in state(base).items() if key not in ("config", "adapters")}
    with_prompts = state(inject(tiny_clip()).get_base_model()).keys()
    for at in lines(lambda: inject(tiny_clip())):
        if stopped(partial(inject, base), at):
            stops += 1
            after = state(base)
            if after.keys() == with_prompts:  # after the last line that could change anything
                base = tiny_clip()
            else:
                assert changes(before, {key: after[key] for key in after if key in before}) == [], at
                assert after.keys() - before.keys() == {"config", "adapters"}
    assert stops > 20


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_cast_that_is_stopped_mixes_no_dtypes(kind):
    model = get_peft_model(tiny_vit_classifier(), LORA(modules_to_save=["classifier"])).to(kind)
    before, stops = state(model), 0
    for at in lines(partial(hold_in_float32, get_peft_model(tiny_vit_classifier(), LORA()).to(kind))):
        if stopped(partial(hold_in_float32, model), at):
            stops += 1
            after = state(model)
            if any(torch.float32 in entry for entry in after.values() if isinstance(entry, tuple)):
                model = get_peft_model(tiny_vit_classifier(), LORA(modules_to_save=["classifier"])).to(kind)
                fresh = state(model)
                hold_in_float32(model)
                assert changes(state(model), after) == []  # after its last line
                model = get_peft_model(tiny_vit_classifier(), LORA(modules_to_save=["classifier"])).to(kind)
                before = fresh
            else:
                assert changes(before, after) == [], at
    assert stops > 20


def test_warnings_that_are_errors_leave_the_head():
    model = get_peft_model(tiny_vit_classifier(), LORA())
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="head belongs"):
            align_classifier(model, tiny_images(10), 0.5, tiny_processor())
    assert changes(before, state(model)) == []


@pytest.mark.parametrize("names", [["owl", "word " * 200], ["owl", ""], ["owl"]], ids=["long", "blank", "one"])
def test_refused_names_leave_the_mode(tmp_path, names):
    model = tiny_clip()
    classifier = ZeroShotClassifier(model, tiny_processor())
    model.vision_model.train()
    before = state(model)
    for call in (
        partial(classifier.predict, tiny_images(2)["image"][:], names),
        partial(classifier.text_features, names),
        partial(export_classifier, model, names, tmp_path, tiny_processor()),
    ):
        with pytest.raises(ValueError, match="name"):
            call()
        assert changes(before, state(model)) == []
    export_classifier(model, NAMES, tmp_path / "owls", tiny_processor())
    assert changes(before, state(model)) == []


def write_over(model):
    weight, bias = model.classifier.weight, model.classifier.bias
    with unchanged_on_error(model, copy_weights=True), torch.no_grad():
        weight[0].mul_(3)
        weight.data += 1
        torch.add(bias, 1, out=bias)
        torch._foreach_zero_(list(model.vit.parameters()))
        bias.data = torch.zeros(5, dtype=torch.float64)
        model.classifier = torch.nn.Linear(7, 5)
        model.vit.register_forward_hook(print)
        model.train().requires_grad_(False).config.id2label[0] = "owl"
        model.note = 1
        raise RuntimeError("enough")


def test_what_is_written_over_is_taken_back():
    """By any way to write: in place, through views, `out=`, foreach functions, `.data`, modules and attributes."""
    model = tiny_vit_classifier()
    before, weight = state(model), model.classifier.weight
    with pytest.raises(RuntimeError, match="enough"):
        write_over(model)
    assert changes(before, state(model)) == []
    assert model.classifier.weight is weight
    assert not hasattr(model, "note")
