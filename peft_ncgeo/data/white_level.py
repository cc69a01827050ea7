"""White level of grey images of integers, 255 or 65535, found from one image or a whole column."""

from __future__ import annotations

from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from datasets import Dataset, Image
from tqdm.auto import tqdm

_known: WeakKeyDictionary[Dataset, dict[str, int | None]] = WeakKeyDictionary()
_filling = Lock()


def lacks_white_level(image: Any) -> bool:
    """Return True for an image in one of Pillow's modes of 16 or 32 bits, which do not define a white level."""
    return getattr(image, "mode", "")[:1] in ("I", "F")


def white_level(numbers: np.ndarray, column: str | None = None) -> int:
    """Return the number that is white, 255 or 65535, if the largest number of an image or a column shows it.

    The largest number shows it if it needs all of 8 bits (128 to 255) or all of 16 bits (32768 to 65535). With other
    largest numbers, white may be anything, such as 16, 100, 4095 or 65535. (An image of 16 bits may also have no
    number above 255, but such an image is almost black.) If all numbers are 0, any white level is right.

    Args:
        column: column of the numbers, for the error message. None: the numbers belong to one image.

    Raises:
        ValueError: the white level is not known, or there are negative or floating-point numbers.
    """
    low, high, whole = numbers.min(), numbers.max(), numbers.dtype.kind in "ui"
    for white in (255, 65535):
        if whole and low >= 0 and (high == 0 or white // 2 < high <= white):
            return white
    what = "An image" if column is None else f"Column {column!r}"
    image = "image" if column is None else f'row["{column}"]'
    advice = f"PIL.Image.fromarray(numpy.uint8(numpy.interp({image}, (BLACK, WHITE), (0, 255))))"
    advice = advice if column is None else f'dataset.map(lambda row: {{"{column}": {advice}}})'
    raise ValueError(
        f"{what} holds {'whole' if whole else 'floating-point'} numbers from {low:.10g} to {high:.10g}, but the "
        "white level is known only for whole numbers whose largest is 128 to 255 (8 bits) or 32768 to 65535 (16 "
        f"bits); say which numbers are BLACK and WHITE, such as 0 and 4095: {advice}."
    )


def column_white_level(dataset: Dataset, column: str) -> int | None:
    """Return the [`white_level`] of a column from all of its images, if the first image [`lacks_white_level`].

    The images are read once for each data set.

    Returns:
        The white level; None for other columns and for images that a transform makes: then each image's own numbers
        decide.

    Raises:
        ValueError: as in [`white_level`].
    """
    feature = dataset.features.get(column)
    if dataset.format["type"] == "custom" or not (isinstance(feature, Image) and feature.decode):
        return None
    with _filling:
        known = _known.setdefault(dataset, {})
        if column not in known:
            known[column] = _read_white(dataset.with_format(None).select_columns([column]), column, feature)
        return known[column]


def _read_white(images: Dataset, column: str, feature: Image) -> int | None:
    files = images.cast_column(column, Image(decode=False))
    ends: list[np.ndarray] = []
    for file in tqdm(files, desc=f"Reading the range of {column!r}", leave=False, delay=2):
        try:
            image = feature.decode_example(file[column])
            if lacks_white_level(image):
                numbers = np.asarray(image)
                ends.append(np.array([numbers.min(), numbers.max()]))
        except Exception:  # each decoder raises other errors; a later read of the image reports them
            continue
        if not ends or image.mode == "F":
            break
    return white_level(np.concatenate(ends), column) if ends else None
