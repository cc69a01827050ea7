"""Batches of training images: classes drawn equally often, and each image counted once on several processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from numpy.typing import ArrayLike
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import TrainingArguments


class ClassBalancedSampler(Sampler[tuple[int, int]]):
    """Sampler that draws a class (all equally likely), then one of its samples, as many times as there are samples.

    It draws with replacement. The draws depend only on (seed, epoch), so every process and a resumed run see the same
    order. It yields (index, number of earlier draws in this epoch), so that augmentation shows a rare image in
    several views.

    Args:
        labels: class of each sample, (N,).
        seed: seed of all draws.
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


class EvenBatches(BatchSampler):
    """Batches for several processes, which take turns: every process gets the same number, all of one size.

    Accelerate fills up the last batches with images from the start of the epoch, which then count twice. Here None
    fills them up: it gives a row that [`~peft_ncgeo.training.gathering.gather_batch`] removes again.

    Args:
        batches: all batches of an epoch; the last one may be shorter.
        processes: number of processes that take turns.
    """

    def __init__(self, batches: BatchSampler, processes: int) -> None:
        super().__init__(batches.sampler, batches.batch_size, drop_last=False)
        self.processes = processes

    def __len__(self) -> int:
        return -(-super().__len__() // self.processes) * self.processes

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in super().__iter__():
            yield batch + [None] * (self.batch_size - len(batch))
        for _ in range(len(self) - super().__len__()):
            yield [None] * self.batch_size


def count_samples_once(loader: DataLoader[Any]) -> None:
    """Make each image of an epoch count once in a loader that Accelerate prepared for several processes."""
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard) and not shard.drop_last:
        shard.batch_sampler = EvenBatches(shard.batch_sampler, 1 if shard.split_batches else shard.num_processes)


@contextmanager
def drop_last_only(args: TrainingArguments, is_training: bool) -> Iterator[None]:
    """Apply `dataloader_drop_last` only to training loaders inside this context, so that every image is evaluated."""
    given, args.dataloader_drop_last = args.dataloader_drop_last, args.dataloader_drop_last and is_training
    try:
        yield
    finally:
        args.dataloader_drop_last = given


def check_batches(loader: DataLoader[Any], batch_size: int, processes: int, least: int, drop_last: bool) -> None:
    """Raise an error if a training loader drops every image, or has a batch of fewer than `least` images."""
    if len(loader) == 0:
        several = f" on each of {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"dataloader_drop_last=True leaves nothing to train on: there are fewer images than one batch of "
            f"{batch_size}{several}. Lower per_device_train_batch_size, or set dataloader_drop_last=False."
        )
    dataset: Any = loader.dataset
    whole = batch_size * processes
    last = whole if drop_last else len(dataset) % whole or whole
    if last < least:
        raise ValueError(
            f"A batch norm is trained, but a batch has {last} image, too few to compute statistics; set "
            "dataloader_drop_last=True, or another per_device_train_batch_size."
        )
