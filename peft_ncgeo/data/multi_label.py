"""Columns that hold any number of labels for each image: lists of classes, or rows of 0 and 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from ..validation import one_line, short_repr
from .checks import check_images, check_number
from .class_prompts import list_names
from .white_level import column_white_level


def list_parts(feature: Any) -> tuple[Any, int] | None:
    """Return the feature of a list's elements and its fixed length (-1 for any length); None if it is not a list.

    All list types of old and new versions of `datasets` are known.
    """
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0], -1
    inner = getattr(feature, "feature", None)
    return None if inner is None else (inner, int(getattr(feature, "length", -1)))


def is_multi_label(dataset: Any, label_column: str) -> bool:
    """Return True if the label column holds a list for each image."""
    known = isinstance(dataset, Dataset) and label_column in dataset.column_names
    return known and list_parts(dataset.features[label_column]) is not None


class MultiHotReader:
    """Reader of the cells of a multi-label column as rows (K,) of 0 and 1.

    Args:
        dataset: a set whose column is a list of `ClassLabel`, or of K numbers 0 and 1.

    Raises:
        ValueError: the column is another list; the message says how to convert it.
    """

    def __init__(self, dataset: Dataset, label_column: str) -> None:
        element, length = list_parts(dataset.features[label_column]) or (None, -1)
        self.lists_classes = isinstance(element, ClassLabel)
        self.label_column = label_column
        if isinstance(element, ClassLabel) and element.names:
            self.classes = len(element.names)
        elif isinstance(element, Value) and _is_number(element.dtype) and length > 0:
            self.classes = length
        else:
            kind = getattr(element, "dtype", type(element).__name__)
            raise ValueError(
                f"Column {label_column!r} is a list of {kind} whose classes "
                f'are not known; convert lists of names or numbers with dataset.cast_column("{label_column}", '
                f"datasets.Sequence(datasets.ClassLabel(names=[...]))), and rows of K numbers 0 and 1 with "
                f'dataset.cast_column("{label_column}", datasets.Sequence(datasets.Value("int64"), length=K)).'
            )

    def __call__(self, cell: Any) -> np.ndarray:
        """Return the row (K,) int8 of a cell.

        Raises:
            ValueError: it is not a list, names a class outside 0..K-1, or holds other numbers than 0 and 1.
        """
        if cell is None:
            raise ValueError("it has no list of labels; give an empty list to an image with none of the classes")
        try:
            found = np.asarray(cell, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"its labels are {short_repr(cell)}: {one_line(error)}") from error
        if not self.lists_classes:
            if found.shape != (self.classes,) or not np.isin(found, (0, 1)).all():
                raise ValueError(f"its labels are {short_repr(cell)}, not {self.classes} numbers 0 or 1")
            return found.astype(np.int8)
        row = np.zeros(self.classes, dtype=np.int8)
        if not ((found >= 0) & (found < self.classes)).all():
            raise ValueError(f"its labels are {short_repr(cell)}, not all among the {self.classes} class names")
        row[found.astype(np.int64)] = 1
        return row


def _is_number(dtype: str) -> bool:
    return dtype == "bool" or dtype.startswith(("int", "uint", "float"))


def multi_hot(dataset: Dataset, label_column: str = "label") -> np.ndarray:
    """Return the labels of every image as rows of 0 and 1: (N, K) int8.

    Raises:
        ValueError: the column does not hold such lists, or a cell is not such a list; the message names the sample.
    """
    read, cells = MultiHotReader(dataset, label_column), dataset.with_format(None)[label_column][:]
    rows = np.zeros((len(cells), read.classes), dtype=np.int8)
    for i, cell in enumerate(cells):
        try:
            rows[i] = read(cell)
        except ValueError as error:
            raise ValueError(f"Sample {i} of column {label_column!r}: {error}.") from error
    return rows


def multi_label_names(dataset: Dataset, label_column: str, given: Sequence[str] | None) -> list[str]:
    """Return the K class names of a multi-label column.

    Args:
        given: names of the K columns of rows of 0 and 1, which have no names of their own.

    Raises:
        ValueError: names are missing, or differ from the column's own.
    """
    read, feature = MultiHotReader(dataset, label_column), list_parts(dataset.features[label_column])
    own = list_names(feature[0].names) if feature and read.lists_classes else None
    if own is None and given is None:
        raise ValueError(
            f"Column {label_column!r} holds rows of {read.classes} numbers 0 and 1 without names; pass class_names "
            "beside the training set, or convert the column to lists of ClassLabel."
        )
    names = own if given is None else list_names(given)
    if own not in (None, names) or len(names or ()) != read.classes:
        meant = f"those of column {label_column!r}, {short_repr(own)}" if own else f"{read.classes} names"
        raise ValueError(f"class_names={short_repr(names)} are not {meant}; give one name for each, in their order.")
    return names or []


def check_multi_label_set(
    dataset: Dataset,
    image_column: str,
    label_column: str,
    given: Sequence[str] | None = None,
    every_class: bool = True,
) -> list[str]:
    """Check a set of images with any number of labels each, and return its class names.

    Args:
        given: see [`multi_label_names`].
        every_class: True if each class must be in some images and not in others, as in training.

    Raises:
        TypeError, ValueError: a column is missing or of another type, the set is empty, there are fewer than two
            classes, a label is outside the names, a class is in no image or in every image (if `every_class`), or grey
            images have an unknown white level.
    """
    names = multi_label_names(dataset, label_column, given)
    check_images(dataset, image_column)
    check_number(names, label_column)
    counts = multi_hot(dataset, label_column).sum(0, dtype=np.int64)
    for name, count in zip(names, counts.tolist(), strict=True) if every_class else ():
        if count in (0, len(dataset)):
            kind = "no image" if count == 0 else "every image"
            raise ValueError(
                f"Class {short_repr(name)} is in {kind} of the training set, so it cannot be learned; leave it out "
                "of the names and the labels."
            )
    column_white_level(dataset, image_column)
    return names
