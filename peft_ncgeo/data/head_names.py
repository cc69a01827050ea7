"""Names of an image classifier's outputs, and checks against the classes of a data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..models.adapters import unwrap
from ..models.heads import linear_classifier
from ..validation import short_repr

MULTI_LABEL = "multi_label_classification"  # as Transformers calls it
CLASS_NAMES = "class_names.json"  # beside an image classifier's adapter: the names of its outputs


def count_outputs(model: nn.Module) -> int:
    """Return the number K of outputs of an image classifier; an adapter's head may differ from the model's."""
    head = linear_classifier(model)
    return unwrap(model).config.num_labels if head is None else len(head.weight)


def head_names(model: nn.Module) -> list[str]:
    """Return the K names of an image classifier's outputs from its config, or an empty list if it has none.

    LABEL_0, LABEL_1, ..., Transformers' defaults, do not count as names.
    """
    labels = getattr(unwrap(model).config, "id2label", None) or {}
    names = [str(labels[i]) for i in sorted(labels)]
    generic = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return [] if generic or len(names) != count_outputs(model) else names


def name_numbers(class_names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return the index of each of these names among the names that a classifier knows.

    Raises:
        ValueError: there are fewer than two names, or a name is not known.
    """
    if unknown := [name for name in class_names if name not in known]:
        raise ValueError(
            f"The classifier has no class {short_repr(unknown[0])} among {short_repr(list(known))}; pass names "
            "that it has; those of a head are in model.config.id2label."
        )
    if len(class_names) < 2:
        raise ValueError(f"A classifier needs at least two class names, got {short_repr(list(class_names))}.")
    return [known.index(name) for name in class_names]


def write_head_names(model: nn.Module, names: Sequence[str]) -> None:
    """Write the names of the outputs into the model's config, from which pipelines and saved models read them."""
    config = unwrap(model).config
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}


def is_multi_label(model: nn.Module) -> bool:
    """Return True if the model's config says that an image may have any number of labels."""
    return getattr(unwrap(model).config, "problem_type", None) == MULTI_LABEL


def write_label_kind(model: nn.Module, multi_label: bool) -> None:
    """Write into the model's config, for pipelines and other readers, if an image may have any number of labels.

    Each output of a multi-label model goes through a sigmoid, and not through a softmax.
    """
    config = unwrap(model).config
    if multi_label:
        config.problem_type = MULTI_LABEL
    elif is_multi_label(model):
        config.problem_type = "single_label_classification"


def write_class_names(folder: Path, names: Sequence[str]) -> None:
    """Write the names of the outputs into a file beside the adapter."""
    (folder / CLASS_NAMES).write_text(f"{json.dumps(list(names), ensure_ascii=False)}\n", encoding="utf-8")


def same_names(names: Sequence[str], known: Sequence[str]) -> bool:
    """Return True if both lists have the same names in the same order; ignore case, "_" and extra spaces."""
    one, other = alike_spelled(names, known)
    return one == other


def check_head_names(model: nn.Module, names: Sequence[str], label_column: str, training: bool = False) -> None:
    """Raise an error if label k of a data set does not mean output k of an image classifier.

    Args:
        names: names of the data set's classes, in the order of its labels.
        training: True if the head will learn these classes, so that its config may have other names.

    Raises:
        ValueError: the number of classes differs, the same classes are in another order, or, without training, the
            classes differ.
    """
    outputs, known = count_outputs(model), head_names(model)
    if outputs != len(names):
        raise ValueError(
            f"The model's head has {outputs} outputs, the data set {len(names)} classes; they must be equal."
        )
    if known:
        mend = (
            "if only the model's names are wrong, set model.config.id2label = "
            f'dict(enumerate(dataset.features["{label_column}"].names))'
        )
        _check_order(names, known, label_column, "model.config.label2id", training, mend)


def check_same_classes(names: Sequence[str], trained: Sequence[str], label_column: str) -> None:
    """Check that the classes of an evaluation set are those of a head's training set, in the same order.

    Raises:
        ValueError: a class differs; the message names the first one and says what to do.
    """
    mapping = f'{{name: i for i, name in enumerate(train_dataset.features["{label_column}"].names)}}'
    _check_order(names, trained, label_column, mapping, False, "evaluate on images of the training classes")


def _check_order(
    names: Sequence[str], known: Sequence[str], label_column: str, mapping: str, training: bool, mend: str
) -> None:
    one, other = alike_spelled(names, known)
    moved = sorted(one) == sorted(other)
    if one == other or (training and not moved):
        return
    i = next(i for i, (name, meant) in enumerate(zip(one, other, strict=True)) if name != meant)
    which = (
        f"Label {i} of column {label_column!r} is {short_repr(names[i])}, but the head's output {i} is "
        f"{short_repr(known[i])}"
    )
    if moved:
        lower = [sorted(name.lower() for name in some) for some in (names, known)]
        spell = "" if lower[0] == lower[1] else f"spell the names as in {mapping}, and "
        raise ValueError(
            f"{which}: the same classes in another order; {spell}map the labels with "
            f'dataset.align_labels_with_mapping({mapping}, "{label_column}").'
        )
    raise ValueError(
        f"{which}; a classification head knows its training classes in their order only, and new classes need a "
        f"model that reads text; {mend}."
    )


def alike_spelled(*lists: Sequence[str]) -> list[list[str]]:
    """Return lists of names without case, "_" and extra spaces; unchanged if two names would become equal."""
    spelled = [[" ".join(name.replace("_", " ").casefold().split()) for name in names] for names in lists]
    if any(len(set(some)) < len(some) for some in spelled):
        return [list(names) for names in lists]
    return spelled
