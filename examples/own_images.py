"""A data set and a model of the user's own, or the demo's, for the examples on image classifiers."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict
from transformers import AutoImageProcessor, AutoModelForImageClassification

from peft_ncgeo.data import load_image_demo, load_images, split_validation


def load_parts(dataset_name: str | None, label_column: str) -> DatasetDict:
    """Load `train`, `validation` and `test`; without a validation part, hold out a tenth of each class.

    Args:
        dataset_name: Hub data set, or folder `train/<class>/`, `test/<class>/`. None: the demo's photographs.
        label_column: `ClassLabel` column.
    """
    if dataset_name is None:
        return load_image_demo().splits
    parts = load_images(dataset_name, label_column=label_column)
    if isinstance(parts, Dataset) or not {"train", "test"} <= set(parts):
        there = "" if isinstance(parts, Dataset) else f"; it has {sorted(parts)}"
        raise SystemExit(f"{dataset_name} must have parts named 'train' and 'test'{there}.")
    return parts if "validation" in parts else split_validation(parts, label_column=label_column)


def load_model(name: str | None, class_names: list[str]) -> tuple[Any, Any]:
    """Load an image classifier with one output for each class, and its image processor; None: the demo's ViT."""
    if name is None:
        demo = load_image_demo()
        if len(class_names) != demo.model.config.num_labels:
            raise SystemExit("The demo's ViT knows the demo's classes; name a model with --model_name_or_path.")
        return demo.model, demo.processor
    labels = dict(enumerate(class_names))
    model = AutoModelForImageClassification.from_pretrained(
        name, id2label=labels, label2id={label: i for i, label in labels.items()}, ignore_mismatched_sizes=True
    )
    return model, AutoImageProcessor.from_pretrained(name)
