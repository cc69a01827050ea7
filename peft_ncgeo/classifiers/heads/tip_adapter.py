"""Tip-Adapter: a cache of support features, added to the texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...geometry.sphere import l2_normalize
from ...validation import check_bool, check_int, check_non_negative, check_positive
from .base import FeatureHead, State, Support, as_state
from .leave_one_out import best_setting, left_out_images

# One grid for all data: 20 values each, from the smallest to the largest that the authors try on any data set.
GRID = tuple(0.1 * 500 ** (i / 19) for i in range(20))
_BATCH, _EPS, _WEIGHT_DECAY = 256, 1e-4, 0.01


@dataclass(frozen=True)
class TipAdapter(FeatureHead):
    r"""Tip-Adapter and Tip-Adapter-F: `s x^ . t^_c + alpha sum_i exp(-beta (1 - x^ . k_i)) [y_i = c]`.

    A key k_i is the mean feature of an image's views, normalised after the mean. New class names get only their
    texts; trained names keep their keys.

    The authors choose alpha and beta for each data set, on the test set of ImageNet and on the full validation split
    of the others, and the epoch of -F on the test set. Here they are chosen by leaving one support image out, on one
    grid for all data; the first of equally good pairs is taken. Keys are then trained with them, and those of the last
    epoch are used. With two images in each class the choice favours the texts, since the class of the left-out image
    has half as many keys as the others.

    Args:
        train_keys: train the keys too (Tip-Adapter-F), on the cached views: AdamW, cosine per step, batches of 256.
            Trained keys are not normalised again, as in the authors' code.
        alpha, beta: weight and sharpness of the cache. Default: chosen as above. They must be given if each class has
            one image: the authors start from 1.17 and 1.0.
        epochs, lr: number of epochs and learning rate of the training of the keys.

    Reference: R. Zhang et al., ECCV 2022, arXiv 2207.09519.
    """

    train_keys: bool = False
    alpha: float | None = None
    beta: float | None = None
    epochs: int = 20
    lr: float = 1e-3

    takes_new_names: ClassVar[bool] = True
    tensors: ClassVar[Mapping[str, str]] = {
        **{"text": "kd", "keys": "md", "labels": "m"},
        **{"alpha": "", "beta": "", "scale": ""},
    }

    def __post_init__(self) -> None:
        check_bool("train_keys", self.train_keys)
        for name in ("alpha", "beta"):
            if getattr(self, name) is not None:
                check_non_negative(name, getattr(self, name))
        check_int("epochs", self.epochs, least=1)
        check_positive("lr", self.lr)

    def fit(self, support: Support) -> tuple[State, dict[str, float]]:
        keys = l2_normalize(support.features.mean(0))
        (alpha, beta), measured = self._choose(support, keys)
        if self.train_keys:
            keys = self._train(support, keys, alpha, beta)
            measured = {}  # it was the accuracy of the untrained keys
        text = support.scale * l2_normalize(support.texts)
        numbers = {"alpha": alpha, "beta": beta}
        state = as_state(keys, text=text, keys=keys, labels=support.labels, scale=support.scale, **numbers)
        return state, {**measured, **numbers}

    def logits(self, state: State, features: Tensor) -> Tensor:
        x = l2_normalize(features)
        zero_shot = x @ state["text"].T
        return zero_shot + state["alpha"] * cache_logits(
            x @ state["keys"].T, state["labels"], zero_shot, state["beta"]
        )

    def for_names(self, state: State, trained: Tensor, texts: Tensor) -> State:
        """Return a state for other names, without the keys of classes that are not among them."""
        places = trained.new_full((len(state["text"]),), -1)
        known = trained >= 0
        places[trained[known]] = known.nonzero().flatten()
        labels = places[state["labels"]]
        kept = labels >= 0
        text = state["scale"] * l2_normalize(texts.to(state["text"].dtype))
        text[known] = state["text"][trained[known]]
        return {**state, "text": text, "keys": state["keys"][kept], "labels": labels[kept]}

    def _choose(self, support: Support, keys: Tensor) -> tuple[tuple[float, float], dict[str, float]]:
        """Return alpha and beta, and the accuracy on the first view of each image without the image's own key."""
        alphas, betas = ([float(value)] if value is not None else GRID for value in (self.alpha, self.beta))
        mend = f"{type(self).__name__}(alpha=..., beta=...)"
        images = left_out_images(support.labels, "alpha and beta are", len(alphas) * len(betas), mend)
        queries = support.features[0, images]
        similarity = l2_normalize(queries) @ keys.T
        similarity[torch.arange(len(images)), images] = -math.inf
        zero_shot = support.text_logits(queries)

        def candidates() -> Iterator[tuple[tuple[float, float], Tensor]]:
            for beta in betas:
                cache = cache_logits(similarity, support.labels, zero_shot, beta)
                for alpha in alphas:
                    yield (alpha, beta), zero_shot + alpha * cache

        return best_setting(candidates(), support.labels[images])

    def _train(self, support: Support, keys: Tensor, alpha: float, beta: float) -> Tensor:
        """Return keys trained on one random view of each image in each epoch."""
        views, count = support.features.shape[:2]
        draws = torch.Generator().manual_seed(support.seed)
        keys = keys.clone().requires_grad_()
        optimizer = torch.optim.AdamW([keys], lr=self.lr, eps=_EPS, weight_decay=_WEIGHT_DECAY)
        steps = self.epochs * math.ceil(count / _BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(self.epochs):
            view = torch.randint(views, (count,), generator=draws)
            for batch in torch.randperm(count, generator=draws).split(_BATCH):
                x = l2_normalize(support.features[view[batch], batch])
                zero_shot = support.text_logits(x)
                logits = zero_shot + alpha * cache_logits(x @ keys.T, support.labels, zero_shot, beta)
                optimizer.zero_grad()
                F.cross_entropy(logits, support.labels[batch]).backward()
                optimizer.step()
                schedule.step()
        return keys.detach()


def cache_logits(similarity: Tensor, labels: Tensor, like: Tensor, beta: float | Tensor) -> Tensor:
    """Return the cache's share of the logits, `sum_i exp(-beta (1 - a_i)) [y_i = c]` (B, K).

    Args:
        similarity: cosines a (B, M) of queries and keys.
        labels: (M,), classes of the keys.
        like: logits (B, K), for shape and type.
    """
    return torch.zeros_like(like).index_add(1, labels, (beta * (similarity - 1)).exp())
