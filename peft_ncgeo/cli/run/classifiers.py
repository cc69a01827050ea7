"""Classifiers by the folder or Hub id of a trained adapter, head or model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from peft.utils import CONFIG_NAME

from ...classifiers.few_shot import FewShotClassifier
from ...classifiers.trained import TrainedClassifier
from ...classifiers.zero_shot import ZeroShotClassifier
from ...data.processors import find_processor
from ...files import read_text
from ...loading.load import HEAD, HEAD_FOLDER, PROTOTYPES, fetch_files, load_adapter, refuse_unsaved
from ...models.towers import reads_text
from .models import DEMO, empty_model, load_model


def load_classifier(name: str, base_model: str | None = None) -> Any:
    """Load the classifier of an adapter, a few-shot head, an exported or whole model, or the untuned 'demo' model."""
    if name == DEMO:
        return ZeroShotClassifier(*load_model(name))
    folder = fetch_files(name)
    refuse_unsaved(folder, name)
    if any((folder / file).is_file() for file in (HEAD, f"{HEAD_FOLDER}/{HEAD}", PROTOTYPES)):
        return FewShotClassifier.from_pretrained(name, base_model)
    if (folder / CONFIG_NAME).is_file():
        model = load_adapter(name, base_model)
        kind: Any = ZeroShotClassifier if reads_text(model) else TrainedClassifier
        return kind(model, find_processor(model, folder))
    if base_model is None and reads_text(empty_model(name)):
        return ZeroShotClassifier(*load_model(name))
    return TrainedClassifier.from_pretrained(name, base_model)


def read_names(class_names: str | None) -> list[str] | None:
    """Return the names of a text with commas between them, or of a file with one name on each line; None for None.

    Raises:
        ValueError: fewer than two names.
    """
    if class_names is None:
        return None
    in_file = os.path.isfile(class_names)  # False for a text too long for a path, where Path raises an error
    parts: Sequence[str] = read_text(class_names).splitlines() if in_file else class_names.split(",")
    names = [name.strip() for name in parts if name.strip()]
    if len(names) < 2:
        raise ValueError(
            f"--class_names {class_names} gives {len(names)} name; write two or more with commas between them, or "
            "name a file with one on each line."
        )
    return names
