"""Classes of labelled sets: select and rename them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, DatasetDict

from ..validation import short_repr
from .checks import class_names
from .class_prompts import list_names
from .sampling import label_array

Images = TypeVar("Images", Dataset, DatasetDict)


def select_classes(dataset: Images, names: Sequence[str], label_column: str = "label") -> Images:
    """Select the samples of some classes, and keep only the names of these: label i is the i-th of `names`.

    Args:
        dataset: a labelled set, or a `DatasetDict`, whose splits are all treated in this way.
        names: names of classes of the set, in the order of their new labels.

    Raises:
        TypeError, ValueError: `names` is not a list of different classes of the set.

    Example:

    >>> animals = Dataset.from_dict({"label": [0, 1, 2, 2]})
    >>> animals = animals.cast_column("label", ClassLabel(names=["cat", "dog", "panda"]))
    >>> select_classes(animals, ["panda", "cat"])["label"][:]
    [1, 0, 0]
    """
    if isinstance(dataset, DatasetDict):
        return DatasetDict({part: select_classes(rows, names, label_column) for part, rows in dataset.items()})
    known, names = class_names(dataset, label_column), list_names(names)
    if not names:
        raise ValueError("select_classes needs at least one class name.")
    _check_known(names, known)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"Class {short_repr(twice[0])} is selected twice; name it once.")
    new_number = {known.index(name): i for i, name in enumerate(names)}
    labels = label_array(dataset, label_column).tolist()
    kept = [i for i, label in enumerate(labels) if label in new_number]
    # replace the column first and select last: the other order would copy every image
    return replace_labels(dataset, [new_number.get(label) for label in labels], names, label_column).select(kept)


def rename_classes(dataset: Images, new_names: Mapping[str, str], label_column: str = "label") -> Images:
    """Give classes other names, such as words in place of a code; labels do not change.

    Args:
        dataset: a labelled set, or a `DatasetDict`, whose splits are all treated in this way.
        new_names: old name -> new name; other classes keep their names.

    Raises:
        TypeError, ValueError: the set has no class with an old name, or two classes would have the same name.
    """
    if isinstance(dataset, DatasetDict):
        return DatasetDict({part: rename_classes(rows, new_names, label_column) for part, rows in dataset.items()})
    if not isinstance(new_names, Mapping):
        raise TypeError(f"rename_classes takes a dict of old and new names, got {type(new_names).__name__}.")
    known = class_names(dataset, label_column)
    _check_known(new_names, known)
    names = list_names([new_names.get(name, name) for name in known])
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"Two classes would be called {short_repr(twice[0])}; give each a name of its own.")
    return replace_labels(dataset, dataset.with_format(None)[label_column][:], names, label_column)


def replace_labels(dataset: Dataset, labels: Sequence[Any], names: Sequence[str], label_column: str) -> Dataset:
    """Return the set with other labels (N,), numbers or None, in a `ClassLabel` column of these names."""
    # to cast the column would write every image again
    unused = max(dataset.column_names, key=len) + "_"  # a set without columns would lose its rows
    dataset = dataset.add_column(unused, list(labels), feature=ClassLabel(names=list(names)))
    return dataset.remove_columns(label_column).rename_column(unused, label_column)


def _check_known(names: Any, known: Sequence[str]) -> None:
    strange = [name for name in names if name not in set(known)]
    if strange:
        raise ValueError(f"The set has no class {short_repr(strange[0])} among {short_repr(list(known))}.")
