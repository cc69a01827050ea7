"""The k most probable of many names for each image, or all names above a threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..validation import check_float

_ENTRIES = 2**22  # logits in memory at a time, and numbers of text features


def best_names(logits: Callable[[Tensor], Tensor], text: Tensor, images: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k largest logits of each image, (B, k), largest first, with the names' indices and probabilities.

    Names come block by block. The probabilities are those of a softmax over all K names, `exp(logit - logsumexp)`,
    with the sum carried from block to block.

    Args:
        logits: a function that returns the logits (B, n) of n text features (n, d), float32.
        text: (K, d).
        images: B, their number.
        k: at most K.
    """
    values = text.new_empty(images, 0, dtype=torch.float32)
    numbers = torch.empty(images, 0, dtype=torch.int64, device=text.device)
    total = text.new_full((images,), -torch.inf, dtype=torch.float32)
    start = 0
    for part in text.split(max(1, _ENTRIES // max(images, text.shape[1]))):
        block = logits(part)
        total = torch.logaddexp(total, block.logsumexp(1))
        best = block.topk(min(k, len(part)))
        values = torch.cat([values, best.values], 1)
        numbers = torch.cat([numbers, best.indices + start], 1)
        values, places = values.topk(min(k, values.shape[1]))
        numbers = numbers.gather(1, places)
        start += len(part)
    return values, numbers, (values - total[:, None]).exp()


def names_above(probabilities: Tensor, names: Sequence[Any], threshold: float) -> list[list[Any]]:
    """Return for each image the names whose probabilities (N, K) reach the threshold, the most probable first."""
    order = probabilities.argsort(dim=1, descending=True, stable=True)
    found = (probabilities.gather(1, order) >= threshold).sum(1).tolist()
    return [[names[k] for k in row[:count]] for row, count in zip(order.tolist(), found, strict=True)]


def check_threshold(threshold: float) -> float:
    """Return the threshold; raise an error if it is not a probability."""
    return check_float("threshold", threshold, "a probability, 0 to 1", lambda share: 0 <= share <= 1)
