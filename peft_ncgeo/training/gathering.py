"""Batches gathered from all processes; gradients return to the process of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.images import counted_rows


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def batch_sizes(labels: Tensor) -> list[int]:
    """Return the number of rows of the batch that count on each process, in order of rank.

    Args:
        labels: (B_own,) or (B_own, K), with -100 in last rows that only fill up the batch, see [`EvenBatches`].
    """
    return step_sizes([labels])[0]


def step_sizes(labels: Sequence[Tensor]) -> list[list[int]]:
    """Return [`batch_sizes`] of all micro-batches of a step, with one exchange between processes."""
    if world_size() == 1:
        return [[len(own)] for own in labels]
    own = torch.stack([counted_rows(rows).sum() for rows in labels])
    sizes = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(sizes, own)
    return torch.stack(sizes, dim=1).tolist()


def gather_batch(tensor: Tensor, sizes: list[int]) -> Tensor:
    """Return the rows of all processes in order of rank: `(B_own, ...)` to `(B, ...)`, differentiable.

    The backward pass sums the gradients of all processes and returns this process's rows. Every process computes the
    same loss of the global batch, so with DDP's mean over processes the parameters get the gradient of a single
    process.

    Args:
        tensor: this process's rows; their number may differ between processes. Rows beyond this process's size are
            left out and get a gradient of zero.
        sizes: result of [`batch_sizes`], the same for all tensors of a batch.
    """
    return tensor if len(sizes) == 1 else _GatherBatch.apply(tensor[: sizes[dist.get_rank()]], sizes)


class _GatherBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])  # all_gather needs equal shapes
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0].contiguous().clone()
        dist.all_reduce(grad, op=dist.ReduceOp.SUM)
        start = sum(ctx.sizes[: dist.get_rank()])
        return grad[start : start + ctx.sizes[dist.get_rank()]], None
