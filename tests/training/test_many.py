"""Many trainings and adaptations in one process: nothing of one is left when the next begins."""

from __future__ import annotations

import atexit
import gc
import logging
import threading
import warnings

import pytest
import torch

from peft_ncgeo import ZeroShotClassifier, adapt
from peft_ncgeo.losses import OTPreservation
from peft_ncgeo.training import GeometryMonitor, align_classifier

from ..conftest import NAMES, tiny_images, tiny_processor, tiny_vit
from .runs import prompted_clip, trainer

pytestmark = pytest.mark.slow

IMAGES, PROCESSOR = tiny_images(8, NAMES[:4]), tiny_processor()


def train(folder, model):
    settings = {"losses": [OTPreservation(budget=0.1)], "callbacks": [GeometryMonitor()], "train": IMAGES}
    run = trainer(folder, model, eval_dataset=IMAGES, max_steps=3, save_strategy="steps", save_steps=3, **settings)
    run.train()
    run.evaluate()
    run.save_model()
    return run


def use(folder, model):
    align_classifier(model, IMAGES, 0.5, PROCESSOR)
    return ZeroShotClassifier(model, PROCESSOR).predict(IMAGES["image"][:2], NAMES)


def adaptation(folder, model):
    backbone = model.few_shot_backbone = getattr(model, "few_shot_backbone", None) or tiny_vit()
    return adapt(backbone, IMAGES["image"][:], IMAGES["label"][:], 2, processor=PROCESSOR.image_processor)


def held(model) -> dict[str, int]:
    """Count the objects that this process keeps alive."""
    gc.collect()
    modules = list(model.modules())
    things = gc.get_objects()
    tensors = [thing for thing in things if issubclass(type(thing), torch.Tensor)]
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in ("transformers", "peft", "datasets"))]
    return {
        "tensors": len(tensors),
        "numbers": sum(tensor.numel() for tensor in tensors),
        "modules": sum(issubclass(type(thing), torch.nn.Module) for thing in things),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules),
        "attributes": sum(len(vars(module)) for module in modules),
        "threads": threading.active_count(),
        "at exit": atexit._ncallbacks(),
        "warning filters": len(warnings.filters),
        "log handlers": sum(len(logger.handlers) for logger in loggers),
    }


@pytest.mark.parametrize("call", [train, use, adaptation])
def test_six_leave_as_much_as_three(call, tmp_path):
    model = prompted_clip()
    for _ in range(3):
        call(tmp_path, model)
    three = held(model)
    for _ in range(3):
        call(tmp_path, model)
    assert held(model) == three
