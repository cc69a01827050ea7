"""Restart of a training with a smaller batch after memory ran out."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .files import Stateful


class TrainingSnapshot:
    """Copy of everything that a training changes, made before its first step and kept in the host's memory.

    With `auto_find_batch_size`, Transformers starts again, but after steps that already changed the model. If this
    copy is restored first, the second try gives the result of a training that started with the smaller batch.

    Args:
        model: model whose trained parameters and buffers are copied.
        owners: losses, class means and callbacks with a state.
        tools: optimiser and scheduler; None for one that does not exist yet.
    """

    def __init__(self, model: nn.Module, owners: Sequence[Stateful], *tools: Any) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._tensors = [(own, own.detach().to("cpu", copy=True)) for own in (*trained, *model.buffers())]
        self._states = [(own, _copied(own.state_dict())) for own in owners]
        self._tools = [(tool, None if tool is None else deepcopy(tool.state_dict())) for tool in tools]

    @torch.no_grad()
    def restore(self) -> list[Any]:
        """Restore everything, and return the tools."""
        for tensor, value in self._tensors:
            tensor.copy_(value)
        for owner, state in self._states:
            owner.load_state_dict(_copied(state))
        for tool, saved in self._tools:
            if tool is not None:
                tool.load_state_dict(deepcopy(saved))
        return [tool for tool, _ in self._tools]


def _copied(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}
