"""Ctrl-C while something computes: the model is as it was before."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode

from peft_ncgeo import CoPAConfig, ZeroShotClassifier, adapt
from peft_ncgeo.hub import load_adapter
from peft_ncgeo.losses import OTPreservation
from peft_ncgeo.models.adapters import adapters_off
from peft_ncgeo.training import align_classifier, sweep_alignment
from peft_ncgeo.training.features.half_weights import HalfWeights

from ..conftest import NAMES, pixels, tiny_clip, tiny_images, tiny_processor, tiny_vit, tiny_vit_classifier
from ..states import changes, state
from .runs import prompted_clip, trainer, vit

pytestmark = [pytest.mark.filterwarnings("ignore:The head belongs"), pytest.mark.slow]
IMAGES, PROCESSOR = tiny_images(10), tiny_processor()
# what puts a state back: it may be stopped as well, but then nothing is left that could go on
SETTING = {"__get__", "__set__", "_set_grad_enabled", "copy_", "requires_grad_"}


class Operations(TorchFunctionMode):
    """Counts operations on tensors, and raises at the k-th where there is a k."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at, self.count = stop_at, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") not in SETTING:
            self.count += 1
            if self.count == self.stop_at:
                raise KeyboardInterrupt
        return function(*args, **(kwargs or {}))


def places(call) -> list[int]:
    """Operations to stop `call` at: twenty over all of it, and the last ones."""
    with Operations() as seen:
        call()
    return sorted({*range(1, seen.count, max(1, seen.count // 20)), *range(max(1, seen.count - 16), seen.count, 2)})


def stopped(call, at: int) -> bool:
    """Return True if the call came to that operation; the first call is longer, as some things are done only once."""
    try:
        with Operations(at):
            call()
    except KeyboardInterrupt:
        return True
    return False


def mixed(model: nn.Module) -> nn.Module:
    """In training mode but for some modules, and with other trainable parameters than usual."""
    model.train()
    for module in list(model.modules())[3::7]:
        module.training = False
    for parameter in list(model.parameters())[1::5]:
        parameter.requires_grad_(not parameter.requires_grad)
    return model


def lora(*targets: str, **fields):
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **fields)
    return mixed(get_peft_model(tiny_vit_classifier(), config))


def copa():
    return mixed(get_peft_model(tiny_vit(), CoPAConfig(residual_adapters=True)))


def adapting(model):
    labels = IMAGES["label"][:]
    adapt(model, IMAGES["image"][:], labels, 3, 0.1, processor=PROCESSOR.image_processor, batch_size=4)


def aligning(model):
    align_classifier(model, IMAGES, 0.5, PROCESSOR, batch_size=4)


def sweeping(model):
    sweep_alignment(model, IMAGES, IMAGES, (0.0, 0.5), PROCESSOR, batch_size=4)


def classifying(model):
    ZeroShotClassifier(model, PROCESSOR).predict(IMAGES["image"][:4], NAMES)


CASES = {
    "adapt": (copa, adapting),
    "adapt-frozen": (lambda: mixed(tiny_vit()), adapting),
    "align": (partial(lora, "q_proj", modules_to_save=["classifier"]), aligning),
    "align-lora_head": (partial(lora, "q_proj", "classifier"), aligning),
    "align-clip": (lambda: mixed(prompted_clip()), aligning),
    "sweep": (partial(lora, "q_proj", "classifier"), sweeping),
    "zero-shot": (lambda: prompted_clip().eval(), classifying),
}


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_as_before(name):
    build, call = CASES[name]
    call(build())
    model, stops = build(), 0
    for at in places(partial(call, build())):
        before = state(model)
        if stopped(partial(call, model), at):
            stops += 1
            assert changes(before, state(model)) == [], at
        else:
            model = build()
    assert stops > 20


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_a_training_leaves_nothing_of_its_passes(precision, tmp_path):
    """Of the look-ahead, of shared layers, of weights in half precision, of autocast.

    The weights that a training has reached are its own affair; here its steps change none.
    """
    settings = {
        "max_steps": 3,
        "train": tiny_images(8),
        "losses": [OTPreservation(weight=1.0)],
        "learning_rate": 0.0,
        **precision,
    }
    model = prompted_clip(first_layer=1)
    trainer(tmp_path, model, **settings).train()
    stops = 0
    for at in places(trainer(tmp_path, model, **settings).train)[::3]:
        run = trainer(tmp_path, model, **settings)
        before = state(model, modes=False)
        stops += stopped(run.train, at)
        assert changes(before, state(model, modes=False)) == [], at
        assert not torch.is_autocast_enabled("cpu"), at
    assert stops > 6


class Probe(nn.Module):
    """Stops whoever changes its mode."""

    def __setattr__(self, name, value):
        if name == "training" and not value:
            raise KeyboardInterrupt
        super().__setattr__(name, value)


@pytest.mark.parametrize("call", [aligning, sweeping, adapting])
def test_stopped_while_modules_change_their_mode(call):
    model = mixed(tiny_vit_classifier())
    model.add_module("probe", Probe())
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        call(model)
    assert changes(before, state(model)) == []


def test_stopped_while_adapters_are_switched_off():
    class Disabled:
        def __set__(self, layer, value):
            raise KeyboardInterrupt

    model = prompted_clip()
    last = [module for module in model.modules() if hasattr(module, "_disable_adapters")][-1]
    before = state(model)
    kind, last.__class__ = type(last), type("Stopping", (type(last),), {"_disable_adapters": Disabled()})
    with pytest.raises(KeyboardInterrupt), adapters_off(model):
        pass
    last.__class__ = kind
    assert changes(before, state(model)) == []


def test_an_exit_from_half_precision_that_was_stopped_can_be_repeated():
    model = tiny_clip().requires_grad_(False)
    before = state(model)
    half = HalfWeights(model, torch.bfloat16)
    half.__enter__()
    module, name, parameter = half._places[3]
    half._places[3] = (None, name, parameter)  # fails here
    with pytest.raises(AttributeError):
        half.__exit__()
    half._places[3] = (module, name, parameter)
    half.__exit__()
    assert changes(before, state(model)) == []


def test_an_adapter_that_was_not_loaded_to_its_end_is_taken_out(tmp_path):
    vit().save_pretrained(tmp_path)
    load_adapter(tmp_path, tiny_vit_classifier())
    base, stops = tiny_vit_classifier(), 0
    before, logits = state(base), base(pixels()).logits
    for at in places(lambda: load_adapter(tmp_path, tiny_vit_classifier())):
        if not stopped(lambda: load_adapter(tmp_path, base), at):
            break
        stops += 1
        assert changes(before, state(base)) == [], at
        assert torch.equal(base(pixels()).logits, logits)
    assert stops > 5
