"""Base and new classes, and few shots of each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from datasets import ClassLabel, Dataset, DatasetDict

from ..validation import check_int
from .checks import class_names
from .sampling import draw, label_array


def select_classes(dataset: Dataset, classes: Sequence[int], label_column: str = "label") -> Dataset:
    """The samples of `classes` (indices), renumbered 0.. in the order given, under their own names only."""
    names = class_names(dataset, label_column)
    new_number = {c: i for i, c in enumerate(classes)}
    labels = label_array(dataset, label_column).tolist()
    kept = [i for i, label in enumerate(labels) if label in new_number]
    feature = ClassLabel(names=[names[c] for c in classes])
    renumbered = [new_number.get(label) for label in labels]
    # the column first and the selection last: the other way round would copy every image
    unused = max(dataset.column_names, key=len) + "_"  # a set that lost all of its columns would lose its rows too
    dataset = dataset.add_column(unused, renumbered, feature=feature).remove_columns(label_column)
    return dataset.rename_column(unused, label_column).select(kept)


def base_new_split(dataset: Dataset, label_column: str = "label") -> DatasetDict:
    """Split by class: the first `ceil(K/2)` labels are "base", the rest "new", each over its own names only.

    Either half keeps its samples in the order given.

    Returns:
        `DatasetDict` with "base" and "new", as `GeometryTrainer(eval_dataset=...)` takes it.

    Raises:
        ValueError: fewer than four classes, since either half needs two.

    Example:

    >>> animals = Dataset.from_dict({"image": list("abcde"), "label": [0, 1, 2, 3, 3]})
    >>> animals = animals.cast_column("label", ClassLabel(names=["cat", "dog", "panda", "bird"]))
    >>> halves = base_new_split(animals)
    >>> {half: part.features["label"].names for half, part in halves.items()}
    {'base': ['cat', 'dog'], 'new': ['panda', 'bird']}
    >>> halves["new"]["label"][:]
    [0, 1, 1]
    """
    count = len(class_names(dataset, label_column))
    if count < 4:
        raise ValueError(f"A base/new split needs at least 4 classes, two in each half; the data set has {count}.")
    half = math.ceil(count / 2)
    halves = {"base": range(half), "new": range(half, count)}
    return DatasetDict({name: select_classes(dataset, list(part), label_column) for name, part in halves.items()})


def few_shot(dataset: Dataset, shots: int, seed: int = 0, label_column: str = "label") -> Dataset:
    """`shots` samples of every class, drawn without replacement by `seed`.

    The same seed and rows give the same samples in whatever order the rows come, and wherever they lie: rows are told
    apart by their images' encoded bytes, which a folder, a copy of it, a parquet file and the Hub share. Fewer shots
    are among more. Every row is read once, none decoded: hashing takes about two seconds a gigabyte.

    Returns:
        K * shots samples sorted by class; format and transform stay.

    Raises:
        TypeError: shots or a seed that is no whole number.
        ValueError: shots below 1, a seed below 0, a class with fewer samples, named, or a file that cannot be read.
    """
    shots, seed = check_int("shots", shots, least=1), check_int("seed", seed, least=0)
    counts = [shots] * len(class_names(dataset, label_column))
    return draw(dataset, counts, seed, label_column, mend="lower shots")
