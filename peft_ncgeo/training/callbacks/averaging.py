"""Averaging of prompts over the epochs of a training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...models.adapters import adapter_parameters


class PromptAveraging(TrainerCallback):
    r"""PromptSRC's Gaussian average of the prompts over epochs, which replaces the prompts when training ends.

    .. math:: \bar\theta = \sum_e w_e \theta_e / \sum_e w_e, \quad
              w_e = \exp(-(e - \mathrm{mean})^2 / 2\,\mathrm{std}^2)

    over the epochs e = 1..E; theta_e are the adapter's trained parameters after epoch e. Frozen weights do not change.
    Evaluations and checkpoints during training use the prompts of their own epoch. A checkpoint holds the current sum,
    so a resumed run ends with the same average.

    Args:
        mean: epoch with the greatest weight.
        std: width in epochs, > 0. The paper uses mean 15 and std 1 for 20 epochs.

    Raises:
        ValueError: std is not greater than 0; or, when training starts, `load_best_model_at_end` is set, whose model
            the average would replace, or the training set is a stream, which has no epochs.

    Reference: M. U. Khattak et al., ICCV 2023, arXiv 2307.06948.

    Example: `GeometryTrainer(..., callbacks=[PromptAveraging(mean=15, std=1)])`
    """

    name = "prompt_averaging"

    def __init__(self, mean: float = 15.0, std: float = 1.0) -> None:
        if not std > 0:
            raise ValueError(f"std={std} must be greater than 0.")
        self.mean, self.std = mean, std
        self._forget()

    def _forget(self) -> None:
        self._log_total = torch.tensor(-math.inf, dtype=torch.float64)
        self._average: dict[str, Tensor] = {}

    def log_weight(self, epoch: int) -> float:
        """Return `log w_e`, up to a constant."""
        return -0.5 * ((epoch - self.mean) / self.std) ** 2

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end:
            raise ValueError(
                "PromptAveraging replaces the final model by its average; set load_best_model_at_end=False."
            )
        if isinstance(kwargs["train_dataloader"].dataset, IterableDataset):
            raise ValueError("PromptAveraging averages over epochs, which a stream does not have; leave it out.")
        if state.global_step == 0:
            self._forget()

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # not on_epoch_end: the checkpoint of an epoch's last step is written earlier, and would lack it
        epoch = state.epoch or 0.0
        if epoch != round(epoch) and state.global_step < state.max_steps:
            return
        # a running mean with logarithms of the weights: weights of early epochs are below the smallest float
        log_weight = torch.tensor(self.log_weight(math.ceil(epoch)), dtype=torch.float64)
        self._log_total = torch.logaddexp(self._log_total, log_weight)
        share = (log_weight - self._log_total).exp().item()
        for name, parameter in _trained(kwargs["model"]).items():
            value = parameter.detach().double().cpu()
            old = self._average.get(name, value)
            self._average[name] = old + share * (value - old)

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, parameter in _trained(kwargs["model"]).items():
            if name in self._average:
                parameter.copy_(self._average[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weighted average so far, and the logarithm of the sum of its weights."""
        return {"log_total": self._log_total, **self._average}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Continue the average of an earlier run."""
        self._average = dict(state_dict)
        self._log_total = self._average.pop("log_total")


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    adapter = {id(parameter) for parameter in adapter_parameters(model)}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) in adapter}
