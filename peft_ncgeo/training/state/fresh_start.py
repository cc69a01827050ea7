"""Initial losses and callbacks for each training, for the case that `model_init` makes a new model each time."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import number_of_arguments

from ...losses import Regularizer
from ..checks import list_losses, with_label_smoothing


class LossFactory:
    """Maker of the losses of each training, from those passed to a trainer.

    Args:
        losses: one term, several terms, or a function from a trial to them.
        classification_loss: a module, None, or a function from a trial to one of these.
        copied: True: each training gets copies, so that no state reaches the next training.
        label_smoothing: Trainer's `label_smoothing_factor`, for the classification loss.
    """

    def __init__(self, losses: Any, classification_loss: Any, copied: bool, label_smoothing: float = 0.0) -> None:
        self.losses, self.classification_loss, self.copied = losses, classification_loss, copied
        self.label_smoothing = label_smoothing

    def for_trial(self, trial: Any) -> tuple[list[Regularizer], nn.Module | None]:
        """Return the terms and the classification loss of one training; `trial` is None outside a search."""
        losses, classification_loss = (self._make(given, trial) for given in (self.losses, self.classification_loss))
        return list_losses(losses), with_label_smoothing(classification_loss, self.label_smoothing)

    def _make(self, given: Any, trial: Any) -> Any:
        if not self.copied:
            return given
        if callable(given) and not isinstance(given, nn.Module | type):
            return given(trial) if number_of_arguments(given) else given()
        return deepcopy(given)


class CallbackStates:
    """State of each callback before its first training.

    The state is the one that a checkpoint holds: `state()["attributes"]` of Transformers' `ExportableState`, or
    `state_dict()`. Other callbacks reset themselves in `on_train_begin`.
    """

    def __init__(self) -> None:
        # the callback is kept, so that no other object gets its id
        self._first: dict[int, tuple[TrainerCallback, Any]] = {}

    def begin(self, callbacks: Iterable[TrainerCallback]) -> None:
        """Restore the first state of known callbacks, and store the state of new ones."""
        for callback in callbacks:
            if id(callback) in self._first:
                _write_state(callback, deepcopy(self._first[id(callback)][1]))
            else:
                self._first[id(callback)] = callback, deepcopy(_read_state(callback))


def _read_state(callback: Any) -> Any:
    if isinstance(callback, ExportableState):
        return callback.state()["attributes"]
    return callback.state_dict() if hasattr(callback, "load_state_dict") else None


def _write_state(callback: Any, state: Any) -> None:
    if isinstance(callback, ExportableState):
        vars(callback).update(state)
    elif state is not None:
        callback.load_state_dict(state)
