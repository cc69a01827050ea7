"""Sampling that shows every class equally often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from numpy.typing import ArrayLike
from torch.utils.data import Sampler


class ClassBalancedSampler(Sampler[tuple[int, int]]):
    """As many draws as there are samples, each of a class drawn evenly, then of a sample of that class.

    Drawn with replacement from (seed, epoch) alone, so every process and a resumed run see the same order. Yields
    (index, how often it was drawn before in this epoch), so that augmentation shows a rare image in several views.

    Args:
        labels: class of each sample, (N,).
        seed: of all draws.
    """

    def __init__(self, labels: ArrayLike, seed: int = 0) -> None:
        classes = torch.as_tensor(labels)
        self.weights = 1 / torch.bincount(classes).clamp_min(1).double()[classes]
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        before: Counter[int] = Counter()
        for index in torch.multinomial(self.weights, len(self), replacement=True, generator=generator).tolist():
            yield index, before[index]
            before[index] += 1
