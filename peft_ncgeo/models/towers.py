"""Search for the towers of CLIP-like and ViT-like models: embeddings, layers, pooling and injection points.

Towers are found by structure, not by fixed paths, so wrapped, renamed and nested models work too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from . import timm_models
from .adapters import innermost, unwrap
from .families import (
    family_name,
    find_family,
    find_text_reading,
    first_reason,
    list_families,
    reads_layers,
    why_no_texts,
)
from .heads import classification_head
from .image_classifier import ImageClassifierModel
from .text_reading import TextReading
from .text_setting import active_logit_bias

_TABLES = ("token_embedding", "word_embeddings")  # names of the embeddings of tokens


@dataclass(frozen=True)
class Tower:
    """Description of one transformer tower: dotted paths of its parts in the model, and its sizes."""

    embeddings: str
    layers: tuple[str, ...]
    width: int
    max_length: int | None = None  # text only: number of tokens, special ones included
    reading: TextReading | None = None  # text only: rules by which it reads texts; None: unknown
    table: str = ""  # text only: name of the embeddings of tokens in `embeddings`
    special_tokens: int | None = None  # vision only: number of tokens before prompts; None: prompts are the last
    is_masked: bool = False  # vision only: True if layers get a mask of the tokens that the embeddings give
    grid: str = ""  # vision only: module that tells the size of the feature maps that are made of all layers' tokens


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _layer_list(module: nn.Module) -> tuple[str, nn.ModuleList] | None:
    for path in ("encoder.layers", "encoder.layer", "layers", "model.layer"):
        found: nn.Module | None = module
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList):
            return path, found
    return None


def find_towers(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, Tower]:
    """Return the model's towers as `{"text": Tower, "vision": Tower}`; a model may have one of them or neither.

    A tower is a module with `embeddings` and a list of layers. It reads text if its embeddings hold a
    `token_embedding` or `word_embeddings`, and images if they hold patch embeddings. In timm's plain
    VisionTransformer, the module `norm_pre`, whose output enters the layers, takes the place of `embeddings`.
    `exclude` names modules (by the full path or its end) whose towers are skipped.

    Raises:
        ValueError: `exclude` names a module that the model does not have.
    """
    towers: dict[str, Tower] = {}
    found: set[str] = set()
    for name, module in model.named_modules():
        excluded = {end for end in exclude if name == end or name.endswith("." + end)}
        if excluded:
            found |= excluded
            continue
        blocks = timm_models.find_blocks(module)
        if blocks:
            place, paths = _join(name, "norm_pre"), tuple(_join(name, block) for block in blocks)
            width: Any = module.embed_dim
            towers.setdefault("vision", Tower(place, paths, width, grid=_join(name, "patch_embed")))
        embeddings = getattr(module, "embeddings", None)
        layers = _layer_list(module)
        if not isinstance(embeddings, nn.Module) or layers is None:
            continue
        path = _join(name, "embeddings")
        layer_paths = tuple(_join(name, layers[0], str(i)) for i in range(len(layers[1])))
        table = next((name for name in _TABLES if hasattr(embeddings, name)), None)
        if table is not None:
            towers.setdefault("text", _text_tower(module, path, layer_paths, table))
        elif "vision" not in towers:
            width = _patch_width(embeddings)
            if width is not None:
                family = find_family(module)
                special_tokens = family.special_tokens(module) if family and family.special_tokens else None
                is_masked = family is not None and "pixel_attention_mask" in family.image_inputs
                towers["vision"] = Tower(path, layer_paths, width, special_tokens=special_tokens, is_masked=is_masked)
    unknown = set(exclude) - found
    if unknown:
        raise ValueError(f"exclude_modules names {sorted(unknown)[0]!r}, which {type(model).__name__} does not have.")
    return towers


def _text_tower(module: Any, path: str, layers: tuple[str, ...], table: str) -> Tower:
    embeddings, reading = module.embeddings, find_text_reading(module)
    positions = getattr(embeddings, "position_embedding", getattr(embeddings, "position_embeddings", None))
    positions, length = innermost(positions), None
    if isinstance(positions, nn.Embedding):
        length = positions.num_embeddings - (reading.unused_positions if reading else 0)
    return Tower(path, layers, innermost(getattr(embeddings, table)).embedding_dim, length, reading, table)


def _patch_width(embeddings: nn.Module) -> int | None:
    """Return the width of patch embeddings, or None for other embeddings.

    In CLIP, `patch_embedding` is a convolution, in SigLIP 2 a linear layer. In the ViT family, `patch_embeddings` is a
    module that holds the convolution; in DINOv3 it is the convolution.
    """
    patches = getattr(embeddings, "patch_embedding", None) or getattr(embeddings, "patch_embeddings", None)
    patches = innermost(patches)
    patches = innermost(getattr(patches, "projection", patches))
    return getattr(patches, "out_channels", None) or getattr(patches, "out_features", None)


class Pooling(NamedTuple):
    """Path of the module whose output holds an image's feature, and the feature's width d.

    If the output holds tokens, the feature is the mean of its first `tokens` rows (None: of all rows). If `is_input`,
    the module's input is read in place of its output.
    """

    path: str
    width: int
    tokens: int | None = 1
    is_input: bool = False

    def read(self, output: Tensor) -> Tensor:
        """Return the features (B, d) in the module's output, or in its input if that is the feature."""
        rows = channels_last(output, self.width)
        return rows[:, : self.tokens].mean(1) if rows.dim() == 3 else rows


def channels_last(output: Tensor, width: int) -> Tensor:
    """Return a pooled map (B, d, 1) or (B, d, 1, 1) as (B, d); return features (B, d) or (B, L, d) unchanged."""
    return output if output.shape[-1] == width else output.flatten(1)


def find_pooling(model: nn.Module) -> Pooling:
    """Find the module that outputs the pooled image feature of a vision backbone.

    It is CLIP's `visual_projection`; the last layer norm of ViT, DeiT, DINOv2, DINOv3 and of CLIP's vision tower
    without projection; SigLIP's pooling head; the pooler of ResNet, BEiT and Swin. In a model of timm, the feature
    enters the head.
    [`~peft_ncgeo.models.families.FAMILIES`] lists the others.

    Raises:
        ValueError: the model is of an unknown family, returns feature maps, or reads images only together with texts.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    base = unwrap(model)
    if isinstance(base, ImageClassifierModel):
        path = "projection" if base.config.projector_dim is None else "projector"
        return Pooling(path, base.config.feature_size)
    if hasattr(base, "timm_model"):
        return _timm_pooling(base)
    vision = find_towers(model).get("vision")
    places = [(owner, "visual_projection") for owner in modules]
    owners = [] if vision is None else [parent_path(vision.embeddings)]
    owners += [path for path, module in modules.items() if getattr(module, "main_input_name", None) == "pixel_values"]
    for owner in owners:
        family = find_family(modules[owner])
        places += [(owner, name) for name in (family.features if family else ()) if name != "visual_projection"]
    if family_name(base) is not None and find_family(base) is None:  # it may change its tower's feature
        places = []
    for owner, name in places:
        path, holder = _join(owner, name), modules[owner]
        projects = name == "visual_projection" and hasattr(holder, "get_image_features")  # a subclass may too
        family = find_family(holder, "get_image_features" if projects else "forward")
        if path not in modules or family is None or name not in family.features or reads_layers(holder):
            continue
        asked = inspect.signature(base.forward).parameters
        if not hasattr(base, "get_image_features") and not {"input_ids", "decoder_input_ids"}.isdisjoint(asked):
            raise ValueError(f"{type(base).__name__} reads an image only together with a text; use its image tower.")
        if name == "visual_projection":
            return Pooling(path, _width_of_output(modules[path]))
        width = family.width(holder) if family.width else vision.width if vision else None
        if width is not None:
            return Pooling(path, width, family.pooled_tokens(holder))
    name, reason = type(base).__name__, first_reason(model.modules(), "no_features")
    if any(map(reads_layers, modules.values())):
        reason = "makes feature maps of inner layers, not one feature"
    raise ValueError(
        f"{f'{name} {reason}' if reason else f'The pooled feature of {name} is not known'}; use one of these "
        f"backbones: {list_families(lambda family: family.features)}."
    )


def _timm_pooling(model: Any) -> Pooling:
    """Return the place of the output of `forward_head(..., pre_logits=True)`: the input of the last module."""
    _check_timm_feature(model)
    last = timm_models.find_last_modules(model)
    if len(last) > 1:
        raise ValueError(
            f"timm's {type(model.timm_model).__name__} has {len(last)} heads, so its pooled feature cannot be changed "
            "for one of them; use a model of timm with one head."
        )
    return Pooling(last[0], model.timm_model.head_hidden_size, is_input=True)


def _check_timm_feature(model: Any) -> None:
    if reason := timm_models.why_no_feature(model):
        raise ValueError(
            f"timm's {type(model.timm_model).__name__} {reason}; use a model of timm that pools one feature an image."
        )


def find_residual_places(model: nn.Module) -> list[str]:
    """Return the paths of the modules to which residual adapters are added.

    In a vision transformer, these are the attention and the MLP of every layer; in a ResNet (also timm's), every
    convolution in its stages with a kernel larger than 1x1.

    Raises:
        ValueError: a transformer layer lacks attention or MLP, or the model has no such modules.
    """
    vision, name = find_towers(model).get("vision"), type(unwrap(model)).__name__
    modules = dict(model.named_modules())
    places = []
    if vision is not None:
        for layer in vision.layers:
            parts = [_join(layer, part) for part in ("attention", "self_attn", "attn", "mlp")]
            found = [part for part in parts if part in modules]
            if len(found) != 2:
                raise ValueError(f"{layer} of {name} has no attention and MLP for residual adapters; leave them out.")
            places += found
        return places
    for path, module in modules.items():
        if found := timm_models.find_convolutions(module):
            return [_join(path, place) for place in found]
    stages = tuple(
        f"{path}.encoder." if path else "encoder."
        for path, module in modules.items()
        if (family := find_family(module)) and family.residual_convolutions and hasattr(module, "pooler")
    )
    inside = tuple(f"{path}." for path, module in modules.items() if isinstance(module, BaseTunerLayer))
    places = [
        path
        for path, module in modules.items()
        if path.startswith(stages) and not path.startswith(inside)
        if isinstance(inner := innermost(module), nn.Conv2d) and max(inner.kernel_size) > 1
    ]
    if not places:
        raise ValueError(f"{name} has no layers known to take residual adapters; leave them out.")
    return places


def parent_path(path: str) -> str:
    """Return the path of the parent of the module at this path."""
    return path.rpartition(".")[0]


def _width_of_output(projection: nn.Module) -> int:
    """Return the output width of a linear layer, or of the last one in a `Sequential`, with or without adapters."""
    inner = innermost(projection)
    layers = reversed(inner) if isinstance(inner, nn.Sequential) else [inner]
    return next(width for layer in layers if (width := getattr(innermost(layer), "out_features", None)))


def text_tower(model: nn.Module) -> Tower:
    """Return the text tower of a dual encoder; its rules of reading texts and its number of tokens are known.

    Raises:
        NotImplementedError: they are not known, or another part of the model changes the output of the tower.
    """
    base = unwrap(model)
    tower = find_towers(base).get("text")
    own = find_family(base, "get_text_features")
    if tower is None or tower.reading is None or (own is None and family_name(base, "get_text_features")):
        raise NotImplementedError(
            f"{type(base).__name__} {why_no_texts(base)}, so class names cannot be given to it as texts; tune its "
            f"image tower alone, or use one of {list_families(lambda family: family.text)}."
        )
    if tower.max_length is None:
        tower = replace(tower, max_length=base.config.text_config.max_position_embeddings)
    return tower


def max_text_length(model: nn.Module) -> int:
    """Return the number of tokens that a dual encoder's text tower takes, including special tokens."""
    length = text_tower(model).max_length
    assert length is not None  # text_tower knows it
    return length


def reads_text(model: nn.Module) -> bool:
    """Return True if the model has a text tower and an image tower, as CLIP has."""
    return hasattr(unwrap(model), "get_text_features")


def check_encoders(model: nn.Module) -> None:
    """Check that a model can encode pixels (B, C, H, W) alone, and has class texts or a head.

    Raises:
        TypeError: the object is not a model.
        ValueError: the model reads no text and has no classification head, or passes different features to several
            heads.
        NotImplementedError: the model reads videos, has text features but no image features, or has a text tower of an
            unknown family.
    """
    base = unwrap(model)
    if not isinstance(base, nn.Module):
        raise TypeError(f"Expected a model such as CLIPModel, or a PeftModel around one, got {type(base).__name__}.")
    reason = first_reason([base], "no_images")
    if not reason and reads_text(base) and not hasattr(base, "get_image_features"):
        reason = "has no get_image_features"
    if reason:
        raise NotImplementedError(f"{type(base).__name__} {reason}; images alone, (B, C, H, W), cannot be encoded.")
    if reads_text(base):
        text_tower(base)
    elif classification_head(base) is None:
        mend = "use CLIPModel or an ...ForImageClassification model"
        if _knows_pooling(base):
            mend = "wrap it with ImageClassifier.from_backbone(model, class_names)"
        raise ValueError(
            f"{type(base).__name__} has neither text features nor a classification head that is known; {mend}."
        )
    elif hasattr(base, "timm_model"):
        _check_timm_feature(base)


def _knows_pooling(model: nn.Module) -> bool:
    try:
        return bool(find_pooling(model))
    except (ValueError, NotImplementedError):
        return False


def logit_scale(model: nn.Module) -> Tensor:
    """Return the logarithm of a dual encoder's learned scale of cosines, a scalar tensor.

    ALIGN has a temperature, the inverse of the scale.

    Raises:
        ValueError: it is offloaded, so that only a forward pass of the whole model loads it.
    """
    base = unwrap(model)
    name = "logit_scale" if hasattr(base, "logit_scale") else "temperature"
    scale = _scalar(base, name)
    return scale if name == "logit_scale" else -scale.log()


def logit_bias(model: nn.Module) -> Tensor | None:
    """Return the bias that SigLIP adds to its logits, or the bias of the active adapter from a multi-label training.

    Return None if there is neither, as in CLIP.

    Raises:
        ValueError: it is offloaded.
    """
    base = unwrap(model)
    if hasattr(base, "logit_bias"):
        return _scalar(base, "logit_bias")
    own = active_logit_bias(model) if reads_text(model) else None
    return None if own is None else torch.tensor(own, dtype=torch.float64)


def _scalar(model: nn.Module, name: str) -> Tensor:
    scalar: Tensor = getattr(model, name)
    if scalar.is_meta:
        raise ValueError(f'{name} is offloaded; keep it on a device, with device_map={{..., "{name}": "cpu"}}.')
    return scalar
