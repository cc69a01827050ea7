"""Models and processors by name."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel

from ...data import load_demo
from ...data.processors import find_processor
from ...validation import OF_THE_MACHINE, one_line

DEMO = "demo"  # the built-in mini-CLIP


def load_model(name: str) -> tuple[Any, Any]:
    """Load a model without a head, and its processor.

    Raises:
        ValueError: the model cannot be loaded; the message says why in one line.
    """
    if name == DEMO:
        demo = load_demo()
        return demo.model, demo.processor
    model = _try(name, lambda: AutoModel.from_pretrained(name))
    processor = find_processor(model, name)
    if processor is None:
        raise ValueError(f"No processor was found beside the model {name}; save it into the same folder.")
    return model, processor


def empty_model(name: str) -> nn.Module:
    """Return a model of its own class, without weights."""
    if name == DEMO:
        return load_demo().model
    config = _try(name, lambda: AutoConfig.from_pretrained(name))
    own: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    with torch.device("meta"):
        return _try(name, lambda: own._from_config(config) if own else AutoModel.from_config(config))


def _try(name: str, make: Any) -> Any:
    try:
        return make()
    except OF_THE_MACHINE:
        raise
    except Exception as error:  # Transformers and the Hub raise many types
        raise ValueError(f"The model {name} cannot be loaded: {one_line(error)}") from error
