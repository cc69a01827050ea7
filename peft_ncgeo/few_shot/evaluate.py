"""Evaluation of few-shot episodes: train on each support set, measure on its query images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..classifiers.image_features import ImageFeatures
from ..data.episodes import Episode
from ..data.images import LabelledImages
from ..geometry.collapse import NeuralCollapse
from ..geometry.contrast import loss_against_gap
from ..geometry.heads import Heads, class_prototypes
from ..geometry.sphere import l2_normalize, modality_gap
from ..tuners.copa import CoPAConfig
from .adapt import adapt
from .episodes import fit_episodes, head_settings

SHIFTS = tuple(t / 4 for t in range(-4, 9))  # as multiples of an episode's gap


def embed_images(encoder: ImageFeatures, images: LabelledImages) -> Tensor:
    """Return the features (N, d) of all images of a data set."""
    starts = range(0, len(images), 256)
    bar = tqdm(starts, desc="Embedding", unit="batch", leave=False, disable=len(starts) < 10)
    batches = (range(start, min(start + 256, len(images))) for start in bar)
    return torch.cat([encoder.embed([images[i]["image"] for i in batch]) for batch in batches])


def evaluate_heads(
    config: CoPAConfig,
    settings: Mapping[str, Any],
    episodes: Sequence[Episode],
    features: Tensor,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Train heads on cached features, many episodes at a time, and measure each episode.

    Args:
        config: of CoPA, without residual adapters.
        settings: arguments of [`~peft_ncgeo.adapt`].
        episodes: each with its support and query images.
        features: (M, d), one row for each image of the data set.
        batch_size: number of episodes trained together.

    Returns:
        One row for each episode, see [`~peft_ncgeo.protocols.few_shot`].
    """
    started = time.process_time()
    supports = [(episode.support, episode.support_labels) for episode in episodes]
    heads = fit_episodes(features, supports, batch_size, **settings, **head_settings(config))
    seconds = (time.process_time() - started) / len(episodes)
    rows = []
    for episode, pair in zip(episodes, heads, strict=True):
        support, query = features[torch.as_tensor(episode.support)], features[torch.as_tensor(episode.query)]
        rows.append({**_measure(episode, support, query, support, query, pair), "seconds": seconds})
    return rows


def evaluate_residual_adapters(
    config: CoPAConfig,
    settings: Mapping[str, Any],
    episodes: Sequence[Episode],
    features: Tensor,
    images: LabelledImages,
    model: nn.Module,
    processor: Any,
) -> list[dict[str, Any]]:
    """Train residual adapters in the backbone too, one episode at a time, and measure each episode.

    Args:
        config: of CoPA, with residual adapters.
        settings, episodes, features: see [`evaluate_heads`]; the features are those of the frozen backbone.
        images: the data set.
        model: the backbone, which is wrapped in place.
        processor: its image processor.

    Returns:
        One row for each episode, see [`~peft_ncgeo.protocols.few_shot`].
    """
    adapted = get_peft_model(model, config)
    rows = []
    for episode in tqdm(episodes, unit="episode", leave=False):
        support, query = ([images[i]["image"] for i in part.tolist()] for part in (episode.support, episode.query))
        started = time.process_time()
        classifier = adapt(adapted, support, episode.support_labels.tolist(), processor=processor, **settings)
        seconds = time.process_time() - started
        before = features[torch.as_tensor(episode.support)], features[torch.as_tensor(episode.query)]
        after = classifier.features(support), classifier.features(query)
        rows.append({**_measure(episode, *before, *after, classifier.heads), "seconds": seconds})
    return rows


def _measure(
    episode: Episode,
    support_before: Tensor,
    query_before: Tensor,
    support: Tensor,
    query: Tensor,
    heads: Heads,
) -> dict[str, Any]:
    ways = len(episode.classes)
    labels, wanted = (
        torch.as_tensor(part).to(support.device) for part in (episode.support_labels, episode.query_labels)
    )
    prototypes = class_prototypes(support, labels, ways)
    embedded = query @ heads.image, prototypes @ heads.prototype
    right = heads.scores(query, prototypes).argmax(-1) == wanted
    gap_before = modality_gap(support_before, class_prototypes(support_before, labels, ways))
    sweep = loss_against_gap(*embedded, wanted, SHIFTS)
    return {
        "ways": ways,
        "support": len(labels),
        "accuracy": 100 * float(right.float().mean()),
        "gap_before": float(gap_before),
        "gap_after": float(modality_gap(support @ heads.image, prototypes @ heads.prototype)),
        "nc1_before": _nc1(query_before, wanted, ways),
        "nc1_after": _nc1(embedded[0], wanted, ways),
        "sweep_gaps": sweep[0].tolist(),
        "sweep_losses": sweep[1].tolist(),
    }


def _nc1(features: Tensor, labels: Tensor, ways: int) -> float:
    collapse = NeuralCollapse(ways, features.shape[1])
    collapse.update(l2_normalize(features), labels)
    return float(collapse.compute()["nc1"])
