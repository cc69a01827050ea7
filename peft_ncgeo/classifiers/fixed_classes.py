"""An image classifier of fixed classes from a dual encoder: its image tower, with class features in the head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..data.head_names import MULTI_LABEL
from ..models.adapters import unwrap
from ..models.image_classifier import ImageClassifierModel
from ..models.image_towers import put_head, take_image_tower
from ..models.substitution import shallow_copy
from ..models.towers import logit_scale
from ..tuners.adaptformer import AdaptFormerLayer
from ..tuners.prompt_layer import PromptLayer, VisionEmbeddingsWithPrompt, VisionLayerWithPrompt

PARTS = ("vision_model", "visual_projection")  # of a dual encoder, that its image features need


@torch.no_grad()
def fixed_classifier(
    model: nn.Module, class_names: Sequence[str], text_features: Tensor, keep: bool = False
) -> ImageClassifierModel:
    """Return a classifier `exp(logit_scale) cos(f, w_k)` whose rows w start at text features (K, d).

    Its tower shares the model's weights; adapters other than prompts are merged into copies of them.

    Args:
        model: a dual encoder, without PEFT's wrapper, and without vision prompts.
        keep: True: keep an AdaptFormer, which cannot be merged, as modules that the tower's weight files do not have.

    Raises:
        ValueError: the image feature is not known, another adapter cannot be merged, or weights are not finite.
    """
    tower, scale = take_image_tower(image_part(model, keep=keep), projected=True), logit_scale(model).double().exp()
    check_finite({"text_features": text_features, "exp(logit_scale)": scale})
    made = put_head(ImageClassifierModel, tower, "cosine", scale.item(), **named_outputs(class_names))
    made.classifier.weight.copy_(text_features)  # the head normalises them, in float32 or wider
    check_finite(dict(made.named_parameters()))
    return made


def named_outputs(class_names: Sequence[str], multi_label: bool = False) -> dict[str, Any]:
    """Return the config fields that name a head's outputs and, for `multi_label`, mark it as a multi-label head."""
    names = {"id2label": dict(enumerate(class_names)), "label2id": {name: k for k, name in enumerate(class_names)}}
    return {**names, "problem_type": MULTI_LABEL} if multi_label else names


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise an error that names the first tensor of the weights that is not finite."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite; train again, or load another adapter.")


def refuse_vision_prompts(model: nn.Module) -> None:
    """Refuse a model whose active adapters put prompts into its image tower."""
    prompted = (VisionEmbeddingsWithPrompt, VisionLayerWithPrompt)
    if any(isinstance(module, prompted) and module.active_tokens for module in model.modules()):
        raise ValueError(
            f"{type(unwrap(model)).__name__} has vision prompts, and an image classifier has no place for them; "
            "disable them, or load the adapter onto its base model where it is used."
        )


def image_part(model: nn.Module, parts: tuple[str, ...] = PARTS, keep: bool = False) -> Any:
    """Return a copy of a dual encoder with only its image tower, without prompts, other adapters merged into it."""
    view = shallow_copy(model)
    view._modules = {name: _merged(child, keep) for name, child in model.named_children() if name in parts}
    return view


def _merged(module: nn.Module, keep: bool) -> Any:
    """Return a copy of a module that shares its weights, with adapters merged where PEFT can merge them."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.without_peft() if keep and isinstance(module, AdaptFormerLayer) else _inside(module)
    view = shallow_copy(module)
    view._modules = {name: None if child is None else _merged(child, keep) for name, child in module._modules.items()}
    return view


def _inside(layer: Any) -> nn.Module:
    """Return the module inside PEFT's wrapper, changed as the active adapter changes it. Merge into a copy."""
    if isinstance(layer, PromptLayer):
        return layer.base_layer
    layer = copy.deepcopy(layer)
    try:
        if isinstance(layer, AuxiliaryTrainingWrapper):
            if layer.disable_adapters:
                return layer.original_module
            trained = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            return trained.to(next(layer.original_module.parameters()).dtype)  # it was trained in float32
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        elif not layer.disable_adapters and not layer.merged:
            layer.merge()
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"The image tower has a {type(layer).__module__}.{type(layer).__name__}, which cannot be merged into "
            "weights; disable that adapter to go without it."
        ) from error
    return layer.base_layer
