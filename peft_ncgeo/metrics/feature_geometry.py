"""Geometry of an evaluation's features, computed in one pass over its batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..geometry.alignment import alignment
from ..geometry.collapse import NeuralCollapse
from ..geometry.exponent import class_exponents, least_exponent, share_of_best
from ..geometry.simplex import gram_distance, simplex_distance_of_product
from ..geometry.sphere import l2_normalize


class FeatureGeometry:
    """Geometry of classes and classifier, from features collected batch by batch.

    | metric | meaning |
    |---|---|
    | `nc1`, `nc1_trace` | within-class variability, `tr(S_B^+ S_W)/K` and `tr(S_W)/tr(S_B)` |
    | `nc2`, `nc2_norm_spread`, `nc2_cosine` | class means against a simplex ETF |
    | `nc3`, `nc3_cosine`, `nc4` | class means against classifier weights (alignment), and their predictions |
    | `alignment` | mean over classes of `cos(w_c, mu_c)`, weights not centred, class means centred |
    | `error_exponent`, `exponent_ratio` | how fast errors vanish with the noise, and as a share of the best possible |
    | `class_exponent` | mean over classes of the error exponent of each class against its nearest other class |
    | `gram_distance` | class means against classifier weights as shapes, neither centred (Delta_G*) |
    | `modality_gap` | distance between the centres of images and texts |
    | `text_nc2` | class texts against a simplex ETF |

    See [`~peft_ncgeo.geometry.NeuralCollapse`] for the formulas. For a CLIP-like model, features are normalised, the
    classifier is the class texts, and the last two metrics are computed. For a classification model, features are
    the inputs of its head; metrics that compare them with weights need a head that is one linear layer. On several
    processes each sample is counted once.

    Args:
        nc4: True: compute `nc4`, for which all features are kept until the set is finished.

    Attributes:
        per_class: `alignment` and `error_exponent` of each class in the last evaluation, (K,); nan for classes
            without samples.
        class_means: mean feature of each class in the last evaluation, (K, d) float64; a row of nan for a class
            without samples.
        weights: the classifier's weights, (K, d) float64: unit text features, or the rows of a linear head.
    """

    def __init__(self, nc4: bool = True) -> None:
        self.nc4 = nc4
        self.per_class: dict[str, Tensor] = {}
        self.class_means: Tensor | None = None
        self.weights: Tensor | None = None
        self._collapse: NeuralCollapse | None = None

    def begin(self) -> None:
        """Start a new evaluation and drop the features of the last one."""
        self._collapse, self.per_class, self.class_means, self.weights = None, {}, None, None

    def update(self, features: Tensor, labels: Tensor, num_classes: int, reads_text: bool) -> None:
        """Add a batch of unnormalized features (B, d)."""
        features = l2_normalize(features) if reads_text else features.flatten(1).float()
        if self._collapse is None:
            self._collapse = NeuralCollapse(num_classes, features.shape[1], self.nc4)
        self._collapse.update(features, labels)

    def compute(self, text: Tensor | None, head: Any = None) -> dict[str, float]:
        """Return the metrics since `begin`, from a CLIP-like model's text features (K, d) or from a linear head."""
        if self._collapse is None:
            return {}
        counts, means = self._collapse.counts.cpu(), self._collapse.class_means.cpu()
        self.class_means = means
        if text is None and head is None:
            return self._collapse.compute()  # the head is not one linear layer
        weights = (head.weight.detach() if text is None else l2_normalize(text)).double().cpu()
        self.weights = weights
        bias = None if text is not None or head.bias is None else head.bias.detach().double().cpu()
        exponents = class_exponents(means, weights, bias)
        beta = least_exponent(exponents)
        self.per_class = {"alignment": alignment(weights, means), "error_exponent": exponents}
        metrics = {
            **self._collapse.compute(weights, bias),
            "alignment": float(self.per_class["alignment"].nanmean()),
            "error_exponent": float(beta),
            "class_exponent": float(exponents.nanmean()),
            "exponent_ratio": float(share_of_best(beta, means)),
            "gram_distance": float(gram_distance(means[counts > 0], weights[counts > 0])),
        }
        if text is not None:
            centre = (counts[:, None] * means.nan_to_num()).sum(0) / counts.sum()
            centred = weights - weights.mean(0)
            metrics["modality_gap"] = float(torch.linalg.vector_norm(centre - weights.mean(0)))
            metrics["text_nc2"] = float(simplex_distance_of_product(centred, centred))
        return metrics
