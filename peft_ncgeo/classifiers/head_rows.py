"""Rows that a new classification head starts from: features of class texts, or means of labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.checks import check_dataset
from ..data.images import ImageCollator, LabelledImages
from ..data.processors import image_processor
from ..geometry.collapse import NeuralCollapse
from ..geometry.sphere import l2_normalize
from ..models.adapters import evaluation_mode
from ..models.devices import execution_device
from ..models.feature_extractor import FeatureExtractor, extract_features
from ..validation import short_repr
from .zero_shot import ZeroShotClassifier


def text_rows(model: nn.Module, class_names: Sequence[str], processor: Any, template: str | None) -> Tensor:
    """Return the features (K, d) of class texts, of length 1.

    Raises:
        TypeError, ValueError: as [`ZeroShotClassifier`] and [`class_prompts`].
    """
    with evaluation_mode(model):
        return l2_normalize(ZeroShotClassifier(model, processor, template).text_features(class_names))


def mean_rows(
    model: nn.Module, dataset: Dataset, processor: Any, image_column: str, label_column: str, batch_size: int
) -> Tensor:
    """Return the mean feature (K, d) of the images of each class, in float64.

    Args:
        model: image classifier; features are the input of its head.

    Raises:
        ValueError: a class without images, or features that are not finite.
    """
    names = check_dataset(dataset, image_column, label_column, False)
    images = LabelledImages(dataset, image_column, label_column)
    extractor, device, collapse = FeatureExtractor(model), execution_device(model), None
    for batch in DataLoader(images, batch_size, collate_fn=ImageCollator(image_processor(processor))):
        labels = batch.pop("labels")
        inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        features = extract_features(extractor, **inputs)["image_features"].float()
        if collapse is None:
            collapse = NeuralCollapse(len(names), features.shape[1], keep_samples=False)
        collapse.update(features, labels)
    means = torch.full((len(names), 1), torch.nan) if collapse is None else collapse.class_means.cpu()
    empty = (~means.isfinite().all(-1)).nonzero()
    if len(empty):
        name = short_repr(names[int(empty[0])])
        raise ValueError(f"Class {name} has no images, or features that are not finite, so it has no mean; add some.")
    return means
