"""Data set, model and loss that the user names, or defaults, for the examples on images."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from peft_ncgeo.data import class_counts, load_image_demo, load_images, split_validation
from peft_ncgeo.losses import CrossEntropy, LogitAdjustment
from peft_ncgeo.training import Recipe

LOSS_HELP = "ce, or balanced (logit adjustment). Default: the recipe's loss, else balanced on a long tail."


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
            raise SystemExit("The demo's ViT knows only the demo's classes; name a model with --model_name_or_path.")
        return demo.model, demo.processor
    labels = dict(enumerate(class_names))
    model = AutoModelForImageClassification.from_pretrained(
        name, id2label=labels, label2id={label: i for i, label in labels.items()}, ignore_mismatched_sizes=True
    )
    return model, AutoImageProcessor.from_pretrained(name)


def choose_loss(name: str | None, recipe: Recipe, train: Dataset, label_column: str) -> nn.Module | None:
    """Return the named classification loss, else the recipe's own, else a balanced loss if the classes have a tail.

    Args:
        name: "ce", "balanced" or None.
        train: the training images; they have a tail if a class has twice the images of another.
    """
    losses = {"ce": CrossEntropy, "balanced": LogitAdjustment}
    if name is not None and name not in losses:
        raise SystemExit(f"--loss {name} must be one of {', '.join(losses)}.")
    counts = class_counts(train, label_column)
    if name is None and ("classification_loss" in recipe.source or counts.max() < 2 * counts.min()):
        return recipe.classification_loss()
    return losses[name or "balanced"]()
