"""Count the epochs for augmentation."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class NewViews(TrainerCallback):
    """Tells the training images and their sampler which epoch it is, so that each epoch draws other views.

    Accelerate's loader tells the sampler or the data set, with several processes the sampler only, and neither where
    the loader skips what a resumed training has seen.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loader, epoch = kwargs["train_dataloader"], int(state.epoch or 0)
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        loader.dataset.set_epoch(epoch)
