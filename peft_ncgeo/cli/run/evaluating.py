"""Report of an adapter on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import typer

from ...classifiers.few_shot import FewShotClassifier
from ...classifiers.zero_shot import ZeroShotClassifier
from ...data import load_images
from ...data.checks import class_names as names_of
from ...data.sampling import label_array
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
            raise ValueError(f"{images} has no part {split!r}; --split takes one of {', '.join(parts)}.")
        dataset = parts[split]
    in_data = names_of(dataset, label_column)
    names = read_names(class_names) or in_data
    if len(names) != len(in_data):
        raise ValueError(
            f"--class_names gives {len(names)} names, but {images} has {len(in_data)} classes; give each a name, in "
            "the order of the labels."
        )
    classifier, labels = load_classifier(adapter, base_model), label_array(dataset, label_column)
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
        typer.echo(f"\nIt is in {output}, with its tables.")
