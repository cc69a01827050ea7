"""Processors of models: the part that takes images, and where to look for one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoImageProcessor, AutoProcessor

from ..models.base_model import base_name, base_revision
from ..models.towers import reads_text


def image_processor(processor: Any) -> Any:
    """The part of a CLIP's processor that takes images; an image processor is that itself."""
    return getattr(processor, "image_processor", processor)


def find_processor(
    model: nn.Module, *places: str | Path | None, images_only: bool = False, token: str | None = None
) -> Any:
    """Return the processor in the first of these places that has one, else where the model came from; or None.

    One that needs code of its own counts as none: nothing here runs what a repository brings.

    Args:
        model: its adapters may name the revision of what it came from.
        places: folders or repositories.
        images_only: an image processor is enough, though the model reads text too.
        token: for private repositories.
    """
    kind: Any = AutoProcessor if reads_text(model) and not images_only else AutoImageProcessor
    found = [(place, "main") for place in places] + [(base_name(model), base_revision(model) or "main")]
    for place, revision in found:
        with suppress(OSError, ValueError):
            if place:
                return kind.from_pretrained(place, revision=revision, token=token, trust_remote_code=False)
    return None


def input_size(image_processor: Any) -> tuple[int, int]:
    """(width, height) of the pixels that an image processor makes."""
    for field in ("crop_size", "size"):
        size = getattr(image_processor, field, None) or {}
        if "height" in size and "width" in size:
            return size["width"], size["height"]
        if "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
    raise ValueError(f"{type(image_processor).__name__} does not say which size of images it makes.")
