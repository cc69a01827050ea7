"""Processors of models: search, image part, and input size."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoImageProcessor, AutoProcessor

from ..models.base_model import base_name, base_revision
from ..models.towers import reads_text


def image_processor(processor: Any) -> Any:
    """Return the image part of a processor; return an image processor itself."""
    return getattr(processor, "image_processor", processor)


def find_processor(
    model: nn.Module,
    *places: str | Path | None,
    images_only: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> Any:
    """Return the processor from the first of these places that has one, else the base model's, or None.

    Processors that need remote code are skipped: code from a repository is never run.

    Args:
        model: the model; its adapters may name the revision of the base model.
        places: folders or Hub repositories, in the order of the search.
        images_only: True if an image processor is enough, even for a model that reads text.
        token: Hub token for private repositories.
        revision: revision of the base model. Default: the one that its adapters name, else "main".
    """
    kind: Any = AutoProcessor if reads_text(model) and not images_only else AutoImageProcessor
    found = [(place, "main") for place in places]
    for place, at in [*found, (base_name(model), revision or base_revision(model) or "main")]:
        with suppress(OSError, ValueError):
            if place:
                return kind.from_pretrained(place, revision=at, token=token, trust_remote_code=False)
    return None


def makes_same_pixels(one: Any, other: Any) -> bool:
    """Return True if two image processors are known to make the same pixels of an image."""
    if one is other:
        return True
    if not (hasattr(one, "to_dict") and hasattr(other, "to_dict")):
        return False
    return _settings(one) == _settings(other)


def _settings(image_processor: Any) -> dict[str, Any]:
    beside = ("processor_class", "_commit_hash", "name_or_path")
    return {"class": type(image_processor)} | {
        name: value for name, value in image_processor.to_dict().items() if name not in beside and value is not None
    }


def input_size(image_processor: Any) -> tuple[int, int]:
    """Return the (width, height) in pixels of the images that an image processor makes.

    Raises:
        ValueError: the processor does not say which size they have.
    """
    if isinstance(timm := getattr(image_processor, "data_config", None), dict):  # timm's, in Transformers' wrapper
        _, height, width = timm["input_size"]
        return width, height
    crops = getattr(image_processor, "do_center_crop", True)  # without it, crop_size may be a default without use
    for field in ("crop_size", "size") if crops else ("size",):
        size = getattr(image_processor, field, None) or {}
        if "height" in size and "width" in size:
            return size["width"], size["height"]
        if "shortest_edge" in size:
            return size["shortest_edge"], size["shortest_edge"]
    raise ValueError(
        f"{type(image_processor).__name__} does not say which size of images it makes, so they cannot be cropped to "
        "it; set augmentation='none' and num_test_views=1 (in adapt: num_views=0)."
    )
