"""Data sets: class prompts, base/new and few-shot splits, and the demo's own images."""

from .class_prompts import class_prompts
from .demo import load_demo
from .splits import base_new_split, few_shot

__all__ = ["base_new_split", "class_prompts", "few_shot", "load_demo"]
