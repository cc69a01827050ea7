"""Base of the losses: their input (`GeometryBatch`) and the common parts of regularisers (`Regularizer`)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry.checks import (
    check,
    check_finite,
    check_labels,
    check_shape,
    check_tensor,
    deferred,
    number,
    refuse_unless,
)
from ..validation import check_float, check_non_negative, check_positive


@dataclass
class GeometryBatch:
    """Input of the losses: unnormalized features, labels and more, of one batch over all processes.

    Fields that no loss `requires` stay None and cost nothing. `axes` names the axes of a tensor; axes with the same
    letter have the same length: B images, K classes, T templates, and d, the width of the shared space (for a
    classification model: of its head's input). Only a model that reads text has the fields marked `of_text`.
    `frozen_` features are those of the model with its adapter off, `teacher_logits` those of another model; both have
    no gradient.
    """

    image_features: Tensor | None = field(default=None, metadata={"axes": "Bd"})
    text_features: Tensor | None = field(default=None, metadata={"axes": "Kd", "of_text": True})
    labels: Tensor | None = field(default=None, metadata={"axes": "B"})  # integers; None where images are mixed
    targets: Tensor | None = field(default=None, metadata={"axes": "BK"})  # shares of the classes in mixed images
    logits: Tensor | None = field(default=None, metadata={"axes": "BK"})
    logit_scale: Tensor | None = field(default=None, metadata={"of_text": True})  # its exp multiplies the cosines
    frozen_image_features: Tensor | None = field(default=None, metadata={"axes": "Bd"})
    frozen_text_features: Tensor | None = field(default=None, metadata={"axes": "Kd", "of_text": True})
    teacher_logits: Tensor | None = field(default=None, metadata={"axes": "BK"})
    template_features: Tensor | None = field(default=None, metadata={"axes": "KTd", "of_text": True})
    classifier_weight: Tensor | None = field(default=None, metadata={"axes": "Kd"})
    class_means: Tensor | None = field(default=None, metadata={"axes": "Kd"})  # rows of nan: classes not seen yet
    class_counts: Tensor | None = field(default=None, metadata={"axes": "K"})
    progress: float | None = None  # share of training done, 0 to 1
    multi_hot: Tensor | None = field(default=None, metadata={"axes": "BK"})  # 0 or 1, for any number of labels

    def need(self, *names: str) -> list[Any]:
        """Return the values of the named fields, with labels as int64.

        Raises:
            ValueError: a field, which the message names, is None, is empty, has a shape that does not fit the others,
                or is not finite. Inside the trainer, the error for values that are not finite comes after all terms
                are computed, before the optimizer step.
            TypeError: a field is not a tensor of real numbers, or labels are not integers.
        """
        values: list[Any] = []
        lengths: dict[str, tuple[str, int]] = {}
        all_axes = {each.name: each.metadata.get("axes") for each in fields(self)}
        for name in names:
            value, axes = getattr(self, name), all_axes.get(name)
            if value is None:
                raise ValueError(f"This loss needs GeometryBatch.{name}, which is None.")
            if axes is not None:
                check_shape(name, value, *axes)
                for axis, length in zip(axes, value.shape, strict=True):
                    other, wanted = lengths.setdefault(axis, (name, length))
                    if wanted != length:
                        raise ValueError(f"{name} has {axis} = {length}, but {other} has {axis} = {wanted}.")
            elif name == "logit_scale":
                check_tensor(name, value)
                if value.numel() != 1:
                    raise ValueError(f"logit_scale must be one number, got shape {tuple(value.shape)}.")
            elif name == "progress":
                value = check_float(name, value, "a share of training, 0 to 1", lambda share: 0 <= share <= 1)
            if name == "labels":
                if value.is_floating_point():
                    raise TypeError(f"labels must be integers, got {value.dtype}.")
                value = value.long()
            elif isinstance(value, Tensor):
                # a row of class_means is wholly nan until its class is seen
                unseen = value.isnan().all(-1, keepdim=True) if name == "class_means" else None
                check_finite(name, value if unseen is None else value.masked_fill(unseen, 0))
            values.append(value)
        return values


def class_indices(labels: Tensor, num_classes: int, lowest: int = 0, owner: str | None = None) -> Tensor:
    """Check that labels (B,) are in `lowest`..K-1, and return them, clamped to this range.

    They are clamped since an index out of range could stop a device before the check is read. `owner` is the name of
    the term whose K prototypes the labels choose, for the error message.
    """
    if owner is not None:
        high = labels.max()
        message = "{}: label {} has no prototype among {}, which are numbered from 0."
        refuse_unless(high < num_classes, ValueError, message, owner, high, num_classes)
    check_labels(labels, num_classes, lowest)
    return labels.clamp(lowest, num_classes - 1)


def finite_value(name: str, value: Tensor) -> Tensor:
    """Return the value of a term; raise a FloatingPointError if it is not finite.

    Inside the trainer no error is raised here: the trainer checks every term itself, before the optimizer step.
    """
    if not deferred():
        message = "{} is {}; its input or settings are extreme."
        refuse_unless(value.isfinite().all(), FloatingPointError, message, name, value.detach().sum())
    return value


class Regularizer(nn.Module):
    """Term that is added to the classification loss, with a fixed weight or with a budget that it must keep.

    A call with a [`GeometryBatch`] returns the unweighted scalar value L. The trainer multiplies it by `factor`:

    - `weight`: a number, or a function of the share of training done (0 to 1).
    - `budget` rho: the factor is the multiplier lambda of the constraint `L <= rho`. It starts at 1, and dual ascent
      changes it after each optimiser step, `lambda <- max(0, lambda + step_size (L / rho - 1))`. rho has the units of
      L.

    Args:
        weight: as above. Give exactly one of `weight` and `budget`.
        budget: as above, > 0.
        name: name of the term in the logs, `loss/<name>` and `lambda/<name>`. Default: the class's own.
        step_size: eta of the dual ascent.
        max_step: upper limit of `L / rho - 1` in one update; None: no limit.

    Attributes:
        requires: the [`GeometryBatch`] fields that the term reads in addition to the student's features and the
            labels.
        reads_labels: False for a term whose value does not depend on labels, so that it also works on images without
            labels.
        reads_targets: True for a term that reads `targets` in place of labels if images are mixed.
        metrics: scalars recorded in the last call, logged under their own names.

    Raises:
        ValueError: neither or both of `weight` and `budget` are given, or a value is out of range.
        TypeError: a value is not a number, or the name is not a string.
        FloatingPointError: in a call, the value is not finite although the batch is.
    """

    default_name = "regularizer"
    requires: tuple[str, ...] = ()
    reads_labels: bool = True
    reads_targets: bool = False
    multiplier: Tensor

    def __init__(
        self,
        weight: float | Callable[[float], float] | None = None,
        budget: float | None = None,
        name: str | None = None,
        step_size: float = 0.3,
        max_step: float | None = None,
    ) -> None:
        super().__init__()
        own = type(self).__name__
        if name is not None and not isinstance(name, str):
            raise TypeError(f"{own}: name must be a string, got {type(name).__name__}.")
        self.name = name or self.default_name
        if "." in self.name:
            raise ValueError(f"Loss name {self.name!r} must not hold a dot: dots separate names in checkpoints.")
        if (weight is None) == (budget is None):
            raise ValueError(f"{own} takes exactly one of weight and budget.")
        if weight is not None and not callable(weight):
            weight = check_float(f"{own}: weight", weight, "finite")
        if budget is not None:
            budget = check_positive(f"{own}: budget", budget)
        if max_step is not None:
            max_step = check_float(f"{own}: max_step", max_step, "greater than 0", lambda x: x > 0)
        self.weight, self.budget, self.max_step = weight, budget, max_step
        self.step_size = check_non_negative(f"{own}: step_size", step_size)
        self.metrics: dict[str, Tensor] = {}
        self.register_buffer("multiplier", torch.ones(()))
        self._warned = False

    def bind(self, classifier: Any) -> None:
        """Check that the term fits the model's head, and read settings from it that were not given.

        The trainer calls this when it is created and before each training. `classifier` is None for a CLIP-like model
        and for a head that is not one linear layer.
        """

    def __call__(self, batch: GeometryBatch) -> Tensor:
        return finite_value(self.name, super().__call__(batch))

    def forward(self, batch: GeometryBatch) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward(batch).")

    def factor(self, progress: float = 0.0) -> float | Tensor:
        """Return the factor by which the trainer multiplies the value; `progress` is the finished share of training.

        It is a number; under a budget the trainer gets a scalar tensor, so that the host does not wait for the device.
        """
        if self.budget is not None:
            return number(self.multiplier)
        given: Any = self.weight(progress) if callable(self.weight) else self.weight
        factor = check_float(f"weight of {self.name}", given, "a number", lambda _: True)
        if not math.isfinite(factor):
            raise ValueError(f"weight of {self.name} is {factor} after {progress:.0%} of training; it must be finite.")
        return factor

    def constrained(self, value: Tensor) -> Tensor:
        """Return the part of the last call's `value` that a budget limits; by default the whole value."""
        return value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # the shape of a buffer may depend on the step, for example of the pairs that OTPreservation keeps
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if buffer is not None and saved is not None and saved.shape != buffer.shape:
                setattr(self, name, torch.empty_like(saved, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def update(self, value: Tensor | float) -> None:
        """Take one step of dual ascent on the multiplier; do nothing under a fixed weight.

        Args:
            value: the constrained part of the term at this optimiser step, averaged over micro-batches and processes.

        Raises:
            ValueError: the value is not one finite number, or is so far above the budget that the multiplier would not
                be finite. The multiplier then does not change.
        """
        if self.budget is None:
            return
        # all stays on the device, with the digits of Python's numbers where it has them
        wide = torch.float32 if self.multiplier.device.type == "mps" else torch.float64
        if not isinstance(value, Tensor):
            value = check_float(self.name, value, "a number", lambda _: True)
        value = torch.as_tensor(value).to(self.multiplier.device, wide)
        if value.numel() != 1:
            raise ValueError(f"{self.name} must be one number, got shape {tuple(value.shape)}.")
        value = value.reshape(())
        self.check_constrained(value)
        excess = value / self.budget - 1
        if self.max_step is not None:
            excess = excess.clamp_max(self.max_step)
        raised = (self.multiplier + (self.step_size * excess).to(self.multiplier)).clamp_min(0)
        good = raised.isfinite() | ~value.isfinite()
        message = (
            "lambda/{} would not be finite: the value {:.3g} is too far above the budget {:.3g}; raise the budget or "
            "set max_step."
        )
        refuse_unless(good, ValueError, message, self.name, value, self.budget)
        self.multiplier.copy_(raised.where(raised.isfinite() & value.isfinite(), self.multiplier))
        if not self._warned:
            check(self.multiplier <= 100, partial(self._warn_of_budget, value))

    def check_constrained(self, value: Tensor) -> None:
        """Raise the error that [`update`] documents if a constrained value is not finite."""
        message = "{} is {}; its multiplier stays at {:.4g}."
        refuse_unless(value.isfinite().all(), ValueError, message, self.name, value.detach(), self.multiplier)

    def _warn_of_budget(self, value: Tensor) -> None:
        self._warned = True
        warnings.warn(
            f"lambda/{self.name} passed 100: the budget {self.budget} seems out of reach (value {float(value):.3g}).",
            stacklevel=4,
        )
