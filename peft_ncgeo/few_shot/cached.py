"""Heads on cached features: embed the support images once, in several augmented views, and fit a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..classifiers.few_shot import HeadClassifier
from ..classifiers.heads import FeatureHead, Support
from ..classifiers.image_features import ImageFeatures, ProjectedFeatures, check_rows
from ..classifiers.zero_shot import ZeroShotClassifier
from ..data.images import crop_flip
from ..data.processors import find_processor, image_processor, input_size
from ..data.reading import rgb_images
from ..models.adapters import evaluation_mode
from ..models.towers import logit_scale
from ..validation import check_int, short_repr
from .labels import index_labels
from .leave_one_out import head_accuracies

_ROWS = 4096  # samples whose loss is computed at once


def fit_cached(
    model: nn.Module,
    head: FeatureHead,
    images: Any,
    labels: Sequence[Any] | Tensor,
    class_names: Sequence[str] | None,
    *,
    processor: Any,
    num_views: int | None,
    template: str | None,
    seed: int,
    batch_size: int,
) -> HeadClassifier:
    """Return a classifier with a head fitted on the cached features of a support set.

    Args:
        model: a dual encoder, which does not change.
        head: the method.
        images, labels, class_names, processor, num_views, template, seed, batch_size: see [`~peft_ncgeo.adapt`].

    Raises:
        TypeError, ValueError: one line that names the fault.
    """
    seed, batch_size = check_int("seed", seed, least=0), check_int("batch_size", batch_size, least=1)
    with evaluation_mode(model):
        processor = find_processor(model) if processor is None else processor
        if processor is None:
            raise ValueError("No processor is found with the base model; pass processor, such as a CLIPProcessor.")
        texts = ZeroShotClassifier(model, processor, template)
        encoder = ProjectedFeatures(model, processor)
        images = encoder.listed(images)
        classes, index = index_labels(labels, len(images), class_names)
        if not isinstance(classes[0], str):
            raise ValueError(
                f"{type(head).__name__} needs the names of the classes; pass class_names, a list in which each label "
                "is the position of its name."
            )
        views = _number_of_views(head, images, num_views)
        with torch.no_grad():
            words = texts.text_features(classes).cpu()
            features = embed_views(encoder, images, views, head.smallest_crop, seed, batch_size)
            scale = float(logit_scale(model).exp())
        support = Support(features, index, words.to(features.dtype), scale, seed)
        state, metrics = _fit(head, support)
        told = {"num_views": views, "template": texts.template, "seed": seed}
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            left_out = head_accuracies(head, support, metrics)
        metrics = {**_measure(head, state, support), **left_out, **metrics}
        return HeadClassifier(model, head, state, classes, processor, template, metrics, told)


def embed_views(
    encoder: ImageFeatures, images: Any, num_views: int, smallest: float, seed: int, batch_size: int
) -> Tensor:
    """Return features (V, N, d) of augmented views of images, on the CPU; without views (1, N, d) of the images.

    View v of image i depends only on (seed, v, i). Views are made batch by batch and not kept.

    Raises:
        ValueError: features that are not finite.
    """
    if not num_views:
        rows = encoder.embed(images, batch_size)
        check_rows(rows, "features of support image", range(len(rows)))
        return rows[None].cpu()
    size = input_size(image_processor(encoder.processor))
    starts = [(v, i) for v in range(num_views) for i in range(0, len(images), batch_size)]
    parts = []
    for v, start in tqdm(starts, desc="Embedding views", unit="batch", leave=False, disable=len(starts) < 10):
        batch = rgb_images(images[start : start + batch_size], start)
        shown: list[Image.Image] = [
            crop_flip(image, np.random.default_rng((seed, v, i)), size, smallest)
            for i, image in enumerate(batch, start)
        ]
        parts.append(encoder.embed(shown, batch_size).cpu())
        check_rows(parts[-1], "features of support image", range(start, start + len(batch)))
    return torch.cat(parts).unflatten(0, (num_views, len(images)))


def _number_of_views(head: FeatureHead, images: Any, given: int | None) -> int:
    """Return the number of augmented views, 0 for the images themselves."""
    if given is None:
        return 0 if isinstance(images, Tensor) else head.num_views
    views = check_int("num_views", given, least=0)
    if views and isinstance(images, Tensor):
        raise ValueError(
            f"num_views={short_repr(given)} needs images that can be cropped, not pixels; pass paths, PIL images or "
            "uint8 arrays, or set num_views=0."
        )
    return views


@torch.enable_grad()
def _fit(head: FeatureHead, support: Support) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return a head's state and its measures.

    Raises:
        ValueError: the state is not finite, for example because training diverged.
    """
    with torch.autocast("cpu", enabled=False):
        state, metrics = head.fit(support)
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(
                f"{name} of {short_repr(head)} is not finite; lower its lr if it has one, or take another head."
            )
    return state, metrics


@torch.no_grad()
def _measure(head: FeatureHead, state: dict[str, Tensor], support: Support) -> dict[str, float]:
    """Return loss and accuracy on all views of the support set."""
    features, labels = support.features.flatten(0, 1), support.labels.repeat(len(support.features))
    loss, right = 0.0, 0
    for rows, wanted in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
        logits = head.logits(state, rows)
        loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
        right += int((logits.argmax(-1) == wanted).sum())
    return {"loss": loss / len(labels), "accuracy": right / len(labels)}
