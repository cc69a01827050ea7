"""Loss terms of CPT (https://arxiv.org/abs/2605.11939)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..geometry.clusters import cluster_features
from ..geometry.simplex import (
    clustered_etf_deviation,
)
from ..geometry.sphere import l2_normalize
from ..validation import check_int
from .base import GeometryBatch, Regularizer
from .npt import _TextSimplex


class RotationStabilization(Regularizer):
    r"""CPT's rotation stabilisation: class texts keep their positions on the sphere.

    .. math:: L = \frac1K \sum_c \|\hat g_c - \hat g^0_c\|_1

    | field | shape |
    |---|---|
    | text_features, frozen_text_features | (K, d) |

    Args:
        weight, budget, name, step_size, max_step: see [`Regularizer`]. The paper's weight is 0.10.

    Raises:
        ValueError: a field is missing or not finite; the message names it.

    Relations: d times PromptSRC's text term.

    Reference: B. Guo et al., Cluster-Aware Neural Collapse Prompt Tuning, CVPR 2026, arXiv 2605.11939.

    Example: `RotationStabilization(weight=0.10)`
    """

    default_name = "rotation"
    requires = ("frozen_text_features",)
    reads_labels = False

    def forward(self, batch: GeometryBatch) -> Tensor:
        text, frozen = batch.need("text_features", "frozen_text_features")
        return (l2_normalize(text) - l2_normalize(frozen)).abs().sum(-1).mean()


class ClusterCollapse(_TextSimplex):
    r"""CPT's textual ETF within clusters: class texts move away only from their semantic neighbours.

    .. math:: L = \frac{1}{M'} \sum_m \frac{1}{k_m(k_m-1)} \sum_{i \ne j \in m}
              \left(\hat g_i \cdot \hat g_j + \frac{1}{k_m-1}\right)^2

    over the M' clusters of two classes or more (reduction "mean", ours). "sum" is the paper's formula without its
    constant diagonal: the sum of the inner sums, divided by the number M of all clusters. Process 0 computes the
    clusters at the first call, by k-means on the frozen text features; they do not change later, and checkpoints hold
    them. Clusters of one class count as 0; if all clusters have one class, the loss is 0, attached to the graph.

    | field | shape |
    |---|---|
    | text_features, frozen_text_features | (K, d) |

    Args:
        weight, budget, name, step_size, max_step: see [`Regularizer`]. The paper's weight is 0.25.
        num_clusters: M. Default: `ceil(K / 16)` (our reading).
        reduction: "mean" or "sum".
        seed: seed of k-means.

    Raises:
        ValueError: `num_clusters` is outside 1..K, reduction is unknown, the number of classes differs from the first
            call's, or a field, which the message names, is missing or not finite.

    Warns: once, if a cluster has more than d + 1 classes, and if two texts are equal.

    Relations: with one cluster and "mean", this is [`LanguageCollapse`]. CPT adds `ModalityIsomorphism(0.15)` and
    `RotationStabilization(0.10)`.

    Reference: B. Guo et al., Cluster-Aware Neural Collapse Prompt Tuning, CVPR 2026, arXiv 2605.11939.

    Example: `ClusterCollapse(weight=0.25)`
    """

    default_name = "cluster_collapse"
    requires = ("frozen_text_features",)
    reads_labels = False
    clusters: Tensor

    def __init__(
        self,
        weight: float | Callable[[float], float] | None = None,
        budget: float | None = None,
        num_clusters: int | None = None,
        reduction: str = "mean",
        seed: int = 0,
        name: str | None = None,
        step_size: float = 0.3,
        max_step: float | None = None,
    ) -> None:
        super().__init__(weight, budget, name, step_size, max_step)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r} must be 'mean' or 'sum'.")
        self.num_clusters = None if num_clusters is None else check_int("num_clusters", num_clusters, least=1)
        self.reduction, self.seed = reduction, check_int("seed", seed, least=0)
        self.register_buffer("clusters", torch.empty(0, dtype=torch.int64))  # (K,) after the first call

    def forward(self, batch: GeometryBatch) -> Tensor:
        (text,) = batch.need("text_features")
        self._look(text)
        if not len(self.clusters):
            self._find_clusters(batch.need("text_features", "frozen_text_features")[1])
        if len(self.clusters) != len(text):
            raise ValueError(
                f"{self.name} has clusters of {len(self.clusters)} classes, but the batch has {len(text)}; make a new "
                "loss for a new list of classes."
            )
        return clustered_etf_deviation(text, self.clusters.to(text.device), self.reduction)

    def _find_clusters(self, frozen: Tensor) -> None:
        number = math.ceil(len(frozen) / 16) if self.num_clusters is None else self.num_clusters
        clusters = torch.empty(len(frozen), dtype=torch.int64, device=frozen.device)
        several = dist.is_available() and dist.is_initialized()
        if not several or dist.get_rank() == 0:
            clusters = cluster_features(frozen, number, self.seed)
        if several:
            dist.broadcast(clusters, 0)
        self.clusters = clusters
        self._warn_of_floor(int(clusters.bincount().max()), frozen.shape[1])
