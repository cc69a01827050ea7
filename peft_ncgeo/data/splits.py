"""Splits of data sets: base and new classes, and few shots per class."""

from __future__ import annotations

import math
from collections.abc import Sequence

from datasets import ClassLabel, Dataset, DatasetDict

from ..validation import check_int
from .checks import class_names
from .sampling import draw, label_array


def select_classes(dataset: Dataset, classes: Sequence[int], label_column: str = "label") -> Dataset:
    """Select the samples of `classes` (indices), renumbered 0.. in the given order, with only their names."""
    names = class_names(dataset, label_column, "select_classes")
    new_number = {c: i for i, c in enumerate(classes)}
    labels = label_array(dataset, label_column).tolist()
    kept = [i for i, label in enumerate(labels) if label in new_number]
    feature = ClassLabel(names=[names[c] for c in classes])
    renumbered = [new_number.get(label) for label in labels]
    # add the column first and select last: the other order would copy every image
    unused = max(dataset.column_names, key=len) + "_"  # a set without columns would lose its rows
    dataset = dataset.add_column(unused, renumbered, feature=feature).remove_columns(label_column)
    return dataset.rename_column(unused, label_column).select(kept)


def base_new_split(dataset: Dataset, label_column: str = "label") -> DatasetDict:
    """Split by class: the first `ceil(K/2)` labels are "base", the others "new", each with only its own names.

    Both halves keep the order of their samples.

    Returns:
        `DatasetDict` with "base" and "new", for `GeometryTrainer(eval_dataset=...)`.

    Raises:
        ValueError: there are fewer than four classes; each half needs two.

    Example:

    >>> animals = Dataset.from_dict({"image": list("abcde"), "label": [0, 1, 2, 3, 3]})
    >>> animals = animals.cast_column("label", ClassLabel(names=["cat", "dog", "panda", "bird"]))
    >>> halves = base_new_split(animals)
    >>> {half: part.features["label"].names for half, part in halves.items()}
    {'base': ['cat', 'dog'], 'new': ['panda', 'bird']}
    >>> halves["new"]["label"][:]
    [0, 1, 1]
    """
    count = len(class_names(dataset, label_column, "base_new_split"))
    if count < 4:
        raise ValueError(f"A base/new split needs at least 4 classes, two in each half; the data set has {count}.")
    half = math.ceil(count / 2)
    halves = {"base": range(half), "new": range(half, count)}
    return DatasetDict({name: select_classes(dataset, list(part), label_column) for name, part in halves.items()})


def few_shot(dataset: Dataset, shots: int, seed: int = 0, label_column: str = "label") -> Dataset:
    """Draw `shots` samples of every class by `seed`, without replacement.

    The same seed and rows give the same samples for any order and location of the rows: rows are identified by their
    images' encoded bytes, which are the same in a folder, a copy of it, a parquet file and on the Hub. More shots
    include the samples of fewer. Every row is read once, and none is decoded: hashing takes about two seconds per
    gigabyte.

    Returns:
        K * shots samples sorted by class; format and transform stay.

    Raises:
        TypeError: shots or seed is not an integer.
        ValueError: shots is below 1, seed is below 0, a class has too few samples, or a file cannot be read.
    """
    shots, seed = check_int("shots", shots, least=1), check_int("seed", seed, least=0)
    counts = [shots] * len(class_names(dataset, label_column, "few_shot"))
    return draw(dataset, counts, seed, label_column, advice="lower shots")
