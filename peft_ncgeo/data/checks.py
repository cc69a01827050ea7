"""What a labelled image set must be, said before training starts."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, Image

from ..values import shown
from .class_prompts import list_names
from .white import find_column_white


def class_names(dataset: Dataset, label_column: str = "label") -> list[str]:
    """The names of the set's `ClassLabel` column.

    Raises:
        TypeError, ValueError: one line that names the column and the mend.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"Expected a datasets.Dataset, got {type(dataset).__name__}.")
    if label_column not in dataset.column_names:
        columns = f"{shown(label_column)} among {shown(dataset.column_names)}"
        raise ValueError(f"No label column {columns}; name it in label_column.")
    feature = dataset.features[label_column]
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"Column {label_column!r} is not a ClassLabel but {type(feature).__name__}; "
            f'convert it with dataset.class_encode_column("{label_column}").'
        )
    if not feature.names:
        raise ValueError(f"Column {label_column!r} names no classes; give its ClassLabel the names.")
    return list_names(feature.names)


def check_dataset(
    dataset: Dataset,
    image_column: str = "image",
    label_column: str = "label",
    every_class: bool = True,
) -> list[str]:
    """Check a labelled image set and return its class names.

    Args:
        dataset: a `datasets.Dataset`.
        every_class: each class must have a sample, as in training.

    Raises:
        TypeError, ValueError: one line that names what is wrong: a column missing or of another type, an empty set,
            fewer than two classes, a label outside the names, a class without samples, grey images of numbers that do
            not tell what is white.
    """
    names = class_names(dataset, label_column)
    if image_column not in dataset.column_names:
        columns = f"{shown(image_column)} among {shown(dataset.column_names)}"
        raise ValueError(f"No image column {columns}; name it in image_column.")
    if not isinstance(dataset.features[image_column], Image):
        raise ValueError(
            f"Column {image_column!r} is not of type datasets.Image; convert it with "
            f'dataset.cast_column("{image_column}", datasets.Image()).'
        )
    if len(dataset) == 0:
        raise ValueError("The data set is empty.")
    if len(names) < 2:
        raise ValueError(f"Column {label_column!r} has {len(names)} class; classification needs at least two.")
    labels = np.asarray(dataset.with_format(None)[label_column][:], dtype=object)
    missing = [i for i, label in enumerate(labels) if label is None or not 0 <= label < len(names)]
    if missing:
        raise ValueError(
            f"Sample {missing[0]} has label {labels[missing[0]]}, outside the {len(names)} class names "
            f"({len(missing)} such samples); remove unlabelled samples."
        )
    counts = np.bincount(labels.astype(np.int64), minlength=len(names))
    if every_class and (counts == 0).any():
        absent = [names[i] for i in np.flatnonzero(counts == 0)]
        raise ValueError(
            f"Class {shown(absent[0])} has no samples ({len(absent)} such classes); leave it out of the ClassLabel."
        )
    find_column_white(dataset, image_column)  # before training, not in its middle
    return names
