"""Geometry-aware, parameter-efficient fine-tuning of CLIP and ViT, as PEFT methods.

Importing the package registers its methods with PEFT; training and evaluation are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register
from .tuners.adaptformer import AdaptFormerConfig
from .tuners.copa import CoPAConfig
from .tuners.npt import NPTConfig
from .tuners.prototype import PrototypeConfig

if TYPE_CHECKING:
    from .classifiers.image_classifier import ImageClassifier
    from .evaluation import FewShotClassifier, TrainedClassifier, ZeroShotClassifier
    from .training import GeometryTrainer, GeometryTrainingArguments, adapt

register()

__version__ = "0.2.0"
__all__ = [
    "AdaptFormerConfig",
    "CoPAConfig",
    "FewShotClassifier",
    "GeometryTrainer",
    "GeometryTrainingArguments",
    "ImageClassifier",
    "NPTConfig",
    "PrototypeConfig",
    "TrainedClassifier",
    "ZeroShotClassifier",
    "adapt",
]

_LAZY = {
    "FewShotClassifier": ".evaluation",
    "GeometryTrainer": ".training",
    "GeometryTrainingArguments": ".training",
    "ImageClassifier": ".classifiers.image_classifier",
    "TrainedClassifier": ".evaluation",
    "ZeroShotClassifier": ".evaluation",
    "adapt": ".training",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
