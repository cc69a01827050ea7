"""Callback that encodes images before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...data.images import LabelledImages


class LookAhead(TrainerCallback):
    """Callback that calls `look_ahead(images, steps)` as soon as a training's images and number of steps are known."""

    def __init__(self, look_ahead: Callable[[LabelledImages, int], None]) -> None:
        self.look_ahead = look_ahead

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.look_ahead(kwargs["train_dataloader"].dataset, state.max_steps)
