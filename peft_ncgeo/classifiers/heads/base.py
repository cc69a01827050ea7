"""Shape of a head on cached features: fitted on a support set, it gives logits of query features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...geometry.sphere import l2_normalize

State = dict[str, Tensor]


class Support(NamedTuple):
    """Support set as a head sees it, on the CPU, in float32 or wider.

    Attributes:
        features: raw features (V, N, d) of V views of N images.
        labels: (N,) int64, the classes 0..K-1; each has an image.
        texts: raw text features (K, d) of the class names.
        scale: s, the model's factor of cosines.
        seed: of everything that a head draws at random.
    """

    features: Tensor
    labels: Tensor
    texts: Tensor
    scale: float
    seed: int = 0

    def samples(self) -> tuple[Tensor, Tensor]:
        """Return all views as samples of their own: unit features (V N, d) and labels (V N,)."""
        return l2_normalize(self.features).flatten(0, 1), self.labels.repeat(len(self.features))

    def text_logits(self, features: Tensor) -> Tensor:
        """Return the zero-shot logits `s x^ . t^_c` (B, K) of features (B, d)."""
        return self.scale * l2_normalize(features) @ l2_normalize(self.texts).T


class FeatureHead(ABC):
    """Method that classifies frozen features of images, with its settings as fields.

    A head holds settings alone. What it learns is a state, a dictionary of tensors, which goes from method to method
    and into a file.

    Attributes:
        num_views: number of augmented views of a support image, unless `adapt` is told another.
        smallest_crop: smallest share of an image's area that a view shows.
        tensors: name -> letters of the dimensions of each tensor of a state: k classes, d the features' width.
        takes_new_names: True if class names that were not trained can be given later.
        reads_texts: False if only images count, so that nothing is said about names that were not trained.
    """

    num_views: ClassVar[int] = 10
    smallest_crop: ClassVar[float] = 0.5
    tensors: ClassVar[Mapping[str, str]] = {}
    takes_new_names: ClassVar[bool] = False
    reads_texts: ClassVar[bool] = True

    @abstractmethod
    def fit(self, support: Support) -> tuple[State, dict[str, float]]:
        """Return the state that the support set teaches, and measures of the fit.

        Raises:
            ValueError: the support set does not do for this method.
            FloatingPointError: numbers that are not finite.
        """

    @abstractmethod
    def logits(self, state: State, features: Tensor) -> Tensor:
        """Return logits (B, K) of raw features (B, d)."""

    def for_names(self, state: State, trained: Tensor, texts: Tensor) -> State:
        """Return a state for other names.

        Args:
            trained: (M,) int64, the trained class of each name; -1: a new one, if the head takes them.
            texts: raw text features (M, d) of the names.
        """
        return {name: _rows(value, self.tensors[name], trained) for name, value in state.items()}

    def check(self, state: State, classes: int) -> None:
        """Check the names, shapes and types of the tensors in a state.

        Raises:
            ValueError: a tensor is missing, unexpected, or of another shape or type.
        """
        if state.keys() != self.tensors.keys():
            raise ValueError(f"it holds {sorted(state)}, not {sorted(self.tensors)}")
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
                raise ValueError(f"{name} must be finite floats of 32 or 64 bits")


class LinearHead(FeatureHead):
    """Head whose logits are linear in the unit feature: `x^ . w_c + b_c`."""

    tensors: ClassVar[Mapping[str, str]] = {"weight": "kd", "bias": "k"}

    def logits(self, state: State, features: Tensor) -> Tensor:
        return l2_normalize(features.to(state["weight"].dtype)) @ state["weight"].T + state["bias"]


def _rows(value: Tensor, letters: str, rows: Tensor) -> Tensor:
    """Return the rows of these classes of a tensor that has a row a class; another one as it is."""
    return value[rows] if letters[:1] == "k" else value


def as_state(like: Tensor, **values: Any) -> State:
    """Return numbers and tensors as a state, in the type of `like`; whole numbers stay whole."""
    found = {name: torch.as_tensor(value) for name, value in values.items()}
    return {
        name: (value.detach().to(like.dtype) if value.is_floating_point() else value).contiguous()
        for name, value in found.items()
    }
