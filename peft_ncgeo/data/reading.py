"""Reading of images (files, PIL images or arrays) as RGB."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..validation import one_line, short_repr
from .images import to_rgb

KINDS = "paths, PIL images or uint8 arrays (H, W, 3) or (H, W)"


def read_image(given: Any, white: int | None = None) -> Image.Image:
    """Return an image in RGB, turned upright by its EXIF data.

    Args:
        given: path of a file, which is opened and closed; PIL image; or uint8 array, (H, W, 3) for red, green and
            blue, or (H, W) for grey.
        white: see [`~peft_ncgeo.data.images.to_rgb`].

    Raises:
        TypeError: the input is of another kind.
        ValueError: the file does not exist, holds no image or a damaged one, or an array is of another type or shape.
    """
    if isinstance(given, np.ndarray):
        return to_rgb(_from_array(given))
    if not isinstance(given, str | os.PathLike):
        if not isinstance(given, Image.Image):
            raise TypeError(f"images must be {KINDS}, got {type(given).__name__}.")
        return to_rgb(given, white)
    try:
        opened = Image.open(given)
    except FileNotFoundError:
        raise ValueError("There is no such file; check the path and the working folder.") from None
    except IsADirectoryError:
        raise ValueError("This is a folder, not a file; pass folders to predict_dataset.") from None
    except Exception as error:
        raise unreadable(error) from error
    with opened:
        return to_rgb(opened, white)


def unreadable(error: Exception) -> ValueError:
    """Return the error for a file that Pillow cannot open; each of Pillow's formats raises errors of its own."""
    if isinstance(error, UnidentifiedImageError):
        return ValueError("An image cannot be read; its file is empty, damaged or of an unknown kind.")
    return ValueError(f"An image cannot be read; its file may be damaged: {one_line(error)}")


def _from_array(given: np.ndarray) -> Image.Image:
    if given.dtype != np.uint8 or given.shape[2:] not in ((), (3,)) or given.ndim < 2 or not given.size:
        raise ValueError(
            f"An array must be uint8 of shape (H, W, 3) or (H, W), 0 black and 255 white, got {given.dtype} of shape "
            f"{given.shape}; convert it, or pass a PIL image."
        )
    return Image.fromarray(np.ascontiguousarray(given))


def is_one_image(given: Any) -> bool:
    """Return True for one image, or for an object that cannot be iterated over; False for several images."""
    if isinstance(given, np.ndarray):
        return given.ndim < 4 and given.dtype.kind not in "OU"  # arrays of paths and of images hold several
    return not isinstance(given, Iterable) or isinstance(given, str | bytes | os.PathLike | Mapping | Image.Image)


def list_images(images: Any, kinds: str = KINDS) -> list[Any]:
    """Return one or several images as a list, without opening any.

    Args:
        kinds: kinds of images that the caller takes, for the error message.

    Raises:
        TypeError: an image is of a kind that [`read_image`] does not take.
    """
    images = [images] if is_one_image(images) else list(images)
    for image in images:
        if not isinstance(image, Image.Image | np.ndarray | str | os.PathLike):
            raise TypeError(f"images must be {kinds}, got {type(image).__name__}.")
    return images


def rgb_images(images: Sequence[Any], first: int = 0) -> list[Image.Image]:
    """Apply [`read_image`] to each image; errors name the image by its number, counted from `first`, and its path."""
    found = []
    for i, image in enumerate(images, first):
        try:
            found.append(read_image(image))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{image_name(i, image)}: {error}") from error
    return found


def image_name(number: int, given: Any) -> str:
    """Return the name of an image in an error message: its number, and its path if it has one."""
    is_path = isinstance(given, str | os.PathLike)
    return f"Image {number} ({short_repr(os.fspath(given))})" if is_path else f"Image {number}"
