"""Where CLIP-like and ViT-like models keep embeddings, layers, projection and classification head.

Everything is found by structure, never by a path written down, so wrapped, renamed and nested models work alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Tower:
    """One transformer tower: dotted paths of its parts inside the model, and its sizes."""

    embeddings: str
    layers: tuple[str, ...]
    width: int
    max_length: int | None = None  # text only: positions, [BOS] and [EOT] included
    eot_token_id: int | None = None  # text only: the token whose feature is pooled; None: another place


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
            table: Any = embeddings.position_embedding
            eot = getattr(module, "eos_token_id", None)  # CLIP pools there; SigLIP has no such attribute
            towers["text"] = Tower(path, layer_paths, table.embedding_dim, table.num_embeddings, eot)
        elif "vision" not in towers:
            # CLIP says `patch_embedding`, the ViT family `patch_embeddings` with the convolution one level down.
            patches = getattr(embeddings, "patch_embedding", None)
            patches = patches or getattr(getattr(embeddings, "patch_embeddings", None), "projection", None)
            if patches is not None:
                towers["vision"] = Tower(path, layer_paths, patches.out_channels)
    unknown = set(exclude) - found
    if unknown:
        raise ValueError(f"exclude_modules names {sorted(unknown)[0]!r}, which {type(model).__name__} does not have.")
    return towers


def unwrap(model: nn.Module) -> Any:
    """The Transformers model inside a `PeftModel`, adapters still in place; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def text_positions(model: nn.Module) -> int:
    """How many tokens CLIP's text tower takes, [BOS] and [EOT] included."""
    return unwrap(model).config.text_config.max_position_embeddings


def reads_text(model: nn.Module) -> bool:
    """Whether the model has a text tower beside its image tower, as CLIP has."""
    return hasattr(unwrap(model), "get_text_features")


def check_text_tower(model: nn.Module) -> None:
    """Refuse models whose text features depend on more than the words, which shortened texts would change silently.

    Raises:
        NotImplementedError: the text tower does not pool at [EOT], SigLIP's for instance.
    """
    text = find_towers(unwrap(model)).get("text")
    if text is None or text.eot_token_id is None:
        raise NotImplementedError(
            f"{type(unwrap(model)).__name__} does not pool its text at [EOT] as CLIP does, so class texts cannot be "
            "cut to their length; its vision tower can be prompted by itself."
        )


def classification_head(model: nn.Module) -> nn.Module | None:
    """The linear head of an image classification model (under PEFT's wrapper where it has one), or None."""
    head = getattr(unwrap(model), "classifier", None)
    return None if head is None or isinstance(head, nn.Identity) else head


def text_features(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Projected, unnormalised text features of CLIP: token ids (K, L) to (K, d)."""
    return unwrap(model).get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


def image_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Projected, unnormalised image features of CLIP: pixels (B, C, H, W) to (B, d)."""
    return unwrap(model).get_image_features(pixel_values=pixel_values).pooler_output


def head_features(model: nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """What enters a classification model's head (B, d), and the logits (B, K) that leave it."""
    head = classification_head(model)
    if head is None:
        raise ValueError(f"{type(unwrap(model)).__name__} has neither a text tower nor a classification head.")
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        logits = unwrap(model)(pixel_values=pixel_values).logits
    finally:
        handle.remove()
    return seen[0], logits
