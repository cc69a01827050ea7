"""Tiny random models: what it takes to build one, and to feed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as T
from torch.nn.modules.batchnorm import _BatchNorm

K = 5  # labels


@dataclass
class Spec:
    """A model of one class; `cls` is its name in Transformers."""

    name: str
    cls: str
    kind: str  # dual | classifier | backbone
    config: Callable[[], Any]
    size: int = 32  # image side
    tok: str = "clip"  # tokenizer style of a dual encoder
    max_length: int = 16
    video: int = 0  # frames

    @property
    def family(self) -> str:
        """The folder of `transformers.models` that the class is in; "" where this Transformers does not have it."""
        parts = getattr(getattr(T, self.cls, None), "__module__", "..").split(".")
        return parts[2] if len(parts) > 2 else ""

    def build(self) -> Any:
        return calibrate(self, make(getattr(T, self.cls), self.config()))


V = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TX = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
CLIPTOK = {"bos_token_id": 61, "eos_token_id": 62, "pad_token_id": 62}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def make(cls, config, seed=0, **kw):
    torch.manual_seed(seed)
    model = cls._from_config(config, **kw).eval() if hasattr(cls, "_from_config") else cls(config).eval()
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():  # nothing may stay at 0, or prompts could not be seen
        for name, p in model.named_parameters():
            if p.is_floating_point() and not any(w in name for w in ("logit_scale", "temperature", "logit_bias")):
                p.add_(torch.randn(p.shape, generator=g) * (0.15 if p.dim() > 1 else 0.05))
            if name.endswith("logit_bias"):
                p.fill_(-1.5)
    return model


def calibrate(spec, model):
    """Batch norms get the statistics of random images, or deep tiny nets give the same for every image."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if norms:
        from .inputs import image_inputs, image_out

        kept = [m.momentum for m in norms]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None
            m.train()
        with torch.no_grad():
            try:
                for i in range(2):
                    image_out(spec, model, image_inputs(spec, batch=8, seed=70 + i))
            except Exception as e:
                print("calibrate:", spec.name, e)
        for m, momentum in zip(norms, kept, strict=False):
            m.momentum = momentum
            m.eval()
    return model


def clipcfg(config, text=None, vision=None, **kw):
    return config(text_config={**TX, **(text or {})}, vision_config={**V, **(vision or {})}, **kw)
