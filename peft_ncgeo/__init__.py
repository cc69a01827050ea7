"""Geometry-aware, parameter-efficient fine-tuning of CLIP and ViT, as PEFT methods."""

from .registration import register
from .tuners.npt import NPTConfig

register()

__all__ = ["NPTConfig"]
