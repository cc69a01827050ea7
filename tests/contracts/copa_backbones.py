"""Backbones that CoPA adapts, each with the places that it should find there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel, get_peft_model
from transformers import ResNetConfig, ResNetModel

from peft_ncgeo import CoPAConfig
from peft_ncgeo.models.adapters import unwrap

from ..cases import MODELS
from ..conftest import pixels, tiny

BOTTLENECK = ResNetConfig(
    embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="bottleneck", downsample_in_bottleneck=True
)


@dataclass
class Backbone:
    """A backbone, the path to its feature, written down here, and the function from its output to the feature."""

    build: Callable
    path: str
    width: int
    output: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    places: tuple[str, ...] = ()  # of residual maps

    def feature(self, model, images=None) -> torch.Tensor:
        """Return the output of the model's pooling (B, d), an active adapter's head included."""
        return self.output(unwrap(model), pixels() if images is None else images).flatten(1)


def pooler_output(model, images):
    return model(pixel_values=images).pooler_output


def first_token(model, images):
    return model(pixel_values=images).last_hidden_state[:, 0]


def places(layers: str, count: int, *parts: str) -> tuple[str, ...]:
    return tuple(f"{layers}.{i}.{part}" for i in range(count) for part in parts)


def convolutions(stages: str, inside: str = "encoder.stages") -> tuple[str, ...]:
    """`stage.block.convolution` as digits."""
    return tuple(f"{inside}.{s}.layers.{b}.layer.{c}.convolution" for s, b, c in stages.split())


BACKBONES = {
    "clip": Backbone(
        MODELS["clip"],
        "visual_projection",
        24,
        lambda model, images: model.get_image_features(pixel_values=images).pooler_output,
        places("vision_model.encoder.layers", 4, "self_attn", "mlp"),
    ),
    "clip_vision": Backbone(
        MODELS["clip_vision"],
        "post_layernorm",
        40,
        pooler_output,
        places("encoder.layers", 4, "self_attn", "mlp"),
    ),
    "clip_vision_projection": Backbone(
        MODELS["clip_vision_projection"],
        "visual_projection",
        24,
        lambda model, images: model(pixel_values=images).image_embeds,
        places("vision_model.encoder.layers", 4, "self_attn", "mlp"),
    ),
    "clip_classifier": Backbone(
        MODELS["clip_classifier"],
        "vision_model.post_layernorm",
        40,
        lambda model, images: model.vision_model(pixel_values=images).pooler_output,
        places("vision_model.encoder.layers", 4, "self_attn", "mlp"),
    ),
    "siglip": Backbone(
        MODELS["siglip"],
        "vision_model.head",
        40,
        lambda model, images: model.get_image_features(pixel_values=images).pooler_output,
        places("vision_model.encoder.layers", 4, "self_attn", "mlp"),
    ),
    "siglip_vision": Backbone(
        MODELS["siglip_vision"],
        "head",
        40,
        pooler_output,
        places("encoder.layers", 4, "self_attn", "mlp"),
    ),
    "vit": Backbone(MODELS["vit"], "layernorm", 32, first_token, places("layers", 3, "attention", "mlp")),
    "vit_classifier": Backbone(
        MODELS["vit_classifier"],
        "vit.layernorm",
        32,
        lambda model, images: first_token(model.vit, images),
        places("vit.layers", 3, "attention", "mlp"),
    ),
    "deit": Backbone(MODELS["deit"], "layernorm", 32, first_token, places("layers", 3, "attention", "mlp")),
    "deit_classifier": Backbone(
        MODELS["deit_classifier"],
        "deit.layernorm",
        32,
        lambda model, images: first_token(model.deit, images),
        places("deit.layers", 3, "attention", "mlp"),
    ),
    "dinov2": Backbone(MODELS["dinov2"], "layernorm", 32, first_token, places("encoder.layer", 3, "attention", "mlp")),
    "dinov2_classifier": Backbone(
        MODELS["dinov2_classifier"],
        "dinov2.layernorm",
        32,
        lambda model, images: first_token(model.dinov2, images),
        places("dinov2.encoder.layer", 3, "attention", "mlp"),
    ),
    "resnet": Backbone(MODELS["resnet"], "pooler", 16, pooler_output, convolutions("000 001 100 101")),
    "resnet_classifier": Backbone(
        MODELS["resnet_classifier"],
        "resnet.pooler",
        16,
        lambda model, images: pooler_output(model.resnet, images),
        convolutions("000 001 100 101", "resnet.encoder.stages"),
    ),
    "bottleneck": Backbone(  # 1x1, 3x3, 1x1: only the middle ones
        partial(tiny, ResNetModel, BOTTLENECK), "pooler", 32, pooler_output, convolutions("001 011 101")
    ),
}


def adapted(base, config: CoPAConfig | None = None, seed: int = 1, far: float = 0.05) -> PeftModel:
    """A model far from its start."""
    torch.manual_seed(seed)
    model = get_peft_model(base, config or CoPAConfig())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ncgeo_copa_" in name:
                parameter.add_(torch.randn_like(parameter) * far)
    return model.eval()
