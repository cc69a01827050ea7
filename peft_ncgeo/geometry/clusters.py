"""K-means on the sphere."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from ..validation import check_int
from .checks import check_finite, check_shape
from .sphere import l2_normalize
from .transport import without_warnings

_RESTARTS = 10


def cluster_features(features: Tensor, num_clusters: int, seed: int = 0) -> Tensor:
    """Cluster normalised features by K-means: keep the best of ten k-means++ starts, in float64 on the CPU.

    Args:
        features: `(K, d)`.
        num_clusters: number of clusters, at most K. The result may have fewer, since empty clusters are removed.
        seed: seed of the starts; equal seeds give equal clusters.

    Returns:
        Cluster numbers `(K,)` int64 from 0 without gaps, in order of first appearance, on the device of `features`.

    Raises:
        ValueError: `num_clusters` is below 1 or above K, or features are not finite.
    """
    check_shape("features", features, "K", "d")
    check_finite("features", features)
    num_clusters, seed = check_int("num_clusters", num_clusters), check_int("seed", seed, least=0)
    if not 1 <= num_clusters <= len(features):
        raise ValueError(
            f"num_clusters={num_clusters} must be at least 1 and at most {len(features)}, the number of classes."
        )
    points = l2_normalize(features.detach().double()).cpu().numpy()
    rng, best, labels = np.random.default_rng(seed), np.inf, np.zeros(len(points), dtype=int)
    for _ in range(_RESTARTS):
        with without_warnings():  # of empty clusters, which are removed below
            centres, found = kmeans2(points, num_clusters, minit="++", seed=rng)
        spread = np.square(points - centres[found]).sum()
        if spread < best:
            best, labels = spread, found
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    return torch.from_numpy(order[inverse]).to(features.device)
