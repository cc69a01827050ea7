"""Separation of the image tower from a model, with its projection and pooling; and a new head on it."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from .adapters import adapter_layers
from .families import FAMILIES, family_name
from .heads import classification_head
from .image_classifier import ImageClassifierConfig, ImageClassifierModel
from .towers import find_pooling

# Families whose image feature is `visual_projection(vision_model(...).pooler_output)`, or without that projection.
_DUAL_ENCODERS = (
    *("clip", "siglip", "siglip2", "metaclip_2", "clipseg", "owlvit", "owlv2", "groupvit", "altclip", "chinese_clip"),
    *("blip", "align", "tipsv2", "aimv2", "vision_text_dual_encoder"),
)
# Families whose `pooler_output` is None or has gone through a layer that their own image classifiers leave out.
_FIRST_TOKEN = ("vit", "deit", "vit_msn", "flava")
_Model = TypeVar("_Model", bound=ImageClassifierModel)


@dataclass(frozen=True)
class ImageTower:
    """Image tower of a model.

    Attributes:
        module: the tower; its class is one of Transformers'.
        projection: the linear layer after the pooled feature, or None.
        pooling: see [`~peft_ncgeo.models.image_classifier.ImageClassifierConfig`].
        width: width of the pooled feature, before the projection.
    """

    module: Any
    projection: nn.Linear | None
    pooling: str
    width: int


def take_image_tower(model: Any, projected: bool) -> ImageTower:
    """Return a model's image tower in new modules, which share parameters and buffers with the model.

    Args:
        model: a dual encoder or its image part, or a backbone without a head.
        projected: True: keep the projection of a dual encoder.

    Raises:
        TypeError: the model is not one of Transformers.
        ValueError: the model has adapters, a head, a projection that is not one linear layer, or an unknown pooled
            feature.
    """
    name = type(model).__name__
    if isinstance(model, nn.Module) and adapter_layers(model):
        raise ValueError(f"{name} has PEFT adapters; merge_and_unload() them, or put them on the classifier instead.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of Transformers, got {name}.")
    if classification_head(model) is not None:
        raise ValueError(f"{name} has a head already; train it as it is, or pass its backbone, model.base_model.")
    paired = hasattr(model, "get_image_features")
    if paired or hasattr(model, "visual_projection"):
        if family_name(model, "get_image_features" if paired else "forward") not in _DUAL_ENCODERS:
            known = ", ".join(FAMILIES[family].name for family in _DUAL_ENCODERS)
            raise ValueError(f"The image feature of {name} is not known; use a backbone, or a model of {known}.")
        projection: Any = getattr(model, "visual_projection", None) if projected else None
        tower: Any = model.vision_model
        pooling = "pooler_output"
        # ALIGN's EfficientNet says no width; its feature is compared with texts of this one
        width = tower.config.hidden_size if hasattr(tower.config, "hidden_size") else model.config.projection_dim
    else:
        found = find_pooling(model)
        tower, projection, width = model, None, found.width
        pooling = "first_token" if family_name(model) in _FIRST_TOKEN else "pooler_output"
        pooling = pooling if found.tokens is not None else "mean"
    if projection is not None and not (isinstance(projection, nn.Linear) and projection.bias is None):
        raise ValueError(
            f"{name} projects its feature by more than one linear layer, which no image classifier holds; make one of "
            "the feature before it, by ImageClassifier.from_backbone(..., projected=False)."
        )
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    tower, projection = copy.deepcopy((tower, projection), shared)
    tower.config.name_or_path = ""  # a folder's path would be saved with the classifier
    if pooling != "pooler_output" and hasattr(tower, "pooler"):
        tower.pooler = None  # it would be trained by nothing
    return ImageTower(_in_public_class(tower), projection, pooling, width)


def _in_public_class(tower: Any) -> Any:
    """Return the tower, or a public class of Transformers that only wraps it, as for OwlViT."""
    name = type(tower).__name__
    if getattr(transformers, name, None) is type(tower):
        return tower
    around: Any = getattr(transformers, name.replace("VisionTransformer", "VisionModel"), None)
    if around is None or inspect.getmodule(around) is not inspect.getmodule(type(tower)):
        raise ValueError(f"{name} is not a model of Transformers, so a saved classifier could not be loaded.")
    with torch.device("meta"):  # takes no memory for weights that are replaced
        model = around(tower.config)
    model.vision_model = tower
    return model


def put_head(
    cls: type[_Model], tower: ImageTower, head: str, scale: float, projector_dim: int | None = None, **labels: Any
) -> _Model:
    """Return a classifier of this class, in evaluation mode, with the tower and a new head without values.

    Args:
        projector_dim: width of a random projector between feature and head; None: no projector.
        labels: config fields with the names of the outputs, or with their number.
    """
    config = ImageClassifierConfig(
        vision_class=type(tower.module).__name__,
        vision_config=tower.module.config,
        pooling=tower.pooling,
        hidden_size=tower.width,
        projection_dim=None if tower.projection is None else tower.projection.out_features,
        projector_dim=projector_dim,
        head=head,
        scale=scale,
        dtype=tower.module.dtype,
        **labels,
    )
    with torch.device("meta"):  # takes no memory or random numbers for weights that are replaced
        made = cls(config)
    made.backbone = tower.module
    made.projection = nn.Identity() if tower.projection is None else tower.projection
    first = next(tower.module.parameters())
    made.projector = made.new_projector().to(first.device, first.dtype)
    made.classifier = made.new_head().to(first.device, first.dtype)
    return made.eval()
