"""Data sets: class prompts, base/new and few-shot splits, and the demo's own images."""

from .class_prompts import class_prompts

__all__ = ["class_prompts"]
