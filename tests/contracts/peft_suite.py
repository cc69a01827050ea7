"""PEFT's test files as modules, how their tests are parametrised, and what they find around them here."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import PeftConfig
from PIL import Image

from peft_ncgeo.tuners.adaptformer import AdaptFormerLayer
from peft_ncgeo.tuners.copa import CoPALayer, Residual
from peft_ncgeo.tuners.tuner_layer import TunerLayer

from .fetch_peft_suite import TESTS
from .peft_suite_cases import Case, Models, lora, made_up_network, saved, targeted

PACKAGE = "peft_suite"  # of PEFT's files; in their own repository it is `tests`, as ours is here


def import_files(names: Iterable[str]) -> tuple[dict[str, types.ModuleType], list[str]]:
    """Import PEFT's files; those that cannot be are told in a line each."""
    spec = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(TESTS)]
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    absent = importlib.util.find_spec("diffusers") is None
    if absent:  # one class is asked of it, whose instances a few tests treat in another way
        sys.modules["diffusers"] = types.ModuleType("diffusers")
        sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    modules, problems = {}, []
    for name in ("testing_utils", *names):
        try:
            with warnings.catch_warnings():
                for category in (UserWarning, DeprecationWarning, FutureWarning):  # PEFT's own affair
                    warnings.simplefilter("ignore", category)
                modules[name] = importlib.import_module(f"{PACKAGE}.{name}")
        except Exception as error:
            problems.append(f"{name}.py cannot be imported ({type(error).__name__}: {error})")
        if name == "testing_utils" and name in modules:  # a file asks for an image from the network as it is imported
            modules.pop(name).load_cat_image = lambda: Image.new("RGB", (16, 16))
    if absent:
        del sys.modules["diffusers"]
    return modules, problems


def parametrized(test: Callable) -> list[tuple[list[str], list, pytest.Mark]]:
    """Names and values of each `parametrize` on a test."""
    marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
    given = [mark.args[0] for mark in marks]
    names = [[n.strip() for n in name.split(",")] if isinstance(name, str) else list(name) for name in given]
    return [(n, list(mark.args[1]), mark) for n, mark in zip(names, marks, strict=True)]


def methods(value: Any) -> set[type]:
    """The config classes among values, nested as parameters are."""
    if isinstance(value, PeftConfig):
        return {type(value)}
    if isinstance(value, type):
        return {value} if issubclass(value, PeftConfig) else set()
    return set().union(*map(methods, value)) if isinstance(value, list | tuple) else set()


def _config_class(case: Case, alone: bool) -> Callable:
    """The class; a test that takes nothing else names linear layers of a made-up network."""
    return functools.partial(targeted, case) if alone else case.config_cls


def _fields(case: Case, alone: bool) -> dict:
    return dict(case.fields)


def _path(case: Case, alone: bool) -> str:
    return saved(case)


# What a case gives for an argument of PEFT's tests.
ARGUMENTS: dict[str, Callable[[Case, bool], Any]] = {
    "test_name": lambda case, alone: case.name,
    "tuner_method": _path,
    "model_id": _path,
    "model_cls_and_id": lambda case, alone: (Models, saved(case)),
    "config_cls": _config_class,
    "config_class": lambda case, alone: case.config_cls,
    "config": lambda case, alone: targeted(case, modules_to_save=["0", "1"]),
    "config0": lambda case, alone: targeted(case),
    "config_kwargs": _fields,
    "config_kwargs_1": _fields,
    "config_kwargs_2": _fields,
    "mandatory_kwargs": _fields,
}
MODELS = {"model_id", "model_cls_and_id"}


def _no_network() -> None:
    raise ConnectionError("This test asks for the network.")


def prepare(patch: pytest.MonkeyPatch, module: types.ModuleType, case: Case) -> None:
    """Prepare the tests' surroundings: no network, our models, and weights away from the identity where asked for."""
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    patch.setitem(sys.modules[f"{PACKAGE}.testing_utils"]._HUB_MODEL_ACCESSES, saved(case), 0)
    stand_ins = {
        "DeepMLP": functools.partial(made_up_network, case),
        "MLP": functools.partial(made_up_network, case),
        "PEFT_MODELS_TO_TEST": [(lora(), None)],
        "load_dataset_english_quotes": _no_network,
    }
    for name in stand_ins.keys() & vars(module).keys():
        patch.setattr(module, name, stand_ins[name])
    if hasattr(module, "set_init_weights_false"):
        away = functools.partial(_away_from_identity, patch, module.set_init_weights_false)
        patch.setattr(module, "set_init_weights_false", away)


def _away_from_identity(patch: pytest.MonkeyPatch, of_peft: Callable, config_cls: type, fields: dict) -> dict:
    """PEFT's own asks a config for `init_weights=False`; where there is no such field, weights are moved here."""
    if "init_weights" in inspect.signature(config_cls).parameters:
        return of_peft(config_cls, fields)

    def moved(update_layer: Callable, layer: Any, adapter_name: str, *args: Any) -> None:
        update_layer(layer, adapter_name, *args)
        for name in layer.adapter_layer_names:
            if adapter_name in getattr(layer, name):
                held = getattr(layer, name)[adapter_name]
                for weight in [held] if isinstance(held, torch.Tensor) else held.parameters():
                    weight.data += 0.05 * torch.randn_like(weight)

    def move(cls: type[TunerLayer]) -> None:
        update_layer = cls.update_layer
        patch.setattr(cls, "update_layer", lambda *args: moved(update_layer, *args))

    move(CoPALayer)
    move(Residual)
    move(AdaptFormerLayer)
    return dict(fields)


def ending(error: BaseException) -> str:
    """Return in one line how a test ended: the error, and the line of PEFT's test."""
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if str(TESTS) in frame.filename]
    return " ".join(f"{type(error).__name__}: {error} | {lines[-1] if lines else ''}".split())
