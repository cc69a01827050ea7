"""Batch norm over the images of all processes, without the rows that only fill up a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_COUNTED: ContextVar[Tensor | None] = ContextVar("counted", default=None)


@contextmanager
def rows_that_count(rows: Tensor) -> Iterator[None]:
    """Let every [`SharedBatchNorm`] inside this context compute its statistics from these rows only.

    Args:
        rows: (B,), True for a row that counts. All rows are normalised.
    """
    token = _COUNTED.set(rows)
    try:
        yield
    finally:
        _COUNTED.reset(token)


class SharedBatchNorm(nn.BatchNorm1d):
    """`BatchNorm1d` of features (B, d) with the statistics of the batch over all processes.

    So several processes normalise like a single one, and their running statistics are equal. (Torch's `SyncBatchNorm`
    does not run on CPUs, and counts every row.) On one process it equals `BatchNorm1d`. Each micro-batch of a step has
    its own statistics.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, features: Tensor) -> Tensor:
        rows, shared = _COUNTED.get(), dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not (self.training and shared):
            return super().forward(features)
        with torch.autocast(features.device.type, enabled=False):
            x = features.to(self.weight.dtype)
            counted = x.new_ones(len(x), 1) if rows is None else rows[:, None].to(x)
            count = _sum_of_processes(counted.sum())
            mean = _sum_of_processes((counted * x).sum(0)) / count
            variance = _sum_of_processes((counted * (x - mean).square()).sum(0)) / count
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1).clamp_min(1), self.momentum)
            normalised = (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
        return normalised.to(features.dtype)


def _sum_of_processes(value: Tensor) -> Tensor:
    total: Tensor = _SumOfProcesses.apply(value)
    return total


class _SumOfProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; the backward pass sums the gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        total = grad_outputs[0].clone()
        dist.all_reduce(total)
        return total
