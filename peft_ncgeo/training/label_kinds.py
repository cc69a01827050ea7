"""Checks that data, terms and callbacks agree on one label per image, or on any number of labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..data.multi_label import is_multi_label
from ..data.torch_sets import is_torch_set
from ..models.adapters import unwrap
from ..models.towers import reads_text
from .arguments import GeometryTrainingArguments
from .callbacks.monitor import GeometryMonitor

_MADE_OF_LABELS = {"labels", "class_means", "class_counts"}


def reads_one_label(term: Any) -> bool:
    """Return True for a term that reads one label per image, or values computed from such labels."""
    requires = _MADE_OF_LABELS.intersection(getattr(term, "requires", ()))
    return getattr(term, "reads_labels", True) or bool(requires)


def reads_lists(terms: Iterable[Any]) -> bool:
    """Return True if a term reads any number of labels per image, as `MultiLabelLoss` does."""
    return any("multi_hot" in getattr(term, "requires", ()) for term in terms)


def check_label_kind(dataset: Any, label_column: str, multi_label: bool, reader: str) -> None:
    """Check that the label column of a set is of the kind that the terms read.

    Args:
        multi_label: True if the terms read any number of labels per image.
        reader: name of the term that reads one label, for the error message; empty if there is none.

    Raises:
        ValueError: the column is of another kind.
    """
    lists = is_multi_label(dataset, label_column)
    if lists and not multi_label:
        reader = f"{reader} reads one label per image" if reader else "no term reads lists of labels"
        raise ValueError(
            f"Column {label_column!r} holds lists, so this is a multi-label set, but {reader}; pass "
            "classification_loss=MultiLabelLoss(), and leave out terms that read one label."
        )
    if multi_label and is_torch_set(dataset):
        raise ValueError(
            "MultiLabelLoss reads lists of labels, which streams and torch data sets do not give here; pass a "
            "datasets.Dataset."
        )
    if multi_label and not lists and label_column in (getattr(dataset, "column_names", None) or ()):
        raise ValueError(
            f"MultiLabelLoss reads a list of labels per image, but column {label_column!r} is not a list; pass "
            "classification_loss=CrossEntropy() for one label per image, or make the column a "
            "datasets.Sequence(datasets.ClassLabel(names=[...]))."
        )


def check_multi_label(
    args: GeometryTrainingArguments, model: nn.Module, terms: Sequence[Any], multi_label: bool
) -> None:
    """Check that terms and arguments fit the kind of labels.

    Raises:
        ValueError: a term reads lists and another one reads one label per image; or no term reads the `logit_bias`, or
            the model has no place for it.
    """
    name, text = type(unwrap(model)).__name__, reads_text(model)
    own_bias = text and hasattr(unwrap(model), "logit_bias")
    if args.logit_bias is not None and (not multi_label or not text or own_bias):
        why = "a softmax over classes does not change with it; leave it out, or pass MultiLabelLoss()"
        if multi_label:
            why = f"{name} has a bias of its own; leave it out" if own_bias else f"{name} has a head; leave it out"
        raise ValueError(f"logit_bias={args.logit_bias} has no place: {why}.")
    if not multi_label:
        return
    readers = [getattr(term, "name", type(term).__name__) for term in terms if reads_one_label(term)]
    readers += ["class_balanced_sampling"] if args.class_balanced_sampling else []
    if readers:
        raise ValueError(
            f"{readers[0]} reads one label per image, but MultiLabelLoss trains on any number of labels; leave "
            f"{readers[0]} out."
        )
    if text and not own_bias and not hasattr(model, "peft_config"):
        raise ValueError(
            f"MultiLabelLoss adds a logit_bias to {name}, which is saved with an adapter; wrap the model with "
            "get_peft_model(model, config)."
        )


def check_multi_label_callbacks(callbacks: Iterable[Any], multi_label: bool) -> None:
    """Raise an error that names a callback that reads one label per image, in a training on any number of labels."""
    for callback in callbacks if multi_label else ():
        if isinstance(callback, GeometryMonitor) or hasattr(callback, "bind"):
            raise ValueError(
                f"{type(callback).__name__} reads one label per image, for the class means, but MultiLabelLoss "
                "trains on any number of labels; leave it out."
            )
