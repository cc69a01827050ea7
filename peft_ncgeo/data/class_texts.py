"""Texts of the user's own for a class, such as descriptions, in place of its name in a template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..models.templates import spelled
from ..validation import short_repr

ClassTexts = Mapping[str, Sequence[str]]


def list_class_texts(class_texts: Any, name: str = "class_texts") -> dict[str, tuple[str, ...]]:
    """Return texts of classes as a dict from a class name to a tuple of texts.

    Args:
        class_texts: class name -> its texts; None: none. "{}" in a text stands for the class name.

    Raises:
        TypeError, ValueError: it is not a dict of lists, or a name or text, given in the message, is empty or appears
            twice.
    """
    if class_texts is None:
        return {}
    if not isinstance(class_texts, Mapping):
        raise TypeError(f"{name} must be a dict of class names and lists of texts, got {type(class_texts).__name__}.")
    found: dict[str, tuple[str, ...]] = {}
    known: set[str] = set()
    for label, texts in class_texts.items():
        if not isinstance(label, str) or not label.strip():
            raise ValueError(f"{name} has the class {short_repr(label)}; expected a class name.")
        if not isinstance(texts, list | tuple) or not texts:
            raise ValueError(f"{name} of class {short_repr(label)} must be a list of texts, got {short_repr(texts)}.")
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{name} of class {short_repr(label)}: {short_repr(text)} is not a text; remove it.")
            if text in texts[:i]:
                raise ValueError(f"{name} of class {short_repr(label)} has {short_repr(text)} twice; remove one.")
        if spelled(label) in known:
            raise ValueError(f"{name} has class {short_repr(label)} twice; put its texts together.")
        known.add(spelled(label))
        found[label] = tuple(texts)
    return found


def texts_of(names: Sequence[str], class_texts: ClassTexts) -> list[list[str]]:
    """Return the texts of each class, with its name in place of "{}"; an empty list for a class without an entry."""
    own = {spelled(label): texts for label, texts in class_texts.items()}
    return [[text.replace("{}", spelled(name)) for text in own.get(spelled(name), ())] for name in names]


def check_entries(class_texts: ClassTexts, names: Sequence[str]) -> None:
    """Check that each class with texts is a class of a data set.

    Raises:
        ValueError: no data set has the class, which the message names.
    """
    known = {spelled(name) for name in names}
    strange = [label for label in class_texts if spelled(label) not in known]
    if strange:
        raise ValueError(
            f"class_texts describe {short_repr(strange[0])}, which is not a class of the data sets, "
            f"{short_repr(list(dict.fromkeys(names)))}; spell it as they do, or leave it out."
        )
