"""Base classes of heads on cached features: a head is fitted on a support set and returns logits of features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...geometry.sphere import l2_normalize

State = dict[str, Tensor]


class Support(NamedTuple):
    """Support set that a head is fitted on; its tensors are on the CPU, in float32 or wider.

    Attributes:
        features: raw features (V, N, d) of V views of N images.
        labels: (N,) int64, the classes 0..K-1; each has an image.
        texts: raw text features (K, d) of the class names.
        scale: s, the model's factor on cosines.
        seed: seed of all random numbers that a head draws.
    """

    features: Tensor
    labels: Tensor
    texts: Tensor
    scale: float
    seed: int = 0

    def samples(self) -> tuple[Tensor, Tensor]:
        """Return each view as a separate sample: unit features (V N, d) and labels (V N,)."""
        return l2_normalize(self.features).flatten(0, 1), self.labels.repeat(len(self.features))

    def text_logits(self, features: Tensor) -> Tensor:
        """Return the zero-shot logits `s x^ . t^_c` (B, K) of features (B, d)."""
        return self.scale * l2_normalize(features) @ l2_normalize(self.texts).T


class FeatureHead(ABC):
    """Method that classifies frozen features of images, with its settings as fields.

    A head holds only settings. What it learns is a state, a dictionary of tensors: `fit` returns it, the other methods
    take it, and files store it.

    Attributes:
        num_views: default number of augmented views of a support image, see [`~peft_ncgeo.adapt`].
        smallest_crop: smallest share of an image's area that a view shows.
        tensors: name of each tensor of a state -> one letter for each of its dimensions: k for classes, d for the
            features' width; any other letter for a size that is free.
        takes_new_names: True if class names that were not trained can be given later.
        reads_texts: False if the head uses only images, so that it cannot predict names that were not trained.
    """

    num_views: ClassVar[int] = 10
    smallest_crop: ClassVar[float] = 0.5
    tensors: ClassVar[Mapping[str, str]] = {}
    takes_new_names: ClassVar[bool] = False
    reads_texts: ClassVar[bool] = True

    @abstractmethod
    def fit(self, support: Support) -> tuple[State, dict[str, float]]:
        """Return the state learned from the support set, and metrics of the fit.

        Raises:
            ValueError: this method cannot be fitted on the support set.
            FloatingPointError: a number is not finite.
        """

    @abstractmethod
    def logits(self, state: State, features: Tensor) -> Tensor:
        """Return logits (B, K) of raw features (B, d)."""

    def for_names(self, state: State, trained: Tensor, texts: Tensor) -> State:
        """Return a state for other names.

        Args:
            trained: (M,) int64, the index of each name among the trained classes; -1 for a new name.
            texts: raw text features (M, d) of the names.
        """
        return {name: _rows(value, self.tensors[name], trained) for name, value in state.items()}

    def check(self, state: State, classes: int) -> None:
        """Check the names, shapes and types of the tensors in a state.

        Raises:
            ValueError: a tensor is missing, unexpected, or of another shape or type.
        """
        if state.keys() != self.tensors.keys():
            raise ValueError(f"it must hold the tensors {sorted(self.tensors)}, got {sorted(state)}")
        sizes = {"k": classes}
        for name, letters in self.tensors.items():
            value = state[name]
            shape = tuple(value.shape)
            if len(shape) != len(letters) or any(
                sizes.setdefault(c, n) != n for c, n in zip(letters, shape, strict=True)
            ):
                wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
                raise ValueError(f"{name} has shape {shape}, expected ({wanted})")
            if name == "labels":
                if value.dtype != torch.int64 or not ((value >= 0) & (value < classes)).all():
                    raise ValueError(f"{name} must be whole numbers from 0 to {classes - 1}")
            elif value.dtype not in (torch.float32, torch.float64) or not value.isfinite().all():
                raise ValueError(f"{name} must be finite and of float32 or float64")


class LinearHead(FeatureHead):
    """Head whose logits are linear in the unit feature: `x^ . w_c + b_c`."""

    tensors: ClassVar[Mapping[str, str]] = {"weight": "kd", "bias": "k"}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return l2_normalize(features.to(state["weight"].dtype)) @ state["weight"].T + state["bias"]


def _rows(value: Tensor, letters: str, rows: Tensor) -> Tensor:
    """Return these rows of a tensor that has one row for each class; return any other tensor unchanged."""
    return value[rows] if letters[:1] == "k" else value


def as_state(like: Tensor, **values: Any) -> State:
    """Return numbers and tensors as a state: floats in the dtype of `like`, integers unchanged."""
    found = {name: torch.as_tensor(value) for name, value in values.items()}
    return {
        name: (value.detach().to(like.dtype) if value.is_floating_point() else value).contiguous()
        for name, value in found.items()
    }
