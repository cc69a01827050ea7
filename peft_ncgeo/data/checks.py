"""Checks of labelled image sets before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset

from ..validation import short_repr
from .class_prompts import list_names
from .white_level import column_white_level


def class_names(dataset: Dataset, label_column: str = "label", reader: str = "") -> list[str]:
    """Return the names of the set's `ClassLabel` column.

    Args:
        reader: name of the function that reads one label per image, for the error message.

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
            f"No label column {columns}; name it in label_column. Images without labels can be classified; "
            "GeometryTrainer can train on them if no loss reads labels and you pass class_names."
        )
    feature = dataset.features[label_column]
    if not isinstance(feature, ClassLabel):
        kind = _kind_and_advice(feature, label_column, reader)
        raise ValueError(f"Column {label_column!r} is not a ClassLabel but {kind}.")
    if not feature.names:
        raise ValueError(f"Column {label_column!r} has no class names; give names to its ClassLabel.")
    return list_names(feature.names)


def _kind_and_advice(feature: Any, label_column: str, reader: str) -> str:
    """Describe a label column that is not a `ClassLabel`, and how to convert it."""
    if isinstance(feature, list) or hasattr(feature, "feature"):  # `datasets` has had several types of lists
        return (
            f"a list, so this is a multi-label set, but {reader or 'this'} reads one label per image; GeometryTrainer "
            "trains on lists with classification_loss=MultiLabelLoss()"
        )
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
    reader: str = "",
) -> list[str]:
    """Check a labelled image set and return its class names.

    Args:
        dataset: a `datasets.Dataset`.
        every_class: True if each class must have a sample, as in training.
        reader: name of a loss that reads the labels, for the error message.

    Raises:
        TypeError, ValueError: a column is missing or of another type, the set is empty, there are fewer than two
            classes, a label is outside the names, a class has no samples, or grey images have an unknown white level.
    """
    names = class_names(dataset, label_column, reader)
    check_images(dataset, image_column)
    check_number(names, label_column)
    labels = _labels(dataset, label_column)
    outside = [i for i, label in enumerate(labels) if label is None or not 0 <= label < len(names)]
    if outside:
        label = labels[outside[0]]
        missing = label is None or label < 0
        advice = (
            leave_out_unlabelled(label_column) if missing else "give the ClassLabel the names of all labels, from 0 on"
        )
        read = f", and {reader} reads labels" if missing and reader else ""
        raise ValueError(
            f"Sample {outside[0]} has label {label}, outside the {len(names)} class names ({len(outside)} such "
            f"samples){read}; {advice}."
        )
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=len(names))
    if every_class and (counts == 0).any():
        absent = [names[i] for i in np.flatnonzero(counts == 0)]
        raise ValueError(
            f"Class {short_repr(absent[0])} has no samples ({len(absent)} such classes); leave it out of the "
            "ClassLabel."
        )
    column_white_level(dataset, image_column)  # refuses before training, not in the middle of it
    return names


def check_training_set(
    dataset: Dataset, image_column: str, label_column: str, given: Sequence[str] | None, reader: str
) -> tuple[list[str], bool]:
    """Check a training set; return its class names, and True if all its images have labels.

    A label is missing if it is None or -1, or if there is no label column.

    Args:
        given: class names for a set without a `ClassLabel` column.
        reader: name of the loss that reads labels; empty: no loss does, so labels may be missing.

    Raises:
        TypeError, ValueError: as in [`check_dataset`]; labels are missing but are read; or `given` differs from the
            set's own names.
    """
    labels = _labels(dataset, label_column)
    missing = sum(label is None or label == -1 for label in labels)
    is_named = given is None or isinstance(dataset.features.get(label_column), ClassLabel) or missing < len(labels)
    names = class_names(dataset, label_column) if given is None or is_named else list_names(given)
    if given is not None and list_names(given) != names:
        raise ValueError(
            f"class_names={short_repr(list(given))} are not those of column {label_column!r}, {short_repr(names)}; "
            "leave them out."
        )
    if not is_named and reader:
        raise ValueError(
            f"{reader} reads labels, which column {label_column!r} does not hold; name another in label_column, or "
            "leave out the losses that read them (classification_loss=None)."
        )
    if reader or not missing:
        return check_dataset(dataset, image_column, label_column, reader=reader), True
    check_images(dataset, image_column)
    check_number(names, label_column)
    outside = [i for i, label in enumerate(labels) if label is not None and not -1 <= label < len(names)]
    if outside:
        raise ValueError(
            f"Sample {outside[0]} has label {labels[outside[0]]}, but labels must be 0 to {len(names) - 1}, or -1 for "
            f"an unknown class ({len(outside)} such samples); leave them out, or give the ClassLabel all names."
        )
    column_white_level(dataset, image_column)
    return names, False


def _labels(dataset: Any, label_column: str) -> list[Any]:
    """Return the labels as they are stored, and None for each image where there is no such column."""
    if not isinstance(dataset, Dataset) or label_column not in dataset.column_names:
        return [None] * len(dataset) if isinstance(dataset, Dataset) else []
    return list(dataset.with_format(None)[label_column][:])


def check_number(names: Sequence[str], label_column: str) -> None:
    """Raise an error if a column has fewer than two classes."""
    if len(names) < 2:
        raise ValueError(f"Column {label_column!r} has {len(names)} class; classification needs at least two.")


def check_images(dataset: Dataset, image_column: str) -> None:
    """Raise an error if a set has no images, or if its image column is missing or of another type."""
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
