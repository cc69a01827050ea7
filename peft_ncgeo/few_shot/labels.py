"""Labels of a support set: classes and the index of each image's class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.class_prompts import list_names
from ..validation import short_repr


def index_labels(
    labels: Sequence[Any] | Tensor, images: int, class_names: Sequence[str] | None = None
) -> tuple[list[Any], Tensor]:
    """Return the classes in order, and the index (N,) of each image's class.

    Args:
        labels: whole numbers or words. With class_names, numbers are positions in that list, words its names.
        images: number N of images.
        class_names: names of the classes; each has an image. Default: the labels that occur, sorted.

    Raises:
        TypeError, ValueError: one line that names the fault.
    """
    row = isinstance(labels, Iterable) and not isinstance(labels, str | bytes | Mapping | set | frozenset)
    if not row or getattr(labels, "ndim", 1) != 1:
        shown = f"an array of shape {tuple(labels.shape)}" if hasattr(labels, "shape") else short_repr(labels)
        raise ValueError(f"support_labels must be a list of labels, one for each image, got {shown}.")
    given = [label.item() if hasattr(label, "item") else label for label in labels]
    kinds = {type(label) for label in given}
    if len(kinds) > 1 or not kinds <= {int, str, bool}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"support_labels must be all whole numbers or all words, got {found}.")
    classes: list[Any] = sorted(set(given))
    places = {label: i for i, label in enumerate(classes)}
    if class_names is not None:
        classes = list_names(class_names)
        places = _places(classes, given)
    if len(classes) < 2:
        raise ValueError(f"Classification needs at least two classes, got {short_repr(classes)}.")
    if len(given) != images:
        raise ValueError(f"There are {images} support images and {len(given)} labels; pass one label for each image.")
    index = torch.tensor([places[label] for label in given])
    empty = (torch.bincount(index, minlength=len(classes)) == 0).nonzero()
    if len(empty):
        raise ValueError(f"Class {short_repr(classes[int(empty[0])])} has no support image; add some or leave it out.")
    return classes, index


def _places(names: list[str], labels: Sequence[Any]) -> dict[Any, int]:
    """Return the position of each label in the list of names.

    Raises:
        ValueError: a name is given twice, or a label is not one of the names or positions.
    """
    places: dict[Any, int] = {name: i for i, name in enumerate(names)}
    if len(places) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"class_names holds {short_repr(twice)} twice; give each class a different name.")
    if labels and not isinstance(labels[0], str):
        places = {i: i for i in range(len(names))}
    for i, label in enumerate(labels):
        if label not in places or isinstance(label, bool):
            wanted = (
                "one of class_names" if isinstance(label, str) else f"a position in class_names, 0..{len(names) - 1}"
            )
            raise ValueError(f"Support image {i} has the label {short_repr(label)}, which is not {wanted}.")
    return places
