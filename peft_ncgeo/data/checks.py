"""Checks of labelled image sets before training starts."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset

from ..validation import short_repr
from .class_prompts import list_names
from .white_level import column_white_level


def class_names(dataset: Dataset, label_column: str = "label") -> list[str]:
    """Return the names of the set's `ClassLabel` column.

    Raises:
        TypeError, ValueError: the column is missing or not a `ClassLabel`; the message says what to do.
    """
    if not isinstance(dataset, Dataset):
        advice = "; pass one of its splits" if isinstance(dataset, DatasetDict) else ""
        advice = "; load it without streaming=True" if isinstance(dataset, IterableDataset) else advice
        raise TypeError(f"Expected a datasets.Dataset, got {type(dataset).__name__}{advice}.")
    if label_column not in dataset.column_names:
        columns = f"{short_repr(label_column)} among {short_repr(dataset.column_names)}"
        raise ValueError(
            f"No label column {columns}; name it in label_column (without labels only a classifier can predict)."
        )
    feature = dataset.features[label_column]
    if not isinstance(feature, ClassLabel):
        raise ValueError(f"Column {label_column!r} is not a ClassLabel but {_kind_and_advice(feature, label_column)}.")
    if not feature.names:
        raise ValueError(f"Column {label_column!r} names no classes; give its ClassLabel the names.")
    return list_names(feature.names)


def _kind_and_advice(feature: Any, label_column: str) -> str:
    """Describe a label column that is not a `ClassLabel`, and how to convert it."""
    if isinstance(feature, list) or hasattr(feature, "feature"):  # `datasets` has had several types of lists
        return "a list, so this is a multi-label set; only one label for each image can be learned"
    kind = getattr(feature, "dtype", type(feature).__name__)
    if kind in ("string", "large_string"):
        return f'{kind}; convert it with dataset.class_encode_column("{label_column}")'
    return (
        f"{kind}; name the classes, in the order of the numbers 0, 1, ...: "
        f'dataset.cast_column("{label_column}", datasets.ClassLabel(names=[...]))'
    )


def leave_out_unlabelled(label_column: str) -> str:
    """Return advice to remove samples without a label, for an error message."""
    return f'leave them out: dataset.filter(lambda y: y is not None and y >= 0, input_columns="{label_column}")'


def check_dataset(
    dataset: Dataset,
    image_column: str = "image",
    label_column: str = "label",
    every_class: bool = True,
) -> list[str]:
    """Check a labelled image set and return its class names.

    Args:
        dataset: a `datasets.Dataset`.
        every_class: True if each class must have a sample, as in training.

    Raises:
        TypeError, ValueError: a column is missing or of another type, the set is empty, there are fewer than two
            classes, a label is outside the names, a class has no samples, or grey images have an unknown white level.
    """
    names = class_names(dataset, label_column)
    if image_column not in dataset.column_names:
        columns = f"{short_repr(image_column)} among {short_repr(dataset.column_names)}"
        raise ValueError(f"No image column {columns}; name it in image_column.")
    feature = dataset.features[image_column]
    closed = isinstance(feature, Image) and not feature.decode and dataset.format["type"] != "custom"
    if closed or not isinstance(feature, Image):
        kind = "holds files that are not decoded" if closed else "is not of type datasets.Image"
        raise ValueError(
            f'Column {image_column!r} {kind}; convert it with dataset.cast_column("{image_column}", datasets.Image()).'
        )
    if len(dataset) == 0:
        raise ValueError("The data set is empty; pass one with samples.")
    if len(names) < 2:
        raise ValueError(f"Column {label_column!r} has {len(names)} class; classification needs at least two.")
    labels = np.asarray(dataset.with_format(None)[label_column][:], dtype=object)
    outside = [i for i, label in enumerate(labels) if label is None or not 0 <= label < len(names)]
    if outside:
        label = labels[outside[0]]
        missing = label is None or label < 0
        advice = (
            leave_out_unlabelled(label_column) if missing else "give the ClassLabel all names, the first one for 0"
        )
        raise ValueError(
            f"Sample {outside[0]} has label {label}, outside the {len(names)} class names ({len(outside)} such "
            f"samples); {advice}."
        )
    counts = np.bincount(labels.astype(np.int64), minlength=len(names))
    if every_class and (counts == 0).any():
        absent = [names[i] for i in np.flatnonzero(counts == 0)]
        raise ValueError(
            f"Class {short_repr(absent[0])} has no samples ({len(absent)} such classes); leave it out of the "
            "ClassLabel."
        )
    column_white_level(dataset, image_column)  # refuses before training, not in the middle of it
    return names
