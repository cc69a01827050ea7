"""Splits of data sets: base and new classes, few shots per class, and a part for validation."""

from __future__ import annotations

import math
import warnings

import numpy as np
from datasets import Dataset, DatasetDict

from ..validation import check_float, check_int, short_repr
from .checks import class_names
from .classes import select_classes
from .sampling import content_order, draw, label_array, rows_of_classes


def base_new_split(dataset: Dataset, label_column: str = "label") -> DatasetDict:
    """Split a set by class: the first `ceil(K/2)` labels are "base", the others "new", each with only its own names.

    Both halves keep the order of their samples.

    Returns:
        `DatasetDict` with "base" and "new", for `GeometryTrainer(eval_dataset=...)`.

    Raises:
        ValueError: there are fewer than four classes; each half needs two.

    Example:

    >>> from datasets import ClassLabel
    >>> animals = Dataset.from_dict({"image": list("abcde"), "label": [0, 1, 2, 3, 3]})
    >>> animals = animals.cast_column("label", ClassLabel(names=["cat", "dog", "panda", "bird"]))
    >>> halves = base_new_split(animals)
    >>> {half: part.features["label"].names for half, part in halves.items()}
    {'base': ['cat', 'dog'], 'new': ['panda', 'bird']}
    >>> halves["new"]["label"][:]
    [0, 1, 1]
    """
    names = class_names(dataset, label_column, "base_new_split")
    if len(names) < 4:
        raise ValueError(
            f"A base/new split needs at least 4 classes, two in each half; the data set has {len(names)}. Train and "
            "test on all of them instead: --all_classes, or protocols.all_classes."
        )
    half = math.ceil(len(names) / 2)
    halves = {"base": names[:half], "new": names[half:]}
    return DatasetDict({name: select_classes(dataset, part, label_column) for name, part in halves.items()})


def few_shot(dataset: Dataset, shots: int, seed: int = 0, label_column: str = "label") -> Dataset:
    """Draw `shots` samples of every class by `seed`, without replacement.

    The same seed and rows give the same samples for any order and location of the rows: rows are identified by their
    images' encoded bytes, which are the same in a folder, a copy of it, a parquet file and on the Hub. A draw of more
    shots includes the samples of a draw of fewer. Every row is read once, and none is decoded: hashing takes about two
    seconds per gigabyte.

    Returns:
        K * shots samples sorted by class, with the data set's format and transform.

    Raises:
        TypeError: shots or seed is not an integer.
        ValueError: shots is below 1, seed is below 0, a class has too few samples, or a file cannot be read.
    """
    shots, seed = check_int("shots", shots, least=1), check_int("seed", seed, least=0)
    counts = [shots] * len(class_names(dataset, label_column, "few_shot"))
    return draw(dataset, counts, seed, label_column, advice="lower shots")


def split_validation(
    dataset: Dataset | DatasetDict, share: float = 0.1, seed: int = 0, label_column: str = "label"
) -> DatasetDict:
    """Hold out a share of every class for validation, drawn by `seed`.

    Of the n images of a class, `max(1, round(share * n))` are held out, but never all of them. A class of one image
    stays in training, and a warning names it. Images without a label stay in training too. As in [`few_shot`], the
    same images are drawn for any order and location of the rows; every row is read once for this. Both parts keep the
    order of the rows.

    Args:
        dataset: a labelled set; or a `DatasetDict` with "train" and without "validation", whose other splits stay.
        share: share of the images of a class, between 0 and 1.

    Returns:
        `DatasetDict` with "train" and "validation".

    Raises:
        TypeError, ValueError: there is no "train", or there is a "validation" already; no class has two images; or an
            argument is out of range.
    """
    share = check_float("share", share, "between 0 and 1", lambda value: 0 < value < 1)
    seed, others = check_int("seed", seed, least=0), {}
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset or "validation" in dataset:
            problem = "has a split 'validation' already" if "validation" in dataset else "has no split 'train'"
            raise ValueError(f"The DatasetDict of {sorted(dataset)} {problem}; pass the split to divide.")
        others, dataset = dict(dataset), dataset["train"]
    names, labels = class_names(dataset, label_column), label_array(dataset, label_column)
    held: list[int] = []
    alone = []
    for c, rows in enumerate(rows_of_classes(labels, len(names), content_order(dataset))):
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        if len(rows) == 1:
            alone.append(names[c])
        elif count > 0:
            held += rows[np.random.default_rng((seed, c)).permutation(len(rows))[:count]].tolist()
    if not held:
        raise ValueError("No class has two images, so none can be held out for validation; add images.")
    if alone:
        warnings.warn(
            f"Validation has no image of {short_repr(alone)}: a class of one image stays in training.", stacklevel=2
        )
    kept = np.setdiff1d(np.arange(len(dataset)), held)
    return DatasetDict({**others, "train": dataset.select(kept), "validation": dataset.select(sorted(held))})
