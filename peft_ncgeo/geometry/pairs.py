"""Numbers over all pairs of K classes, by matrix products of one block of rows at a time, in O(Kd) memory.

The nearest of all pairs is exact. Products of rows lose digits if rows are nearly equal, so they are only used to
exclude pairs, with a bound on their rounding; the other pairs, usually one for each class, are computed from
differences of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

_ENTRIES = 2**20  # of a block, in numbers


def block_rows(num_classes: int) -> int:
    """Return the number of rows in a block of a matrix with K columns; at most 4,096."""
    return max(1, min(4096, _ENTRIES // num_classes))


def nearest_rivals(means: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """Return for each class the other class, (K,) int64, whose boundary is nearest to its mean; see [`boundary`].

    Args:
        means, weights: (K, d), K >= 2.
        bias: (K,).
    """
    with torch.no_grad():
        rows = weights - weights.mean(0)  # boundaries depend on differences of rows only
        lengths, squares = torch.linalg.vector_norm(rows, dim=1), rows.square().sum(1)
        own = (rows * means).sum(1) + bias
        return torch.cat(
            [
                _block_rivals(means, weights, bias, rows, lengths, squares, own, block)
                for block in torch.arange(len(rows), device=rows.device).split(block_rows(len(rows)))
            ]
        )


def _block_rivals(
    means: Tensor,
    weights: Tensor,
    bias: Tensor,
    rows: Tensor,
    lengths: Tensor,
    squares: Tensor,
    own: Tensor,
    block: Tensor,
) -> Tensor:
    mu, eps = means[block], _rounding(rows)
    margin = torch.addmm(own[block, None] - bias, mu, rows.T, alpha=-1)
    square = torch.addmm(squares[block, None] + squares, rows[block], rows.T, alpha=-2)
    reach = lengths[block] + lengths.max()
    margin_error = eps * (torch.linalg.vector_norm(mu, dim=1) * reach + 2 * bias.abs().max())[:, None]
    square_error = (eps * reach.square() + torch.finfo(rows.dtype).tiny)[:, None]

    unclear = ~(square > square_error)  # perhaps equal rows
    ratio = (margin.clamp_min(0).square_() / square).masked_fill_(unclear, 0).clamp_max_(torch.finfo(rows.dtype).max)
    ratio.scatter_(1, block[:, None], torch.inf)  # no class is its own rival
    rivals = ratio.argmin(1)
    found = boundary(means, weights, bias, block, rivals)
    lowest = margin.sub_(margin_error).clamp_min_(0).square_()
    limit = square.add_(square_error).mul_(found.square()[:, None]).add_(torch.finfo(rows.dtype).tiny)
    left = (~(lowest > limit)).logical_or_(unclear).logical_and_((found > 0)[:, None])  # also what is not finite
    left.scatter_(1, block[:, None], False)

    of, others = left.nonzero(as_tuple=True)
    values = _in_parts(partial(boundary, means, weights, bias), block[of], others, rows.shape[1])
    found.scatter_reduce_(0, of, values, "amin")
    best = values == found[of]
    rivals[of[best]] = others[best]
    return rivals


def boundary(means: Tensor, weights: Tensor, bias: Tensor, of: Tensor, others: Tensor) -> Tensor:
    """Return the distance of mu_c from the boundary to class c', for pairs of classes (n,) and (n,).

    `[<w_c - w_c', mu_c> + b_c - b_c']_+ / ||w_c - w_c'||`; 0 for equal rows, and on the wrong side.
    """
    difference = weights[of] - weights[others]
    distance = torch.linalg.vector_norm(difference, dim=1)
    margin = (difference * means[of]).sum(1) + bias[of] - bias[others]
    reach = margin.clamp_min(0) / distance.where(distance > 0, torch.ones_like(distance))
    return reach.where(distance > 0, torch.zeros_like(reach))


def least_distance(points: Tensor) -> Tensor:
    """Return the smallest distance between two of the points (K, d), K >= 2."""
    with torch.no_grad():
        rows = points - points.mean(0)
        squares = rows.square().sum(1)
        error = 4 * _rounding(rows) * squares.max() + torch.finfo(rows.dtype).tiny
        pair, least = torch.tensor([[0], [1]], device=rows.device), torch.inf
        for below, block in _lower_blocks(len(points), rows.device):
            before = int(block[-1])
            square = torch.addmm(squares[block, None] + squares[:before], rows[block], rows[:before].T, alpha=-2)
            square.masked_fill_(~below, torch.inf)
            place = int(square.argmin())
            start = block[place // before][None], torch.tensor([place % before], device=rows.device)
            least = min(least, float(_distance(points, *start)))
            of, others = (~(square - error > least**2)).logical_and_(below).nonzero(as_tuple=True)
            values = _in_parts(partial(_distance, points), block[of], others, rows.shape[1])
            if len(values) and values.min() <= least:
                place = int(values.argmin())
                pair, least = torch.stack([block[of[place]], others[place]])[:, None], float(values[place])
            if not least:
                break
    return _distance(points, *pair)[0]


def _distance(points: Tensor, of: Tensor, others: Tensor) -> Tensor:
    return torch.linalg.vector_norm(points[of] - points[others], dim=1)


def mean_cosine_deviation(directions: Tensor) -> Tensor:
    """Return the mean over pairs of K >= 2 unit rows of `|cos + 1/(K-1)|`, 0 for a simplex ETF."""
    k, total = len(directions), directions.new_zeros(())
    for below, block in _lower_blocks(k, directions.device):
        deviations = (directions[block] @ directions[: int(block[-1])].T).add_(1 / (k - 1)).abs_()
        total += deviations.masked_fill_(~below, 0).sum()
    return total / (k * (k - 1) / 2)


@torch.no_grad()
def most_alike(directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest cosine between two of K >= 2 unit rows, and the indices of the two rows, (2,)."""
    best, pair = directions.new_tensor(-torch.inf), torch.tensor([0, 1], device=directions.device)
    for below, block in _lower_blocks(len(directions), directions.device):
        before = int(block[-1])
        cosines = (directions[block] @ directions[:before].T).masked_fill_(~below, -torch.inf)
        place = cosines.argmax()
        here, found = torch.stack([place % before, block[place // before]]), cosines.flatten()[place]
        pair, best = here.where(found > best, pair), found.maximum(best)
    return best, pair


def _lower_blocks(k: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of row numbers 1..K-1, with masks of the columns to the left of each row's diagonal entry."""
    for block in torch.arange(1, k, device=device).split(block_rows(k)):
        yield torch.arange(int(block[-1]), device=device) < block[:, None], block


def _in_parts(value: Callable[[Tensor, Tensor], Tensor], of: Tensor, others: Tensor, dim: int) -> Tensor:
    """Return the value of each pair, with differences (n, d) of few pairs in memory at a time."""
    pairs = zip(*(index.split(block_rows(dim)) for index in (of, others)), strict=True)
    return torch.cat([value(*pair) for pair in pairs])


def _rounding(rows: Tensor) -> float:
    """Return a bound on the rounding of an inner product of d numbers and of its terms, relative to the lengths."""
    return 4 * (rows.shape[1] + 8) * torch.finfo(rows.dtype).eps
