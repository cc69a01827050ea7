"""Callbacks of `GeometryTrainer`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...geometry.alignment import alignment
from ...geometry.collapse import NeuralCollapse
from ...geometry.exponent import class_exponents, share_of_best, worst_exponent
from ...geometry.simplex import gram_distance, simplex_distance
from ...geometry.sphere import unit
from ...models.adapters import adapter_parameters


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


class PromptAveraging(TrainerCallback):
    r"""PromptSRC's Gaussian average of the prompts over epochs, put in place when training ends.

    .. math:: \bar\theta = \sum_e w_e \theta_e / \sum_e w_e, \quad
              w_e = \exp(-(e - \mathrm{mean})^2 / 2\,\mathrm{std}^2)

    over the epochs e = 1..E, theta_e the adapter's trained parameters after epoch e; frozen weights are never touched.
    Evaluations and checkpoints while training see the prompts of their own epoch. What is summed so far is part of a
    checkpoint, so a resumed run ends with the same average.

    Args:
        mean: epoch with the greatest weight.
        std: width in epochs, > 0. The paper's are 15 and 1 of 20 epochs.

    Raises:
        ValueError: std not greater than 0; `load_best_model_at_end`, whose model the average would replace.

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
        """`log w_e`, up to a constant."""
        return -0.5 * ((epoch - self.mean) / self.std) ** 2

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end:
            raise ValueError("PromptAveraging ends with its average; set load_best_model_at_end=False.")
        if state.global_step == 0:
            self._forget()

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # not on_epoch_end: a checkpoint of an epoch's last step is written before that, and would lack the epoch
        epoch = state.epoch or 0.0
        if epoch != round(epoch) and state.global_step < state.max_steps:
            return
        # a running mean with logarithms of the weights: those of early epochs are below the smallest float
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
        """What is summed so far."""
        return {"log_total": self._log_total, **self._average}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take up the sum of an earlier run."""
        self._average = dict(state_dict)
        self._log_total = self._average.pop("log_total")


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    adapter = {id(parameter) for parameter in adapter_parameters(model)}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) in adapter}


class GeometryMonitor(TrainerCallback):
    """Adds the geometry of the features to every evaluation's metrics.

    | metric | what |
    |---|---|
    | `nc1`, `nc1_trace` | within-class variability, `tr(S_B^+ S_W)/K` and `tr(S_W)/tr(S_B)` |
    | `nc2`, `nc2_norm_spread`, `nc2_cosine` | class means against a simplex ETF |
    | `nc3`, `nc3_cosine`, `nc4` | class means against classifier weights (alignment), and their predictions |
    | `alignment` | mean over classes of `cos(w_c, mu_c)`, weights as they are, class means centred |
    | `error_exponent`, `exponent_ratio` | how fast errors vanish with the noise, and as a share of the best possible |
    | `class_exponent` | the same for each class against its nearest rival, mean over classes |
    | `gram_distance` | class means against classifier weights as shapes, neither centred (Delta_G*) |
    | `modality_gap` | distance between the centres of images and texts |
    | `text_nc2` | class texts against a simplex ETF |

    See [`~peft_ncgeo.geometry.NeuralCollapse`] for the formulas. For a CLIP-like model features are normalised, the
    classifier is the class texts, and the last two are there; for a classification model features are what enters its
    head (what compares them with weights only where that is one linear layer). On several processes each sample is
    counted once.

    Args:
        nc4: keep the features of a set until it is done, for `nc4` alone.

    Attributes:
        per_class: `alignment` and `error_exponent` of each class in the last evaluation, (K,); nan for classes
            without samples.
        class_means: mean feature of each class in the last evaluation, (K, d) float64; rows of nan without samples.
        weights: the classifier compared with them, (K, d) float64: unit text features, or the rows of a linear head.

    Example: `GeometryTrainer(..., callbacks=[GeometryMonitor()])`
    """

    def __init__(self, nc4: bool = True) -> None:
        self.nc4 = nc4
        self.per_class: dict[str, Tensor] = {}
        self.class_means: Tensor | None = None
        self.weights: Tensor | None = None
        self._collapse: NeuralCollapse | None = None

    def begin(self) -> None:
        """Forget the evaluation before."""
        self._collapse, self.per_class, self.class_means, self.weights = None, {}, None, None

    def update(self, features: Tensor, labels: Tensor, num_classes: int, reads_text: bool) -> None:
        """Take in a batch of raw features (B, d)."""
        features = unit(features) if reads_text else features.flatten(1).float()
        if self._collapse is None:
            self._collapse = NeuralCollapse(num_classes, features.shape[1], self.nc4)
        self._collapse.update(features, labels)

    def compute(self, text: Tensor | None, head: Any = None) -> dict[str, float]:
        """Metrics since `begin`, from the raw `text` (K, d) of a CLIP-like model, else from the linear `head`."""
        if self._collapse is None:
            return {}
        counts, means = self._collapse.counts.cpu(), self._collapse.class_means.cpu()
        self.class_means = means
        if text is None and head is None:
            return self._collapse.compute()  # what classifies is not one linear layer
        weights = (head.weight.detach() if text is None else unit(text)).double().cpu()
        self.weights = weights
        bias = None if text is not None or head.bias is None else head.bias.detach().double().cpu()
        exponents = class_exponents(means, weights, bias)
        beta = worst_exponent(exponents)
        self.per_class = {"alignment": alignment(weights, means), "error_exponent": exponents}
        metrics = {
            **self._collapse.compute(weights, bias),
            "alignment": float(self.per_class["alignment"].nanmean()),
            "error_exponent": float(beta),
            "class_exponent": float(exponents.nanmean()),
            "exponent_ratio": float(share_of_best(beta, means)),
            "gram_distance": float(gram_distance(means[counts > 0], weights[counts > 0])),
        }
        if text is not None:
            centre = (counts[:, None] * means.nan_to_num()).sum(0) / counts.sum()
            centred = weights - weights.mean(0)
            metrics["modality_gap"] = float(torch.linalg.vector_norm(centre - weights.mean(0)))
            metrics["text_nc2"] = float(simplex_distance(centred @ centred.T))
        return metrics
