"""Test views of an image: crops of its corners and its centre, whose logits are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from ..models.image_encoder import image_inputs
from ..validation import check_int
from .processors import input_size

_WIDER = 248 / 224  # of the resized image to a crop, as in LIFT


def check_num_test_views(value: Any) -> int:
    """Return the number of test views of an image, 1 or 5.

    Raises:
        TypeError, ValueError: the number is neither 1 nor 5.
    """
    if check_int("num_test_views", value) not in (1, 5):
        raise ValueError(f"num_test_views={value!r} must be 1 (the image itself) or 5 (its corners and its centre).")
    return int(value)


def check_crops(image_processor: Any) -> None:
    """Raise a ValueError for an image processor whose own resize and crop cannot be left out."""
    input_size(image_processor)
    if not hasattr(image_processor, "do_resize"):
        raise ValueError(
            f"{type(image_processor).__name__} always resizes its images, so it would resize the crops again; set "
            "num_test_views=1."
        )


def five_crops(image: Image.Image, size: tuple[int, int]) -> list[Image.Image]:
    """Resize an RGB image and return crops of its four corners and its centre, each of (width, height) `size`.

    The resized image is the smallest one whose sides are at least 248 / 224 of the crop's; its aspect ratio is kept.
    """
    width, height = size
    wide, high = round(width * _WIDER), round(height * _WIDER)
    if wide * image.height < high * image.width:
        wide = high * image.width // image.height
    else:
        high = wide * image.height // image.width
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    right, bottom = wide - width, high - height
    corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), (round(right / 2), round(bottom / 2))]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners]


def crop_inputs(image_processor: Any, crops: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
    """Return the inputs of an image tower for N images of V crops each: `pixel_values` (N, V, C, H, W)."""
    cut = {name: False for name in ("do_resize", "do_center_crop") if hasattr(image_processor, name)}
    flat = [crop for of_image in crops for crop in of_image]
    inputs = image_inputs(image_processor(images=flat, return_tensors="pt", **cut))
    return {name: value.unflatten(0, (len(crops), -1)) for name, value in inputs.items()}


def split_views(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the inputs (N, ...) of each view of [`crop_inputs`], or those of the only view of plain images."""
    if inputs["pixel_values"].dim() < 5:
        return [dict(inputs)]
    views = zip(*(value.unbind(1) for value in inputs.values()), strict=True)
    return [dict(zip(inputs, view, strict=True)) for view in views]


def view_inputs(image_processor: Any, images: Sequence[Image.Image], num_test_views: int) -> list[dict[str, Tensor]]:
    """Return the inputs (N, ...) of each test view of RGB images.

    Raises:
        TypeError, ValueError: the number of views is neither 1 nor 5, or the processor cannot process crops as they
            are.
    """
    if check_num_test_views(num_test_views) == 1:
        return [image_inputs(image_processor(images=list(images), return_tensors="pt"))]
    check_crops(image_processor)
    size = input_size(image_processor)
    return split_views(crop_inputs(image_processor, [five_crops(image, size) for image in images]))
