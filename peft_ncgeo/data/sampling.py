"""Random draws of samples per class that depend on the seed and the content of rows, not on their order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Image

from ..validation import one_line, short_repr
from .checks import class_names


def draw(dataset: Dataset, counts: Sequence[int], seed: int, label_column: str, advice: str) -> Dataset:
    """Draw `counts[c]` samples of every class c, without replacement; sort them by (class, content).

    The rows of a class are ranked by [`content_order`] and permuted by a generator seeded with (seed, c); the first
    `counts[c]` are taken. So a larger count includes the samples of a smaller one, and one class's count does not
    change the samples of other classes. Rows without a label (None or -1) are never drawn.

    Args:
        counts: K numbers of samples.
        advice: end of the error message for a class with too few samples.

    Raises:
        ValueError: a class has fewer samples than asked for; the message gives its name.
    """
    names, labels = class_names(dataset, label_column), label_array(dataset, label_column)
    available = np.bincount(labels[labels >= 0], minlength=len(names))
    for name, size, count in zip(names, available, counts, strict=True):
        if size < count:
            raise ValueError(
                f"Class {short_repr(name)} has {size} samples, fewer than the {count} asked for; {advice}."
            )
    order = content_order(dataset)
    chosen: list[int] = []
    for c, (ranked, count) in enumerate(zip(rows_of_classes(labels, len(names), order), counts, strict=True)):
        first = np.random.default_rng((seed, c)).permutation(len(ranked))[:count]
        chosen += ranked[np.sort(first)].tolist()
    return dataset.select(chosen)


def rows_of_classes(labels: np.ndarray, num_classes: int, order: np.ndarray | None = None) -> list[np.ndarray]:
    """Return the rows of each class, in ascending order or in the order of `order`; skip labels of -1."""
    order = np.arange(len(labels), dtype=np.int64) if order is None else order
    order = order[labels[order] >= 0]
    # one sort, since a comparison of all labels with each class would be slow for a thousand classes
    order = order[np.argsort(labels[order], kind="stable")]
    return np.split(order, np.cumsum(np.bincount(labels[order], minlength=num_classes))[:-1])


def content_order(dataset: Dataset) -> np.ndarray:
    """Return indices (N,) that sort the rows by content, independent of their order in the data set.

    Image columns come first, by a hash of their encoded bytes, from the row or from its file: a copy, for example on
    the Hub, keeps the bytes, but not the paths. The other columns, by a hash of the `repr` of their values, decide
    between rows with equal images or without images. All images are read, but none is decoded: hashing takes about two
    seconds per gigabyte.

    Raises:
        ValueError: a file cannot be read; the message gives its path.
    """
    images = sorted(c for c, feature in dataset.features.items() if isinstance(feature, Image))
    keys = [[_digest(content) for content in encoded_images(dataset, column)] for column in images]
    if len(set(zip(*keys, strict=True))) < len(dataset):
        others = sorted(c for c in dataset.column_names if c not in images)
        keys += [[_digest(repr(value).encode()) for value in stored_values(dataset, c)] for c in others]
    return _argsort(list(zip(*keys, strict=True)))


def label_array(dataset: Dataset, label_column: str = "label") -> np.ndarray:
    """Return labels (N,) as int64, with -1 for rows without a label.

    Raises:
        ValueError: a label is outside the class names.
    """
    count, labels = len(class_names(dataset, label_column)), dataset.with_format(None)[label_column][:]
    found = np.array([-1 if label is None else label for label in labels], dtype=np.int64)
    outside = np.flatnonzero((found < -1) | (found >= count))
    if len(outside):
        raise ValueError(
            f"Sample {outside[0]} has label {found[outside[0]]}, outside the {count} class names ({len(outside)} such "
            "samples); give the ClassLabel the names of all labels, from 0 on, or remove these samples."
        )
    return found


def stored_values(dataset: Dataset, column: str) -> Iterator[Any]:
    """Yield the stored values of a column, without formats, transforms and decoding."""
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=100):
        yield from table[column].to_pylist()


def encoded_images(dataset: Dataset, column: str) -> Iterator[bytes]:
    """Yield the encoded bytes of an image column, from the data set or, if it has only paths, from the files."""
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=100):
        for cells in table[column].chunks:
            for i, cell in enumerate(cells.to_pylist()):
                content, path = (cell or {}).get("bytes"), (cell or {}).get("path")
                if content is None and path is not None:
                    try:
                        content = Image().embed_storage(cells[i : i + 1])[0].as_py()["bytes"]
                    except OSError as error:
                        raise ValueError(
                            f"Column {column!r}: cannot read {short_repr(path)}: {one_line(error)}"
                        ) from error
                yield content or b""


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _argsort(keys: list[Any]) -> np.ndarray:
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
