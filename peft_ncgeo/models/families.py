"""Facts about the model families of Transformers, one entry each. Models of other families are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from . import timm_models
from .adapters import innermost
from .text_reading import CLS, MEAN, PADDED, EndOfText, TextReading


@dataclass(frozen=True)
class Family:
    """Facts about the models in one folder of `transformers.models`, taken from their code.

    The `no_...` fields are reasons why a model is refused; error messages show them after the model's name.

    Attributes:
        name: the family's name, as its authors write it.
        text: rules by which a text tower reads texts, or a function from the tower to these rules; None: not known.
        takes_prompts: True if all layers treat vectors after the image tokens as tokens, and only the image tower's
            last output is used.
        special_tokens: function from the image tower to its number of special tokens, for a tower that takes prompts
            between these and its patches; None: prompts follow the last token.
        image_inputs: names of the inputs that an image needs in addition to `pixel_values`. A `pixel_attention_mask`
            also reaches the layers, as a mask of their tokens.
        features: names of modules in an image tower whose output is the pooled feature, or has it as its first token;
            each of them runs once in a forward pass.
        pooled_tokens: function from the image tower to the number of first tokens whose mean is the feature, or None
            for all tokens; by default one, [CLS].
        width: function from the image tower to the feature's width, if it is not the width of the patches.
        residual_convolutions: True if a 1x1 convolution with the same stride can run beside each larger one of the
            encoder.
        heads: function from a classification model to the paths of its heads, whose logits are averaged if there are
            several; None: its head is `classifier`.
        reads_layers: names of classes that also read inner layers of an image tower, as every `...Backbone` does.
        mlp_norm: name of the layer norm in a block of the image tower whose input is the residual to which the block
            adds the output of its MLP, see [`~peft_ncgeo.models.blocks.find_mlp_norms`]; "": it is not known.
        no_texts: reason why texts are not read, if `text` is None.
        no_prompts: reason why images take no prompts.
        no_features: reason why no pooled image feature can be read.
        no_images: reason why pixels (B, C, H, W) alone are not a valid input.
    """

    name: str
    text: TextReading | Callable[[Any], TextReading | None] | None = None
    takes_prompts: bool = False
    features: tuple[str, ...] = ()
    reads_layers: tuple[str, ...] = ()
    special_tokens: Callable[[Any], int] | None = None
    image_inputs: tuple[str, ...] = ()
    pooled_tokens: Callable[[Any], int | None] = lambda tower: 1
    width: Callable[[Any], int] | None = None
    residual_convolutions: bool = False
    heads: Callable[[Any], Iterable[str]] | None = None
    mlp_norm: str = ""
    no_texts: str = ""
    no_prompts: str = ""
    no_features: str = ""
    no_images: str = ""


_LARGEST = TextReading(EndOfText(None))


def _first(tower: Any) -> TextReading | None:
    token_id = tower.eos_token_id
    return TextReading(EndOfText(token_id)) if isinstance(token_id, int) else None


def _first_or_legacy(tower: Any) -> TextReading | None:
    """Return CLIP's rule. The first CLIP configs have a wrong `eos_token_id`, 2: then the largest id marks [EOT]."""
    return _LARGEST if tower.eos_token_id == 2 else _first(tower)


def _roberta(tower: Any) -> TextReading:
    """Return the rule of towers whose position numbers start at `pad_token_id + 1`."""
    return replace(CLS, unused_positions=tower.config.pad_token_id + 1)


def _fc(model: Any) -> tuple[str, ...]:
    return ("fc",)


def _last_size(tower: Any) -> int:
    return tower.config.hidden_sizes[-1]


def _hidden_size(tower: Any) -> int:
    return tower.config.hidden_size


def _hidden_dim(tower: Any) -> int:
    return tower.config.hidden_dim


_CLIP = ("visual_projection", "post_layernorm")
_VIT = ("layernorm",)
_MULTIMODAL = "reads texts only together with images"
_VIDEO = "reads videos"
_CONVOLUTIONS = "has no image tokens"
_POOLS = "merges its image tokens from stage to stage"
_MAPS = "mixes its image tokens by convolutions or pooling over the whole map"
_AVERAGES = "averages its features in a forward pass where no module outputs the mean"
_WINDOWS = "attends within windows of a fixed number of tokens"

FAMILIES = {
    "clip": Family("CLIP", _first_or_legacy, True, _CLIP, mlp_norm="layer_norm2"),
    "siglip": Family("SigLIP", PADDED, True, ("head",), mlp_norm="layer_norm2"),
    "vit": Family("ViT", None, True, _VIT, mlp_norm="layernorm_after"),
    "deit": Family("DeiT", None, True, _VIT, mlp_norm="layernorm_after"),
    "dinov2": Family("DINOv2", None, True, _VIT, mlp_norm="norm2"),
    "dinov2_with_registers": Family("DINOv2 with registers", None, True, _VIT, mlp_norm="norm2"),
    "resnet": Family(
        "ResNet", features=("pooler",), width=_last_size, residual_convolutions=True, no_prompts=_CONVOLUTIONS
    ),
    "metaclip_2": Family("MetaCLIP 2", _first, True, _CLIP, mlp_norm="layer_norm2"),
    "clipseg": Family(
        "CLIPSeg", _first_or_legacy, True, _CLIP, ("CLIPSegForImageSegmentation",), mlp_norm="layer_norm2"
    ),
    "owlvit": Family("OwlViT", _LARGEST, True, _CLIP, mlp_norm="layer_norm2"),
    "owlv2": Family("OWLv2", _LARGEST, True, _CLIP, mlp_norm="layer_norm2"),
    "groupvit": Family(
        "GroupViT", _first_or_legacy, features=("visual_projection",), no_prompts="merges its image tokens into groups"
    ),
    "altclip": Family("AltCLIP", _roberta, True, _CLIP, mlp_norm="layer_norm2"),
    "chinese_clip": Family("Chinese CLIP", CLS, True, _CLIP, mlp_norm="layer_norm2"),
    "blip": Family("BLIP", CLS, True, ("visual_projection",), mlp_norm="layer_norm2"),
    "blip_2": Family("BLIP-2", None, True, no_texts=_MULTIMODAL, mlp_norm="layer_norm2"),
    "align": Family(
        "ALIGN",
        CLS,
        features=("pooler",),
        width=lambda tower: tower.encoder.blocks[-1].projection.project_bn.num_features,
        no_prompts=_CONVOLUTIONS,
    ),
    "bert": Family("BERT", CLS),
    "roberta": Family("RoBERTa", _roberta),
    "xlm_roberta": Family("XLM-RoBERTa", _roberta),
    "tipsv2": Family("TIPSv2", MEAN, True, _VIT, mlp_norm="norm2"),
    "vision_text_dual_encoder": Family("VisionTextDualEncoder", None, True, ("visual_projection",)),
    "vision_encoder_decoder": Family("VisionEncoderDecoder", None, True),
    "pixio": Family(
        "Pixio",
        None,
        True,
        _VIT,
        pooled_tokens=lambda tower: tower.embeddings.n_cls_tokens,
        mlp_norm="layernorm_after",
    ),
    "vit_msn": Family("ViT-MSN", None, True, _VIT, mlp_norm="layernorm_after"),
    "ijepa": Family("I-JEPA", None, True, _VIT, pooled_tokens=lambda tower: None, mlp_norm="layernorm_after"),
    "beit": Family(  # takes prompts without relative biases
        "BEiT", None, True, ("pooler",), reads_layers=("BeitForSemanticSegmentation",), mlp_norm="layernorm_after"
    ),
    "regnet": Family(
        "RegNet", features=("pooler",), width=_last_size, residual_convolutions=True, no_prompts=_CONVOLUTIONS
    ),
    "bit": Family("BiT", features=("pooler",), width=_last_size, residual_convolutions=True, no_prompts=_CONVOLUTIONS),
    "aimv2": Family(
        "AIMv2",
        features=("visual_projection",),
        no_texts="reads texts causally only where some of them are padded",
        no_prompts="keeps its patch embeddings in a place that prompts do not support yet",
    ),
    "siglip2": Family(
        "SigLIP 2",
        PADDED,
        True,
        ("head",),
        image_inputs=("pixel_attention_mask", "spatial_shapes"),
        mlp_norm="layer_norm2",
    ),
    "flava": Family(
        "FLAVA",
        features=_VIT,
        no_texts="projects every token of a text",
        no_prompts="passes tuples instead of tokens from layer to layer",
        mlp_norm="layernorm_after",
    ),
    "data2vec": Family(
        "Data2Vec",
        features=("pooler",),
        no_prompts="gives its layers position biases of a fixed size",
        mlp_norm="layernorm_after",
    ),
    "dinov3_vit": Family(
        "DINOv3",
        None,
        True,
        ("norm",),
        special_tokens=lambda tower: 1 + tower.embeddings.register_tokens.shape[1],
        mlp_norm="norm2",
    ),
    "dinov3_convnext": Family("DINOv3 ConvNeXt", features=("layer_norm",), width=_last_size, no_prompts=_CONVOLUTIONS),
    "mlcd": Family(
        "MLCD", no_prompts="rotates its tokens by their 2-D positions in the image", mlp_norm="layer_norm2"
    ),
    "vit_mae": Family("ViTMAE", no_prompts="drops patches at random"),
    "yolos": Family("YOLOS", no_prompts="reads detection tokens at the end, where prompts would be placed"),
    "swin": Family("Swin", features=("pooler",), width=_hidden_size, no_prompts=_WINDOWS),
    "swinv2": Family("Swin V2", features=("pooler",), width=_hidden_size, no_prompts=_WINDOWS),
    "hiera": Family("Hiera", features=("pooler",), width=_hidden_size, no_prompts=_POOLS),
    "pvt": Family("PVT", features=("encoder.layer_norm",), width=_last_size, no_prompts=_POOLS),
    "pvt_v2": Family("PVTv2", no_prompts=_POOLS, no_features=_AVERAGES),
    "segformer": Family("SegFormer", no_prompts=_POOLS, no_features=_AVERAGES),
    "cvt": Family("CvT", no_prompts=_POOLS, no_features=_AVERAGES),
    "levit": Family("LeViT", no_prompts=_POOLS, no_features=_AVERAGES),
    "poolformer": Family("PoolFormer", no_prompts=_MAPS, no_features=_AVERAGES),
    "swiftformer": Family(
        "SwiftFormer", heads=lambda model: ("head", "dist_head"), no_prompts=_MAPS, no_features=_AVERAGES
    ),
    "mobilevit": Family("MobileViT", no_prompts=_MAPS, no_features=_AVERAGES),
    "mobilevitv2": Family("MobileViTV2", no_prompts=_MAPS, no_features=_AVERAGES),
    "focalnet": Family("FocalNet", features=("pooler",), width=lambda tower: tower.num_features, no_prompts=_MAPS),
    "hgnet_v2": Family("HGNetV2", heads=_fc, no_prompts=_CONVOLUTIONS),
    "pp_lcnet": Family("PP-LCNet", no_prompts=_CONVOLUTIONS),
    "convnext": Family("ConvNeXt", features=("layernorm",), width=_last_size, no_prompts=_CONVOLUTIONS),
    "convnextv2": Family("ConvNeXt V2", features=("layernorm",), width=_last_size, no_prompts=_CONVOLUTIONS),
    "efficientnet": Family("EfficientNet", features=("pooler",), width=_hidden_dim, no_prompts=_CONVOLUTIONS),
    "mobilenet_v1": Family(
        "MobileNetV1",
        features=("pooler",),
        width=lambda tower: innermost(tower.layer[-1].convolution).out_channels,
        no_prompts=_CONVOLUTIONS,
    ),
    "mobilenet_v2": Family(
        "MobileNetV2",
        features=("pooler",),
        width=lambda tower: innermost(tower.conv_1x1.convolution).out_channels,
        no_prompts=_CONVOLUTIONS,
    ),
    "textnet": Family("TextNet", heads=_fc, no_prompts=_CONVOLUTIONS),
    "timm_wrapper": Family(
        "timm",
        None,
        True,
        reads_layers=("FeatureGetterNet",),
        heads=timm_models.find_heads,
        no_prompts="is not timm's plain VisionTransformer, the only model of timm whose tokens are known",
    ),
    "x_clip": Family("X-CLIP", _LARGEST, True, no_images=_VIDEO),
    "videomae": Family("VideoMAE", None, True, no_images=_VIDEO),
    "vivit": Family("ViViT", None, True, no_images=_VIDEO),
    "timesformer": Family(
        "TimeSformer", no_prompts="sorts its tokens by frame and position for attention over each", no_images=_VIDEO
    ),
    "videoprism": Family("VideoPrism", no_prompts=_VIDEO, no_images=_VIDEO),
}


def family_name(module: nn.Module, method: str = "forward") -> str | None:
    """Return the folder of `transformers.models` that defines a module's method, such as "clip", or None.

    A subclass that overrides the method belongs to no family. Modules of timm belong to Transformers' wrapper.

    Args:
        method: name of the method.
    """
    owner = next((parent for parent in type(module).__mro__ if method in vars(parent)), object)
    parts = owner.__module__.split(".")
    if parts[:2] == ["timm", "models"]:
        return "timm_wrapper"
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else None


def find_family(module: nn.Module, method: str = "forward") -> Family | None:
    """Return the entry of the family that defines a module's method, or None for an unknown family."""
    return FAMILIES.get(family_name(module, method) or "")


def find_text_reading(tower: nn.Module) -> TextReading | None:
    """Return the rules by which a text tower reads texts, or None if its family is unknown."""
    family = find_family(tower)
    rules = None if family is None else family.text
    return rules(tower) if callable(rules) else rules


def reads_layers(module: nn.Module) -> bool:
    """Return True for a model that also reads inner layers of its image tower, whose outputs would include prompts."""
    family = find_family(module)
    names = {"BackboneMixin", *(family.reads_layers if family else ())}
    return any(parent.__name__ in names for parent in type(module).__mro__)


def first_reason(modules: Iterable[nn.Module], reason: str) -> str:
    """Return the first non-empty `reason`, a field of [`Family`], of the modules' families, or ""."""
    families = (find_family(module) for module in modules)
    return next((found for family in families if family and (found := getattr(family, reason))), "")


def why_no_texts(model: nn.Module) -> str:
    """Return the reason why the texts of a model are not read, as words after its name."""
    return first_reason(model.modules(), "no_texts") or "reads texts in a way that is not known"


def list_families(known: Callable[[Family], Any]) -> str:
    """Return the names of the families for which `known` is true, as a list for an error message."""
    *names, last = [family.name for family in FAMILIES.values() if known(family)]
    return f"{', '.join(names)} and {last}"
