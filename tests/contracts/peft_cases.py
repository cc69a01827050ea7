"""Every method on every kind of model, for the tests of what PEFT promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft import (
    get_peft_model,
)
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
    SiglipVisionConfig,
    SiglipVisionModel,
)

from peft_ncgeo import CoPAConfig, NPTConfig, PrototypeConfig
from peft_ncgeo.geometry import simplex_etf
from peft_ncgeo.models.adapters import unwrap
from peft_ncgeo.models.image_encoder import image_features
from peft_ncgeo.models.text_encoder import text_features
from peft_ncgeo.models.towers import find_towers
from peft_ncgeo.tuners.copa import CoPALayer

from ..conftest import TEXT, VISION, VIT, pixels, texts, tiny, tiny_clip, tiny_vit, tiny_vit_classifier

PHRASE = [6, 7, 8, 9]  # token ids: tiny models have no tokenizer


@dataclass
class Case:
    build: Callable
    config: Callable[[], NPTConfig | PrototypeConfig | CoPAConfig]
    parameters: int
    slots: int = 0  # text slots the adapter owns
    constants: int = 0  # numbers in the adapter's file that are not trained
    transformer: bool = True  # attention and gradient checkpointing

    @property
    def prefix(self) -> str:
        return f"{self.config().peft_type.value.lower()}_"


def clip_part(cls, config):
    return partial(tiny, cls, config)


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


CLIP = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24, num_labels=5)
SIGLIP_VISION = {name: value for name, value in VISION.items() if name != "projection_dim"}
SIGLIP = SiglipConfig(
    text_config={**{k: v for k, v in TEXT.items() if k != "projection_dim"}, "hidden_size": 40, "projection_size": 40},
    vision_config=SIGLIP_VISION,
)
DINO = Dinov2Config(**{k: v for k, v in VIT.items() if k != "intermediate_size"}, mlp_ratio=2)
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
PROMPTS = {"num_vision_tokens": 8, "vision_depth": 2}
IVLP, MAPLE = 2 * 4 * 32 + 3 * 4 * 40, 3 * 2 * 32 + 2 * (32 * 40 + 40)
CASES = {
    "clip-coop": Case(tiny_clip, coop, 6 * 32, slots=6),
    "clip-ivlp": Case(tiny_clip, ivlp, IVLP, slots=4),
    "clip-ivlp-first_layer": Case(tiny_clip, partial(ivlp, first_layer=1, vision_depth=2), IVLP - 4 * 40, slots=4),
    "clip-prompt_ot": Case(tiny_clip, prompt_ot, 3 * 4 * 32 + 4 * 4 * 40, slots=4),
    "clip-vpt": Case(tiny_clip, vpt, 2 * 8 * 40),
    "clip-maple": Case(tiny_clip, maple, MAPLE, slots=2),
    "clip-maple-first_layer": Case(tiny_clip, partial(maple, first_layer=1, text_depth=2), MAPLE - 2 * 32, slots=2),
    "clip_text": Case(clip_part(CLIPTextModel, CLIP.text_config), text_only, 2 * 4 * 32, slots=4),
    "clip_text_projection": Case(
        clip_part(CLIPTextModelWithProjection, CLIP.text_config), text_only, 2 * 4 * 32, slots=4
    ),
    "clip_vision": Case(clip_part(CLIPVisionModel, CLIP.vision_config), vpt, 2 * 8 * 40),
    "clip_vision_projection": Case(clip_part(CLIPVisionModelWithProjection, CLIP.vision_config), vpt, 2 * 8 * 40),
    "clip_classifier": Case(clip_part(CLIPForImageClassification, CLIP), vpt, 2 * 8 * 40),
    "siglip-vpt": Case(clip_part(SiglipModel, SIGLIP), vpt, 2 * 8 * 40),
    "siglip_vision": Case(clip_part(SiglipVisionModel, SiglipVisionConfig(**SIGLIP_VISION)), vpt, 2 * 8 * 40),
    "vit-vpt": Case(tiny_vit, vpt, 2 * 8 * 32),
    "vit-vpt-first_layer": Case(tiny_vit, partial(vpt, first_layer=1), 2 * 8 * 32),
    "vit_classifier-vpt": Case(tiny_vit_classifier, vpt, 2 * 8 * 32),
    "deit": Case(clip_part(DeiTModel, DeiTConfig(**VIT)), vpt, 2 * 8 * 32),
    "deit_classifier": Case(clip_part(DeiTForImageClassification, DeiTConfig(**VIT)), vpt, 2 * 8 * 32),
    "dinov2": Case(clip_part(Dinov2Model, DINO), vpt, 2 * 8 * 32),
    "dinov2_classifier": Case(clip_part(Dinov2ForImageClassification, DINO), vpt, 2 * 8 * 32),
    "vit_classifier-prototypes": Case(tiny_vit_classifier, prototypes, projector(32, 8), constants=5 * 8),
    "vit_classifier-prototypes-prompts": Case(
        tiny_vit_classifier, partial(prototypes, **PROMPTS), projector(32, 8) + 2 * 8 * 32, constants=5 * 8
    ),
    "vit_classifier-prototypes-given": Case(
        tiny_vit_classifier,
        partial(given, **PROMPTS, first_layer=1),
        projector(32, 6) + 2 * 8 * 32,
        constants=5 * 6,
    ),
    "vit_classifier-prototypes-trained": Case(
        tiny_vit_classifier, partial(prototypes, **PROMPTS, trainable=True), projector(32, 8) + 2 * 8 * 32 + 5 * 8
    ),
    "dinov2_classifier-prototypes": Case(  # [CLS] beside the mean of the patches
        clip_part(Dinov2ForImageClassification, DINO),
        partial(uneven, **PROMPTS),
        projector(64, 8) + 2 * 8 * 32,
        constants=5 * 8,
    ),
    "deit_classifier-prototypes": Case(
        clip_part(DeiTForImageClassification, DeiTConfig(**VIT)),
        partial(given, **PROMPTS, trainable=True),
        projector(32, 6) + 2 * 8 * 32 + 5 * 6,
    ),
    "clip_classifier-prototypes": Case(
        clip_part(CLIPForImageClassification, CLIP),
        partial(prototypes, **PROMPTS),
        projector(40, 8) + 2 * 8 * 40,
        constants=5 * 8,
    ),
    "clip_classifier-prototypes-trained": Case(
        clip_part(CLIPForImageClassification, CLIP), partial(uneven, trainable=True), projector(40, 8) + 5 * 8
    ),
    "resnet_classifier-prototypes": Case(
        clip_part(ResNetForImageClassification, RESNET), given, projector(16, 6), constants=5 * 6, transformer=False
    ),
    "resnet_classifier-prototypes-trained": Case(
        clip_part(ResNetForImageClassification, RESNET),
        partial(uneven, trainable=True),
        projector(16, 8) + 5 * 8,
        transformer=False,
    ),
    "clip-copa": Case(tiny_clip, CoPAConfig, 2 * 24 * 24),
    "clip_vision-copa-adapters": Case(
        clip_part(CLIPVisionModel, CLIP.vision_config), copa_tsa, 2 * 40 * 40 + 4 * 2 * 40 * 40
    ),
    "clip_vision_projection-url": Case(clip_part(CLIPVisionModelWithProjection, CLIP.vision_config), url, 24 * 24),
    "siglip_vision-copa-adapters": Case(
        clip_part(SiglipVisionModel, SiglipVisionConfig(**SIGLIP_VISION)), copa_tsa, 2 * 40 * 40 + 4 * 2 * 40 * 40
    ),
    "vit-copa": Case(tiny_vit, CoPAConfig, 2 * 32 * 32),
    "vit_classifier-copa-adapters": Case(tiny_vit_classifier, copa_tsa, 2 * 32 * 32 + 3 * 2 * 32 * 32),
    "deit-url-adapters": Case(
        clip_part(DeiTModel, DeiTConfig(**VIT)), partial(copa_tsa, shared=True), 32 * 32 + 3 * 2 * 32 * 32
    ),
    "dinov2-copa": Case(clip_part(Dinov2Model, DINO), CoPAConfig, 2 * 32 * 32),
    "dinov2_classifier-copa-adapters": Case(
        clip_part(Dinov2ForImageClassification, DINO), copa_tsa, 2 * 32 * 32 + 3 * 2 * 32 * 32
    ),
    "resnet-copa": Case(clip_part(ResNetModel, RESNET), CoPAConfig, 2 * 16 * 16, transformer=False),
    "resnet_classifier-copa-adapters": Case(
        clip_part(ResNetForImageClassification, RESNET),
        copa_tsa,
        2 * 16 * 16 + 8 * 8 + 8 * 8 + 8 * 16 + 16 * 16,
        transformer=False,
    ),
}


def outputs(model, slots: int = 4) -> torch.Tensor:
    """Everything the model computes from images and texts, as one row, and what an adapter does to prototypes."""
    moved = torch.zeros(1)
    for heads in [layer.heads for layer in model.modules() if isinstance(layer, CoPALayer)]:
        if heads:
            moved = (heads[1] - torch.eye(len(heads[1]))).sum()[None]
    out = model_outputs(model, slots)
    return torch.cat([out, moved.to(out.dtype)])


def model_outputs(model, slots: int) -> torch.Tensor:
    inputs = texts(max(slots, 4))
    towers = find_towers(unwrap(model))
    if hasattr(unwrap(model), "get_image_features"):
        image = image_features(model, pixels()).flatten()
        if isinstance(unwrap(model), SiglipModel):
            return image
        return torch.cat([image, text_features(model, **inputs).flatten()])
    images = pixels().to(unwrap(model).dtype)  # ResNet does not cast them itself
    out = model(**inputs) if "text" in towers else model(pixel_values=images)
    names = ("logits", "text_embeds", "image_embeds", "pooler_output", "last_hidden_state")
    found = [out[name].flatten() for name in names if out.get(name) is not None]
    return torch.cat(found[:1] if "logits" in out else found)


def adapted(case: Case, seed: int = 1, build=None, name: str = "default"):
    torch.manual_seed(seed)
    model = get_peft_model((build or case.build)(), case.config(), adapter_name=name)
    far = 0.05 if case.prefix == "ncgeo_copa_" else 0.3  # so that equality means something; d x d maps act d times
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * far)
    return model.eval()


def assert_same(got: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    """Bit-equal; coupled prompts pass through a matrix product whose last bit depends on where the weights lie."""
    if getattr(case.config(), "coupling", None) == "coupled":
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    else:
        assert torch.equal(got, expected)
