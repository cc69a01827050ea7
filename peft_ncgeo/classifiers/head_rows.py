"""Rows that a new classification head starts from: features of class texts, or means of labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from ..geometry.sphere import l2_normalize
from ..models.adapters import evaluation_mode
from ..validation import short_repr
from .aligned import SetEncoder
from .zero_shot import ZeroShotClassifier


def text_rows(model: nn.Module, class_names: Sequence[str], processor: Any, template: str | None) -> Tensor:
    """Return the features (K, d) of class texts, of length 1.

    Raises:
        TypeError, ValueError: as [`ZeroShotClassifier`] and [`class_prompts`].
    """
    with evaluation_mode(model):
        return l2_normalize(ZeroShotClassifier(model, processor, template).text_features(class_names))


def before_projection(model: Any, rows: Tensor) -> Tensor:
    """Return rows (K, d) for features v before a dual encoder's projection P (d, e), from rows (K, e) for P' v.

    `(P w) . v` is `w . (P' v)`, so a linear head gives the same logits; cosines with v are different.

    Raises:
        ValueError: the projection is not one linear layer without bias.
    """
    projection = getattr(model, "visual_projection", None)
    if projection is None:
        return rows
    if not isinstance(projection, nn.Linear) or projection.bias is not None:
        raise ValueError(
            f"{type(model).__name__} projects its feature by more than one linear layer, so class texts have no place "
            "before it; leave out projected=False, or use another init."
        )
    return rows @ projection.weight.to(rows.dtype)


def mean_rows(
    model: nn.Module, dataset: Dataset, processor: Any, image_column: str, label_column: str, batch_size: int
) -> Tensor:
    """Return the mean feature (K, d) of the images of each class, in float64.

    Args:
        model: image classifier; features are the input of its head.

    Raises:
        ValueError: a class has no images, or features are not finite.
    """
    collected = SetEncoder(model, processor, image_column, label_column, batch_size, None).collect(dataset, keep=False)
    means, names = collected.means, collected.names or []
    empty = (~means.isfinite().all(-1)).nonzero()
    if len(empty):
        name = short_repr(names[int(empty[0])])
        raise ValueError(f"Class {name} has no images, or features that are not finite, so it has no mean; add some.")
    return means
