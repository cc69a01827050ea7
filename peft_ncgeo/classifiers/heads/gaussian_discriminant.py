"""Gaussian discriminant analysis added to the texts, in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...geometry.sphere import l2_normalize
from ...validation import check_bool, check_int, check_non_negative, short_repr
from .base import FeatureHead, State, Support, as_state
from .gaussian import GaussianFit, shrunk_precision
from .leave_one_out import best_setting, left_out_images

GRID = tuple(10.0**power for power in range(-4, 3))  # the grid of the authors' code
_COPIES = 16  # of a new name's text in the mean of its class


@dataclass(frozen=True)
class GaussianDiscriminant(FeatureHead):
    r"""Gaussian discriminant analysis: `s x^ . t^_c + alpha (x^ . w_c + b_c)`, with one precision P for all classes.

    From the n unit features of all views, with class means mu_c and scatter S within the classes,
    `P = d (S + tr(S) / (n - 1) I)^-1`, `w_c = P mu_c`, `b_c = log pi_c - mu_c . P mu_c / 2`. Nothing is trained.

    The authors choose alpha for each data set, on the test set of ImageNet and on the full validation split of the
    others. Here it is chosen from 1e-4, 1e-3, ..., 100 by leaving one support image out with all its views, exactly
    and in closed form; the first of equally good values is taken.

    New class names: the mean of a new class is the mean of the `neighbors` support features nearest to its text and 16
    copies of the text. A saved head therefore holds all support features, V N d numbers.

    Args:
        alpha: weight of the discriminant. Default: chosen as above. It must be given if each class has one image.
        prior: "uniform", as in the paper; or "counts", for long tails: pi_c is the class's share of the images. A new
            name counts as an average class.
        neighbors: number of support features in the mean of a new class.
        published_precisions: as in the authors' base-to-new experiments, base classes use the pseudo-inverse of their
            mean covariance, and new classes the mean of the shrunk precisions around their own texts. It needs alpha.
            Default: P for all, so that the logits of both have one scale.

    Reference: Z. Wang et al., ICLR 2024, arXiv 2402.04087.
    """

    alpha: float | None = None
    prior: str = "uniform"
    neighbors: int = 64
    published_precisions: bool = False

    takes_new_names: ClassVar[bool] = True
    tensors: ClassVar[Mapping[str, str]] = {
        **{"text": "kd", "weight": "kd", "offset": "k", "log_prior": "k", "features": "nd", "precision": "dd"},
        **{"alpha": "", "scale": ""},
    }

    def __post_init__(self) -> None:
        if self.alpha is not None:
            check_non_negative("alpha", self.alpha)
        if self.prior not in ("uniform", "counts"):
            raise ValueError(f"prior={short_repr(self.prior)} must be 'uniform' or 'counts'.")
        check_int("neighbors", self.neighbors, least=1)
        if check_bool("published_precisions", self.published_precisions) and self.alpha is None:
            raise ValueError(
                "published_precisions=True needs alpha; pass a value, such as one chosen on validation images."
            )

    def fit(self, support: Support) -> tuple[State, dict[str, float]]:
        fitted = GaussianFit(l2_normalize(support.features.double()), support.labels, len(support.texts))
        precision = fitted.inverse_of_mean_covariance() if self.published_precisions else fitted.precision()
        counts = torch.bincount(support.labels).double()
        log_prior = self._log_prior(counts)
        alpha, measured = float(self.alpha or 0), dict[str, float]()
        if not self.published_precisions:
            alpha, measured = self._choose(support, fitted, counts)
        weight = fitted.means @ precision
        state = as_state(
            support.features,
            text=support.scale * l2_normalize(support.texts),
            weight=weight,
            offset=-(weight * fitted.means).sum(-1) / 2,
            log_prior=log_prior,
            features=support.samples()[0],
            precision=precision,
            alpha=alpha,
            scale=support.scale,
        )
        return state, {**measured, "alpha": alpha}

    def logits(self, state: State, features: Tensor) -> Tensor:
        alpha, x = state["alpha"], l2_normalize(features)
        weight = state["text"] + alpha * state["weight"]
        return x @ weight.T + alpha * (state["offset"] + state["log_prior"])

    def for_names(self, state: State, trained: Tensor, texts: Tensor) -> State:
        """Return a state for other names; their priors sum to 1."""
        new = trained < 0
        asked = super().for_names(state, trained.clamp_min(0), texts)
        if new.any():
            words = l2_normalize(texts[new].double())
            weight, offset = self._new_classes(state, words)
            asked["text"][new] = (state["scale"] * words).to(asked["text"].dtype)
            asked["weight"][new], asked["offset"][new] = (part.to(asked["weight"].dtype) for part in (weight, offset))
            asked["log_prior"][new] = -torch.tensor(float(len(state["text"]))).log()
        asked["log_prior"] = asked["log_prior"].log_softmax(-1)
        return asked

    def _new_classes(self, state: State, words: Tensor) -> tuple[Tensor, Tensor]:
        """Return w (M, d) and the offsets (M,) of new classes with unit texts (M, d), in float64."""
        features = state["features"].double()
        count = min(self.neighbors, len(features))
        near = features[(words @ features.T).topk(count).indices]  # (M, k, d)
        means = (near.sum(1) + _COPIES * words) / (count + _COPIES)
        precision = state["precision"].double()
        if self.published_precisions:
            around = near - words[:, None]
            precision = torch.stack([shrunk_precision(part.T @ part, count) for part in around]).mean(0)
        weight = means @ precision
        return weight, -(weight * means).sum(-1) / 2

    def _log_prior(self, counts: Tensor) -> Tensor:
        """Return log pi (..., K) for numbers of images (..., K)."""
        return (counts if self.prior == "counts" else torch.ones_like(counts)).log().log_softmax(-1)

    def _choose(self, support: Support, fitted: GaussianFit, counts: Tensor) -> tuple[float, dict[str, float]]:
        grid = GRID if self.alpha is None else [float(self.alpha)]
        images = left_out_images(support.labels, "alpha is", len(grid), f"{type(self).__name__}(alpha=...)")
        labels = support.labels[images]
        own = torch.nn.functional.one_hot(labels, len(counts))
        scores = fitted.leave_one_out(images) + self._log_prior(counts - own)
        zero_shot = support.text_logits(support.features[0, images]).double()

        def candidates() -> Iterator[tuple[float, Tensor]]:
            for alpha in grid:
                yield alpha, zero_shot + alpha * scores

        return best_setting(candidates(), labels)
