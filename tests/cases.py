"""Losses, models and methods: each is listed here once, for the tests of what all of them promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from peft_ncgeo import AdaptFormerConfig, CoPAConfig, NPTConfig, PrototypeConfig, losses
from peft_ncgeo.geometry import simplex_etf

from .conftest import TEXT, VISION, VIT, tiny, tiny_clip, tiny_vit, tiny_vit_classifier

# ---- losses ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """A loss with settings; `reads` are the fields of a batch that its value is computed of."""

    cls: Callable[..., nn.Module]
    arguments: Mapping[str, Any]
    reads: tuple[str, ...]

    def __call__(self) -> nn.Module:
        return self.cls(**self.arguments)


LOGITS = ("logits", "labels")
LISTS = ("logits", "multi_hot")
COUNTED = (*LOGITS, "class_counts")
IMAGE, TEXTS = ("image_features", "labels"), ("text_features",)
FROZEN = ("frozen_image_features", "frozen_text_features")
BOTH_TEXTS = (*TEXTS, "frozen_text_features")
TRANSPORTED = {
    "joint": (*IMAGE, *TEXTS, *FROZEN),
    "separate": (*IMAGE, *TEXTS, *FROZEN),
    "image": ("image_features", "frozen_image_features"),
    "text": ("labels", *BOTH_TEXTS),
}
ALL_FEATURES = ("image_features", *TEXTS, *FROZEN, "logit_scale")
OF_HEAD = ("class_means", "classifier_weight")
# Each formula that a loss has once; the settings are those of the stored reference values.
FORMULAS: dict[str, Loss] = {
    "CrossEntropy()": Loss(losses.CrossEntropy, {}, LOGITS),
    "BalancedSoftmax()": Loss(losses.BalancedSoftmax, {}, COUNTED),
    "LogitAdjustment(tau 0.5)": Loss(losses.LogitAdjustment, {"tau": 0.5}, COUNTED),
    "LDAM(margin 0.3, scale 4)": Loss(losses.LDAM, {"max_margin": 0.3, "scale": 4.0}, COUNTED),
    "LDAM(re-weighted)": Loss(losses.LDAM, {"reweight_after": 0.8}, (*COUNTED, "progress")),
    "MultiLabelLoss()": Loss(losses.MultiLabelLoss, {}, LISTS),
    "MultiLabelLoss(asymmetric, gamma_pos 1, pos_weight 2)": Loss(
        losses.MultiLabelLoss, {"asymmetric": True, "gamma_pos": 1.0, "pos_weight": 2.0}, LISTS
    ),
    **{
        f"OTPreservation({modality}, exact)": Loss(
            losses.OTPreservation, {"weight": 1.0, "modality": modality, "solver": "exact"}, TRANSPORTED[modality]
        )
        for modality in ("joint", "separate", "image")
    },
    "OTPreservation(joint, epsilon 0.5)": Loss(
        losses.OTPreservation, {"weight": 1.0, "solver": "entropic", "epsilon": 0.5}, TRANSPORTED["joint"]
    ),
    "PointwisePreservation(published)": Loss(losses.PointwisePreservation, {"weight": 1.0}, ALL_FEATURES),
    "PointwisePreservation(mean)": Loss(
        losses.PointwisePreservation, {"weight": 1.0, "kl_reduction": "mean"}, ALL_FEATURES
    ),
    "Distillation(temperature 1)": Loss(losses.Distillation, {"weight": 1.0}, ("logits", "teacher_logits")),
    "Distillation(temperature 2)": Loss(
        losses.Distillation, {"weight": 1.0, "temperature": 2.0}, ("logits", "teacher_logits")
    ),
    "RotationStabilization()": Loss(losses.RotationStabilization, {"weight": 1.0}, BOTH_TEXTS),
    "LanguageCollapse()": Loss(losses.LanguageCollapse, {"weight": 1.0}, TEXTS),
    "ClusterCollapse(default clusters, mean)": Loss(
        losses.ClusterCollapse, {"weight": 1.0, "reduction": "mean"}, BOTH_TEXTS
    ),
    "ClusterCollapse(2 clusters, sum)": Loss(
        losses.ClusterCollapse, {"weight": 1.0, "num_clusters": 2, "reduction": "sum"}, BOTH_TEXTS
    ),
    **{
        f"GeometricDebiasing(anchor {anchor})": Loss(
            losses.GeometricDebiasing, {"weight": 1.0, "anchor": anchor}, (*IMAGE, *TEXTS)
        )
        for anchor in (False, True)
    },
    "ModalityIsomorphism(mean)": Loss(losses.ModalityIsomorphism, {"weight": 1.0}, (*IMAGE, *TEXTS)),
    "ModalityIsomorphism(sinkhorn, epsilon 0.5)": Loss(
        losses.ModalityIsomorphism,
        {"weight": 1.0, "method": "sinkhorn", "epsilon": 0.5},
        (*IMAGE, "template_features"),
    ),
    "SpaceAlignment(detach True, center True)": Loss(
        losses.SpaceAlignment, {"weight": 1.0, "detach_means": True, "center": True}, OF_HEAD
    ),
    "SpaceAlignment(detach False, center False)": Loss(
        losses.SpaceAlignment, {"weight": 1.0, "detach_means": False, "center": False}, OF_HEAD
    ),
    "PrototypeSupCon(of the head)": Loss(
        losses.PrototypeSupCon, {"copies": 10, "temperature": 1.0}, (*IMAGE, "classifier_weight")
    ),
    "PrototypeImageContrast(default)": Loss(losses.PrototypeImageContrast, {}, (*IMAGE, "class_means")),
}

# ---- models ---------------------------------------------------------------------------------------------------------

CLIP = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24, num_labels=5)
SIGLIP_VISION = {name: value for name, value in VISION.items() if name != "projection_dim"}
SIGLIP = SiglipConfig(
    text_config={**{k: v for k, v in TEXT.items() if k != "projection_dim"}, "hidden_size": 40, "projection_size": 40},
    vision_config=SIGLIP_VISION,
)
DEIT = DeiTConfig(**VIT)
DINO = Dinov2Config(**{k: v for k, v in VIT.items() if k != "intermediate_size"}, mlp_ratio=2)
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
MODELS: dict[str, Callable[..., Any]] = {
    "clip": tiny_clip,
    "clip_text": partial(tiny, CLIPTextModel, CLIP.text_config),
    "clip_text_projection": partial(tiny, CLIPTextModelWithProjection, CLIP.text_config),
    "clip_vision": partial(tiny, CLIPVisionModel, CLIP.vision_config),
    "clip_vision_projection": partial(tiny, CLIPVisionModelWithProjection, CLIP.vision_config),
    "clip_classifier": partial(tiny, CLIPForImageClassification, CLIP),
    "siglip": partial(tiny, SiglipModel, SIGLIP),
    "siglip_vision": partial(tiny, SiglipVisionModel, SIGLIP.vision_config),
    "vit": tiny_vit,
    "vit_classifier": tiny_vit_classifier,
    "deit": partial(tiny, DeiTModel, DEIT),
    "deit_classifier": partial(tiny, DeiTForImageClassification, DEIT),
    "dinov2": partial(tiny, Dinov2Model, DINO),
    "dinov2_classifier": partial(tiny, Dinov2ForImageClassification, DINO),
    "resnet": partial(tiny, ResNetModel, RESNET),
    "resnet_classifier": partial(tiny, ResNetForImageClassification, RESNET),
}

# ---- methods --------------------------------------------------------------------------------------------------------

PHRASE = [6, 7, 8, 9]  # token ids: tiny models have no tokenizer


@dataclass
class Tuner:
    """A method on a model, by the name that it has in `MODELS`."""

    model: str
    config: Callable[[], NPTConfig | PrototypeConfig | CoPAConfig | AdaptFormerConfig]
    parameters: int
    slots: int = 0  # text slots the adapter owns
    constants: int = 0  # numbers in the adapter's file that are not trained

    @property
    def build(self) -> Callable:
        return MODELS[self.model]

    @property
    def transformer(self) -> bool:
        """It has attention and gradient checkpointing."""
        return not self.model.startswith("resnet")

    @property
    def prefix(self) -> str:
        return f"{self.config().peft_type.value.lower()}_"


def coop(**fields):
    return NPTConfig.coop(num_text_tokens=6, **fields)  # 16 do not fit into the tiny model's 16 positions


def ivlp(**fields):
    return NPTConfig.ivlp(**{"text_init": PHRASE, "text_depth": 2, "vision_depth": 3, **fields})


def prompt_ot(**fields):
    return NPTConfig.prompt_ot(text_init=PHRASE, **fields)


def maple(**fields):
    return NPTConfig.maple(**{"text_init": PHRASE[:2], "text_depth": 3, "vision_depth": 2, **fields})


def vpt(**fields):
    return NPTConfig.vpt(**{"vision_depth": 2, **fields})


def text_only(**fields):
    return ivlp(num_vision_tokens=0, **fields)


def prototypes(**fields):
    return PrototypeConfig(**{"projection_dim": 8, "temperature": 0.5, **fields})


def uneven(**fields):
    return prototypes(geometry="minority_margin", class_counts=[40, 20, 10, 5, 2], **fields)


def given(**fields):
    turned = simplex_etf(5, 6, seed=3) + 0.2  # neither unit rows nor an ETF
    return prototypes(geometry=turned, projection_dim=None, **fields)


def projector(width: int, dim: int) -> int:
    """Parameters of the two layers between backbone and prototypes."""
    return width * width + width + width * dim + dim


def copa_tsa(**fields):
    return CoPAConfig(residual_adapters=True, **fields)


def url(**fields):
    return CoPAConfig(shared=True, **fields)


def bottlenecks(blocks: int, width: int, dim: int) -> int:
    """Parameters of an adapter beside each MLP: its norm, two maps with biases and its scale."""
    return blocks * (2 * width + width * dim + dim + dim * width + width + 1)


PROMPTS = {"num_vision_tokens": 8, "vision_depth": 2}
IVLP, MAPLE = 2 * 4 * 32 + 3 * 4 * 40, 3 * 2 * 32 + 2 * (32 * 40 + 40)
TUNERS = {
    "clip-coop": Tuner("clip", coop, 6 * 32, slots=6),
    "clip-ivlp": Tuner("clip", ivlp, IVLP, slots=4),
    "clip-ivlp-first_layer": Tuner("clip", partial(ivlp, first_layer=1, vision_depth=2), IVLP - 4 * 40, slots=4),
    "clip-prompt_ot": Tuner("clip", prompt_ot, 3 * 4 * 32 + 4 * 4 * 40, slots=4),
    "clip-vpt": Tuner("clip", vpt, 2 * 8 * 40),
    "clip-maple": Tuner("clip", maple, MAPLE, slots=2),
    "clip-maple-first_layer": Tuner("clip", partial(maple, first_layer=1, text_depth=2), MAPLE - 2 * 32, slots=2),
    "clip_text": Tuner("clip_text", text_only, 2 * 4 * 32, slots=4),
    "clip_text_projection": Tuner("clip_text_projection", text_only, 2 * 4 * 32, slots=4),
    "clip_vision": Tuner("clip_vision", vpt, 2 * 8 * 40),
    "clip_vision_projection": Tuner("clip_vision_projection", vpt, 2 * 8 * 40),
    "clip_classifier": Tuner("clip_classifier", vpt, 2 * 8 * 40),
    "siglip-vpt": Tuner("siglip", vpt, 2 * 8 * 40),
    "siglip_vision": Tuner("siglip_vision", vpt, 2 * 8 * 40),
    "vit-vpt": Tuner("vit", vpt, 2 * 8 * 32),
    "vit-vpt-first_layer": Tuner("vit", partial(vpt, first_layer=1), 2 * 8 * 32),
    "vit_classifier-vpt": Tuner("vit_classifier", vpt, 2 * 8 * 32),
    "deit": Tuner("deit", vpt, 2 * 8 * 32),
    "deit_classifier": Tuner("deit_classifier", vpt, 2 * 8 * 32),
    "dinov2": Tuner("dinov2", vpt, 2 * 8 * 32),
    "dinov2_classifier": Tuner("dinov2_classifier", vpt, 2 * 8 * 32),
    "vit_classifier-prototypes": Tuner("vit_classifier", prototypes, projector(32, 8), constants=5 * 8),
    "vit_classifier-prototypes-prompts": Tuner(
        "vit_classifier", partial(prototypes, **PROMPTS), projector(32, 8) + 2 * 8 * 32, constants=5 * 8
    ),
    "vit_classifier-prototypes-given": Tuner(
        "vit_classifier",
        partial(given, **PROMPTS, first_layer=1),
        projector(32, 6) + 2 * 8 * 32,
        constants=5 * 6,
    ),
    "vit_classifier-prototypes-trained": Tuner(
        "vit_classifier", partial(prototypes, **PROMPTS, trainable=True), projector(32, 8) + 2 * 8 * 32 + 5 * 8
    ),
    "dinov2_classifier-prototypes": Tuner(  # [CLS] beside the mean of the patches
        "dinov2_classifier",
        partial(uneven, **PROMPTS),
        projector(64, 8) + 2 * 8 * 32,
        constants=5 * 8,
    ),
    "deit_classifier-prototypes": Tuner(
        "deit_classifier",
        partial(given, **PROMPTS, trainable=True),
        projector(32, 6) + 2 * 8 * 32 + 5 * 6,
    ),
    "clip_classifier-prototypes": Tuner(
        "clip_classifier",
        partial(prototypes, **PROMPTS),
        projector(40, 8) + 2 * 8 * 40,
        constants=5 * 8,
    ),
    "clip_classifier-prototypes-trained": Tuner(
        "clip_classifier", partial(uneven, trainable=True), projector(40, 8) + 5 * 8
    ),
    "resnet_classifier-prototypes": Tuner("resnet_classifier", given, projector(16, 6), constants=5 * 6),
    "resnet_classifier-prototypes-trained": Tuner(
        "resnet_classifier", partial(uneven, trainable=True), projector(16, 8) + 5 * 8
    ),
    "clip-copa": Tuner("clip", CoPAConfig, 2 * 24 * 24),
    "clip_vision-copa-adapters": Tuner("clip_vision", copa_tsa, 2 * 40 * 40 + 4 * 2 * 40 * 40),
    "clip_vision_projection-url": Tuner("clip_vision_projection", url, 24 * 24),
    "siglip_vision-copa-adapters": Tuner("siglip_vision", copa_tsa, 2 * 40 * 40 + 4 * 2 * 40 * 40),
    "vit-copa": Tuner("vit", CoPAConfig, 2 * 32 * 32),
    "vit_classifier-copa-adapters": Tuner("vit_classifier", copa_tsa, 2 * 32 * 32 + 3 * 2 * 32 * 32),
    "deit-url-adapters": Tuner("deit", partial(copa_tsa, shared=True), 32 * 32 + 3 * 2 * 32 * 32),
    "dinov2-copa": Tuner("dinov2", CoPAConfig, 2 * 32 * 32),
    "dinov2_classifier-copa-adapters": Tuner("dinov2_classifier", copa_tsa, 2 * 32 * 32 + 3 * 2 * 32 * 32),
    "resnet-copa": Tuner("resnet", CoPAConfig, 2 * 16 * 16),
    "resnet_classifier-copa-adapters": Tuner(
        "resnet_classifier", copa_tsa, 2 * 16 * 16 + 8 * 8 + 8 * 8 + 8 * 16 + 16 * 16
    ),
    "clip-adaptformer": Tuner("clip", partial(AdaptFormerConfig, bottleneck_dim=3), bottlenecks(4, 40, 3)),
    "clip_vision-adaptformer": Tuner("clip_vision", partial(AdaptFormerConfig, num_classes=40), bottlenecks(4, 40, 4)),
    "siglip_vision-adaptformer": Tuner(
        "siglip_vision", partial(AdaptFormerConfig, bottleneck_dim=3), bottlenecks(4, 40, 3)
    ),
    "vit_classifier-adaptformer": Tuner(
        "vit_classifier", partial(AdaptFormerConfig, num_classes=30), bottlenecks(3, 32, 4)
    ),
    "deit-adaptformer": Tuner("deit", partial(AdaptFormerConfig, bottleneck_dim=2), bottlenecks(3, 32, 2)),
    "dinov2_classifier-adaptformer": Tuner(
        "dinov2_classifier", partial(AdaptFormerConfig, bottleneck_dim=2), bottlenecks(3, 32, 2)
    ),
}
