"""Where CLIP-like and ViT-like models keep embeddings, layers, projection and classification head.

Everything is found by structure, never by a path written down, so wrapped, renamed and nested models work alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .families import (
    EndOfText,
    family_name,
    find_end_of_text,
    find_family,
    first_reason,
    list_families,
    reads_layers,
    why_no_end_of_text,
)
from .substitution import Recorder, substitute

HEAD = "classifier"  # what Transformers' ...ForImageClassification models call theirs


@dataclass(frozen=True)
class Tower:
    """One transformer tower: dotted paths of its parts inside the model, and its sizes."""

    embeddings: str
    layers: tuple[str, ...]
    width: int
    max_length: int | None = None  # text only: positions, [BOS] and [EOT] included
    end_of_text: EndOfText | None = None  # text only: where it pools; None: elsewhere, or that is not known


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _layer_list(module: nn.Module) -> tuple[str, nn.ModuleList] | None:
    for path in ("encoder.layers", "encoder.layer", "layers"):
        found: nn.Module | None = module
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleList):
            return path, found
    return None


def find_towers(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, Tower]:
    """The model's towers as `{"text": Tower, "vision": Tower}`; a model may have one of them or neither.

    A tower is a module with `embeddings` and a list of layers. It reads text if its embeddings hold a
    `token_embedding`, images if they hold patch embeddings. `exclude` names modules (full path, or its end) whose
    towers are passed over.

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
        embeddings = getattr(module, "embeddings", None)
        layers = _layer_list(module)
        if not isinstance(embeddings, nn.Module) or layers is None:
            continue
        path = _join(name, "embeddings")
        layer_paths = tuple(_join(name, layers[0], str(i)) for i in range(len(layers[1])))
        if hasattr(embeddings, "token_embedding") and "text" not in towers:
            positions = _innermost(getattr(embeddings, "position_embedding", None))
            length = positions.num_embeddings if isinstance(positions, nn.Embedding) else None
            width = _innermost(embeddings.token_embedding).embedding_dim
            towers["text"] = Tower(path, layer_paths, width, length, find_end_of_text(module))
        elif "vision" not in towers:
            # CLIP says `patch_embedding`, the ViT family `patch_embeddings` with the convolution one level down.
            patches = getattr(embeddings, "patch_embedding", None)
            patches = patches or getattr(getattr(embeddings, "patch_embeddings", None), "projection", None)
            patches = _innermost(patches)
            if hasattr(patches, "out_channels"):
                towers["vision"] = Tower(path, layer_paths, patches.out_channels)
    unknown = set(exclude) - found
    if unknown:
        raise ValueError(f"exclude_modules names {sorted(unknown)[0]!r}, which {type(model).__name__} does not have.")
    return towers


class Pooling(NamedTuple):
    """The module whose output holds an image's feature (its path in the model), and the feature's width d."""

    path: str
    width: int


def find_pooling(model: nn.Module) -> Pooling:
    """Where the pooled image feature leaves a vision backbone.

    CLIP's `visual_projection`; the last layer norm of ViT, DeiT, DINOv2 and of CLIP's vision tower without projection;
    SigLIP's pooling head; ResNet's pooler. Other families are in [`~peft_ncgeo.models.families.FAMILIES`].

    Raises:
        ValueError: the model is of no such family, returns feature maps, or reads images only together with texts.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    base = unwrap(model)
    vision = find_towers(model).get("vision")
    tower = None if vision is None else parent_path(vision.embeddings)
    places = [(owner, "visual_projection") for owner in modules]
    places += [(tower, name) for name in ("head", "post_layernorm", "layernorm") if tower is not None]
    places += [(owner, "pooler") for owner in modules]
    if family_name(base) is not None and find_family(base) is None:  # who knows what it makes of its tower's feature
        places = []
    for owner, name in places:
        path, holder = _join(owner, name), modules[owner]
        projects = name == "visual_projection" and hasattr(holder, "get_image_features")  # a child's own pass may too
        family = find_family(holder, "get_image_features" if projects else "forward")
        if path not in modules or family is None or name not in family.features or reads_layers(holder):
            continue
        asked = inspect.signature(base.forward).parameters
        if not hasattr(base, "get_image_features") and not {"input_ids", "decoder_input_ids"}.isdisjoint(asked):
            raise ValueError(f"{type(base).__name__} reads an image only together with a text; take its image tower.")
        if name == "visual_projection":
            return Pooling(path, _width_of_output(modules[path]))
        return Pooling(path, holder.config.hidden_sizes[-1] if vision is None else vision.width)
    raise ValueError(
        f"The pooled feature of {type(base).__name__} is not known; backbones are "
        f"{list_families(lambda family: family.features)}."
    )


def find_residual_places(model: nn.Module) -> list[str]:
    """Paths of the modules beside which residual adapters go.

    In the vision tower of a transformer every layer's attention and MLP, in a ResNet every convolution of its stages
    that sees neighbours (3x3, not 1x1).

    Raises:
        ValueError: a transformer whose layers do not have both, or a model in which there is no such place.
    """
    vision, name = find_towers(model).get("vision"), type(unwrap(model)).__name__
    modules = dict(model.named_modules())
    places = []
    if vision is not None:
        for layer in vision.layers:
            found = [_join(layer, part) for part in ("attention", "self_attn", "mlp") if _join(layer, part) in modules]
            if len(found) != 2:
                raise ValueError(f"{layer} of {name} has no attention and MLP for residual adapters to stand beside.")
            places += found
        return places
    stages = find_pooling(model).path.removesuffix("pooler") + "encoder."
    inside = tuple(f"{path}." for path, module in modules.items() if isinstance(module, BaseTunerLayer))
    places = [
        path
        for path, module in modules.items()
        if path.startswith(stages) and not path.startswith(inside)
        if isinstance(inner := _innermost(module), nn.Conv2d) and max(inner.kernel_size) > 1
    ]
    if not places:
        raise ValueError(f"{name} has no layers that residual adapters are known to stand beside; leave them out.")
    return places


def parent_path(path: str) -> str:
    """Path of the module that holds the one at this path."""
    return path.rpartition(".")[0]


def _width_of_output(projection: nn.Module) -> int:
    """Of a linear layer, or of the last one in a `Sequential`, under any adapter."""
    inner = _innermost(projection)
    layers = reversed(inner) if isinstance(inner, nn.Sequential) else [inner]
    return next(width for layer in layers if (width := getattr(_innermost(layer), "out_features", None)))


def _innermost(module: Any) -> Any:
    """What an adapter wraps, or the module itself."""
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return module


def unwrap(model: nn.Module) -> Any:
    """The Transformers model inside a `PeftModel`, adapters still in place; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def text_positions(model: nn.Module) -> int:
    """How many tokens CLIP's text tower takes, [BOS] and [EOT] included."""
    return unwrap(model).config.text_config.max_position_embeddings


def reads_text(model: nn.Module) -> bool:
    """Whether the model has a text tower beside its image tower, as CLIP has."""
    return hasattr(unwrap(model), "get_text_features")


def _check_text_tower(base: nn.Module) -> None:
    """Refuse models whose text features depend on more than the words, which shortened texts would change silently."""
    text = find_towers(base).get("text")
    if text is None or text.end_of_text is None:
        raise NotImplementedError(
            f"{type(base).__name__} {why_no_end_of_text(base)}, so class texts cannot be cut to their length; tune "
            f"its image tower by itself, or take one of {list_families(lambda family: family.end_of_text)}."
        )


def check_encoders(model: nn.Module) -> None:
    """Refuse models that cannot encode pixels (B, C, H, W) alone, or have neither class texts nor a head.

    Raises:
        ValueError: a model that reads no text and has no classification head.
        NotImplementedError: a model that reads videos, SigLIP 2's with patches of any number, one that gives text
            features and no image features; a text tower that pools elsewhere than at [EOT], SigLIP's for instance,
            or of an unknown family.
    """
    base = unwrap(model)
    reason = first_reason([base], "no_images")
    if not reason and reads_text(base) and not hasattr(base, "get_image_features"):
        reason = "has no get_image_features"
    if reason:
        raise NotImplementedError(f"{type(base).__name__} {reason}; images alone, (B, C, H, W), cannot be encoded.")
    if reads_text(base):
        _check_text_tower(base)
    elif classification_head(base) is None:
        raise ValueError(
            f"{type(base).__name__} has neither text features nor one module {HEAD!r} as its classification head; use "
            "CLIPModel or an ...ForImageClassification model."
        )


def classification_head(model: nn.Module) -> nn.Module | None:
    """The head of an image classification model (under PEFT's wrapper where it has one), or None.

    A list of layers is none: the model calls them one by one, so features enter and logits leave elsewhere.
    """
    head = getattr(unwrap(model), HEAD, None)
    return None if isinstance(head, nn.Identity | nn.ModuleList | nn.ModuleDict) else head


def other_heads(model: nn.Module) -> list[str]:
    """Names of heads whose logits a model averages with those of its classification head, as LeViT's teacher has."""
    heads = [(name, child) for name, child in unwrap(model).named_children() if name != HEAD and HEAD in name]
    return [name for name, child in heads if not isinstance(child, nn.Identity)]


def head_width(head: nn.Module) -> int:
    """How many numbers the features have that enter a head.

    Raises:
        ValueError: the head holds no linear layer to tell it by.
    """
    for module in head.modules():
        width: Any = getattr(module, "in_features", None)
        if isinstance(width, int):
            return width
    raise ValueError(f"{type(head).__name__} holds no linear layer, so the width of its features is not known.")


def classifier(model: nn.Module) -> Any:
    """The module whose input are an image model's features and whose output are logits, or None.

    The head itself, or what an adapter puts in its place: such a wrapper has an attribute `active_classifier`.
    """
    head = classification_head(model)
    if isinstance(head, ModulesToSaveWrapper):
        active = [] if head.disable_adapters else head.active_adapters
        return head.modules_to_save[active[0]] if active else head.original_module
    return getattr(head, "active_classifier", head)


def linear_classifier(model: nn.Module) -> Any:
    """The part of [`classifier`] with `weight` (K, d) and `bias` (K,) or None, by which the logits are linear.

    None where there is no such single layer, as for a head that LoRA adapts, whose own weight is not what classifies,
    or beside another head.
    """
    head = None if other_heads(model) else _only_layer(classifier(model))
    if isinstance(head, BaseTunerLayer) or not isinstance(getattr(head, "weight", None), Tensor):
        return None
    return head


def _only_layer(head: Any) -> Any:
    """What computes in a head that is a `Sequential` of one layer and others that only pass on, as ResNet's is."""
    if not isinstance(head, nn.Sequential):
        return head
    parts = [part for part in head if not isinstance(part, nn.Flatten | nn.Dropout | nn.Identity)]
    return parts[0] if len(parts) == 1 else None


def linear_parameter(model: nn.Module) -> nn.Parameter:
    """The parameter (K, d) to which a change of an image model's classifier can be added.

    The weight of [`linear_classifier`], or for a head under LoRA that of the layer it adapts.

    Raises:
        ValueError: the head is not one linear layer that is added to, its rows are prototypes, or there are two heads.
    """
    if others := other_heads(model):
        raise ValueError(f"{type(unwrap(model)).__name__} has another head, {others[0]!r}, which would not be turned.")
    head = _only_layer(classifier(model))
    if isinstance(head, BaseTunerLayer):
        head = head.get_base_layer()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise ValueError(
            f"The head of {type(unwrap(model)).__name__} is a {type(head).__name__}, not one linear layer whose rows "
            "could be turned."
        )
    return weight


def logit_scale(model: nn.Module) -> Tensor:
    """CLIP's learned factor of cosines, as its logarithm: ().

    Raises:
        ValueError: it is offloaded, which only a whole CLIP's own pass undoes.
    """
    scale: Tensor = unwrap(model).logit_scale
    if scale.is_meta:
        raise ValueError('logit_scale is offloaded; keep it on a device: device_map={..., "logit_scale": "cpu"}.')
    return scale


def text_features(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Projected, unnormalised text features of CLIP: token ids (K, L) to (K, d)."""
    return unwrap(model).get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


def image_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Projected, unnormalised image features of CLIP: pixels (B, C, H, W) to (B, d)."""
    return unwrap(model).get_image_features(pixel_values=pixel_values).pooler_output


def head_features(model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """What enters a classification model's head (B, d), and the logits (B, K) that leave it."""
    head = classifier(model)
    if head is None:
        raise ValueError(f"{type(unwrap(model)).__name__} has neither a text tower nor a classification head.")
    base = unwrap(model)
    path = next(path for path, module in getattr(base, HEAD).named_modules(prefix=HEAD) if module is head)
    recorder = Recorder(head)
    logits = substitute(base, {path: recorder})(pixel_values=pixel_values).logits
    return recorder.only("entered").flatten(1), logits  # ResNet's end in (B, d, 1, 1)
