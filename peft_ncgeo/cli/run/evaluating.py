"""Report of an adapter on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import typer

from ...classifiers.few_shot import FewShotClassifier
from ...classifiers.zero_shot import ZeroShotClassifier
from ...data import load_images
from ...data.checks import class_names as names_of
from ...data.head_names import alike_spelled, is_multi_label
from ...data.sampling import label_array
from ...models.text_setting import active_text_setting
from ...reports import classification_report
from .classifiers import load_classifier, read_names


def evaluate(
    adapter: str,
    base_model: str | None,
    images: str,
    split: str,
    class_names: str | None,
    output: Path | None,
    batch_size: int,
    num_test_views: int,
    label_column: str,
) -> None:
    """Print the report, and write its tables and figures if a folder is named."""
    parts = load_images(images, label_column=label_column)
    dataset: Any = parts
    if isinstance(parts, dict):
        if split not in parts:
            raise ValueError(f"{images} has no part {split!r}; set --split to one of {', '.join(parts)}.")
        dataset = parts[split]
    in_data = names_of(dataset, label_column)
    given = read_names(class_names)
    names = in_data if given is None else _of_labels(given, in_data, images)
    classifier, labels = load_classifier(adapter, base_model), label_array(dataset, label_column)
    if is_multi_label(classifier.model) or active_text_setting(classifier.model).multi_label:
        raise ValueError(
            f"{adapter} was trained with MultiLabelLoss, but a report needs images with one label each; use "
            "trainer.evaluate() or `peft-ncgeo predict`."
        )
    options: dict[str, Any] = {"batch_size": batch_size, "num_test_views": num_test_views}
    if isinstance(classifier, ZeroShotClassifier):
        options["class_names"] = names
    else:  # its classes are those of its training
        known = list(classifier.classes if isinstance(classifier, FewShotClassifier) else classifier.class_names)
        strange = [name for name in names if name not in known]
        if strange:
            raise ValueError(f"{adapter} does not know the class {strange[0]!r}; its classes are {', '.join(known)}.")
        labels, names = np.array([known.index(name) for name in names])[labels], known
    probabilities = classifier.predict_proba((image for image in dataset["image"]), **options)
    report = classification_report(probabilities, labels, names)
    typer.echo(report.to_markdown())
    if output is not None:
        report.save(output)
        typer.echo(f"\nThe report is in {output}, with its tables.")


def _of_labels(given: Sequence[str], in_data: Sequence[str], images: str) -> list[str]:
    """Return names in the order of the labels; the data's own names may be given in any order.

    Raises:
        ValueError: the number of names is not the number of classes, or some names of the data are given to other
            labels.
    """
    if len(given) != len(in_data):
        raise ValueError(
            f"--class_names gives {len(given)} names, but {images} has {len(in_data)} classes; give each a name, in "
            "the order of the labels."
        )
    own, known = alike_spelled(given, in_data)
    if sorted(own) == sorted(known):
        return [given[own.index(name)] for name in known]
    for i, name in enumerate(own):
        if name in known and name != known[i]:
            raise ValueError(
                f"--class_names gives {given[i]!r} for the class that {images} calls {in_data[i]!r}, but it has a "
                f"class of this name too; write the names in the order of {', '.join(in_data)}."
            )
    return list(given)
