"""Callbacks of `GeometryTrainer`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class NewViews(TrainerCallback):
    """Tells the training images which epoch it is, so that each epoch draws other views.

    Accelerate's loader tells the sampler or the data set, and with several processes the sampler only.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["train_dataloader"].dataset.set_epoch(int(state.epoch or 0))
