"""Training objective: the classification loss plus every term times its factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import GeometryBatch, Regularizer
from .checks import check_term, check_total


@dataclass
class Objective:
    """Value of the objective on one batch, and its parts by name, without gradient."""

    total: Tensor
    noted: dict[str, Tensor] = field(default_factory=dict)  # for the log
    constrained: dict[str, Tensor] = field(default_factory=dict)  # the part of each term that its budget limits


def objective(
    batch: GeometryBatch, classification_loss: nn.Module | None, losses: Sequence[Regularizer], step: int
) -> Objective:
    """Add up the terms of a batch.

    Raises:
        ValueError: a term is not a scalar.
        FloatingPointError: a term or the sum is not finite; the message names `step`.
    """
    logits: Any = batch.logits  # of every model
    result = Objective(torch.zeros((), device=logits.device))
    if classification_loss is None:
        # DDP waits for the gradients of all parameters, also of a tower that no term reads
        result.total = result.total + 0 * batch.need("logits")[0].sum()
    else:
        name, value = getattr(classification_loss, "name", "ce"), classification_loss(batch)
        check_term(name, value.detach(), step)
        result.total = result.total + value
        result.noted[f"loss/{name}"] = value.detach()
    for loss in losses:
        value = loss(batch)
        check_term(loss.name, value.detach(), step)
        factor = loss.factor(batch.progress or 0.0)
        result.total = result.total + factor * value
        result.noted |= {f"loss/{loss.name}": value.detach(), f"lambda/{loss.name}": torch.as_tensor(factor)}
        result.noted |= {key: metric.detach() for key, metric in loss.metrics.items()}
        if loss.budget is not None:
            constrained = result.constrained[loss.name] = loss.constrained(value).detach()
            loss.check_constrained(constrained)
    check_total(result.total.detach(), step)
    return result
