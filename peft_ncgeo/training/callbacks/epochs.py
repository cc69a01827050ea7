"""Callback that counts the epochs for augmentation."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochSetter(TrainerCallback):
    """Callback that sets the epoch's number on training images and sampler, so that each epoch draws new views.

    Accelerate's loader sets the number on the sampler or the data set, with several processes only on the sampler, and
    on neither if it skips the batches that a resumed training has already seen.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loader, epoch = kwargs["train_dataloader"], int(state.epoch or 0)
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        if hasattr(loader.dataset, "set_epoch"):  # a stream counts its own passes
            loader.dataset.set_epoch(epoch)
