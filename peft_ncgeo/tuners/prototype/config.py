"""Config of a head that classifies by the nearest of fixed prototypes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftType
from torch import Tensor

from ...geometry.contrast import check_temperature
from ...geometry.prototypes import minority_margin
from ...geometry.simplex import simplex_etf
from ...geometry.sphere import l2_normalize
from ...models.heads import HEAD
from ...validation import check_bool, check_float, check_int, one_line, short_repr
from ..prompt_config import PromptConfig

GEOMETRIES = ("etf", "minority_margin")
_MOST = 10**6  # limit of classes, of dimensions and of copies
_LARGEST = 2**27  # limit of num_classes * projection_dim, 1 GiB in float64; an ETF of 11,586 classes
_GIVEN = "given"  # prototypes were given as a tensor and are stored in the adapter's file


@dataclass
class PrototypeConfig(PromptConfig):
    r"""Config of fixed prototypes that replace an image classifier's head (`NCGEO_PROTOTYPE`), and of prompts.

    The backbone's feature x, the input of the head, goes through a two-layer projector. Logits are cosines with K
    unit prototypes:

    .. math:: h = \mathrm{unit}(W_2 \max(0, W_1 x + b_1) + b_2), \quad z_c = h \cdot w_c / \tau

    so the most probable class is the nearest prototype. Train it with
    [`~peft_ncgeo.losses.PrototypeSupCon`], or with cross-entropy, which is the limit of this loss for many copies.
    [`PromptConfig`] documents the prompts in the backbone; without tokens, only the projector is trained.

    Args:
        num_classes: K. Default: the model's number of labels.
        projection_dim: width of h. Default: 128, or the width of given prototypes.
        geometry: "etf" (all pairs of classes have the same, widest angle), "minority_margin" (angles grow as class
            counts fall, see [`~peft_ncgeo.geometry.minority_margin`]), or prototypes (K, d), which are scaled to
            length 1. Trainable prototypes start from this geometry. Only for an ETF, the loss is smallest if features
            equal their prototypes. In general it is smallest at `h_y ~ w_y - sum_c p_c w_c` with the softmax p, so
            features only approach the given geometry.
        class_counts: (K,) number of training images of each class, for "minority_margin".
        margin_strength: 0 (an ETF) or more, for "minority_margin".
        prototypes_per_class: number of copies of each prototype that `PrototypeSupCon` puts into every batch.
        temperature: tau, 1e-6 to 1e6.
        trainable: True: train the prototypes too, as in earlier work.

    Raises:
        ValueError: a value is out of range, class_counts is missing or has a wrong length, the model has no head or
            two heads, the geometry does not exist at this width, or modules_to_save names the head.

    Reference: J. Gill, V. Vakilian, C. Thrampoulidis, Engineering the Neural Collapse Geometry of
    Supervised-Contrastive Loss, arXiv 2310.00893. The paper gives neither the temperature nor the projector's width.

    Example:

    ```python
    vit = ViTForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k", num_labels=10)
    model = get_peft_model(vit, PrototypeConfig(num_vision_tokens=8, vision_depth=12))
    trainer = GeometryTrainer(model, ..., losses=[PrototypeSupCon()], classification_loss=None)
    ```
    """

    num_classes: int | None = field(default=None, metadata={"help": "Number of classes. Default: the model's."})
    projection_dim: int | None = field(default=None, metadata={"help": "Width of the projected features."})
    geometry: Any = field(default="etf", metadata={"help": "'etf', 'minority_margin' or prototypes (K, d)."})
    class_counts: list[int] | None = field(
        default=None, metadata={"help": "Training images of each class, for 'minority_margin'."}
    )
    margin_strength: float = field(default=0.5, metadata={"help": "How unequal the angles of 'minority_margin' are."})
    prototypes_per_class: int = field(default=100, metadata={"help": "Copies of each prototype in every batch."})
    temperature: float = field(default=0.1, metadata={"help": "Divides the cosines."})
    trainable: bool = field(default=False, metadata={"help": "Train the prototypes too."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["NCGEO_PROTOTYPE"]
        if HEAD in (self.modules_to_save or []):
            raise ValueError(f"modules_to_save names {HEAD!r}, which the prototypes replace; leave it out.")
        if self.geometry is not None and not isinstance(self.geometry, str):
            self.geometry = self._check_given(self.geometry)
        elif self.geometry not in (*GEOMETRIES, _GIVEN):
            raise ValueError(f"geometry={short_repr(self.geometry)} must be one of {GEOMETRIES} or a tensor (K, d).")
        self.projection_dim = 128 if self.projection_dim is None else self.projection_dim
        if self.num_classes is not None:  # else the model's
            self.num_classes = check_int("num_classes", self.num_classes, least=2, most=_MOST)
        self.projection_dim = check_int("projection_dim", self.projection_dim, least=1, most=_MOST)
        if (self.num_classes or 0) * self.projection_dim > _LARGEST:
            raise ValueError(
                f"{self.num_classes:,} prototypes of {self.projection_dim:,} numbers are too many; num_classes times "
                f"projection_dim must be at most {_LARGEST:,}."
            )
        self.prototypes_per_class = check_int("prototypes_per_class", self.prototypes_per_class, 0, _MOST)
        self.temperature = check_temperature(self.temperature)
        self.margin_strength = check_float("margin_strength", self.margin_strength)
        self.trainable = check_bool("trainable", self.trainable)
        if isinstance(self.geometry, str) and self.geometry == "minority_margin" and self.class_counts is None:
            raise ValueError("geometry='minority_margin' needs class_counts, the training images of each class.")
        if self.class_counts is not None:
            counts = _numbers("class_counts", self.class_counts)
            if counts.dim() != 1 or counts.is_floating_point() or counts.dtype == torch.bool or (counts < 0).any():
                raise ValueError(
                    f"class_counts={short_repr(self.class_counts)} must be whole numbers, one for each class."
                )
            self.class_counts = counts.tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that PEFT saves, without given prototypes, which are in the weight file."""
        fields = super().to_dict()
        return {**fields, "geometry": self.geometry if isinstance(self.geometry, str) else _GIVEN}

    def _check_given(self, geometry: Any) -> Tensor:
        points = _numbers("geometry", geometry).detach().double().cpu()
        if points.dim() != 2 or len(points) < 2:
            raise ValueError(f"geometry must be prototypes (K, d) of at least 2 classes, got {tuple(points.shape)}.")
        wrong = ~(points.isfinite().all(1) & points.any(1))
        if wrong.any():
            raise ValueError(
                f"geometry: prototype {int(wrong.nonzero()[0])} is 0 or not finite, so it has no direction."
            )
        for name, size in (("num_classes", len(points)), ("projection_dim", points.shape[1])):
            if getattr(self, name) not in (None, size):
                raise ValueError(f"{name}={getattr(self, name)}, but geometry has shape {tuple(points.shape)}.")
            setattr(self, name, size)
        return l2_normalize(points)

    def prototypes(self) -> Tensor:
        """Return unit prototypes (num_classes, projection_dim) in float64; nan if they come from a file later.

        Raises:
            ValueError: the geometry does not exist at this width, or class_counts are not one number for each class.
        """
        classes, dim = self.num_classes, self.projection_dim
        assert classes is not None  # set from the model if not given
        assert dim is not None
        if isinstance(self.geometry, Tensor):
            return self.geometry
        if self.geometry == _GIVEN:
            return torch.full((classes, dim), math.nan)
        if self.class_counts is not None and len(self.class_counts) != classes:
            raise ValueError(f"class_counts has {len(self.class_counts)} numbers for {classes} classes.")
        if self.geometry == "etf":
            return simplex_etf(classes, dim)
        return minority_margin(torch.tensor(self.class_counts), dim, self.margin_strength)


def _numbers(name: str, value: Any) -> Tensor:
    """Return a list, an array or a tensor of real numbers as a tensor."""
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}={short_repr(value)} must be an array of numbers ({one_line(error)}).") from error
    if found.is_complex():
        raise ValueError(f"{name} must be real numbers, got {found.dtype}.")
    return found
