"""Tuner that wraps the embeddings and layers of towers and initialises their prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..models.prompt_support import check_prompts
from ..models.templates import find_tokenizer, placeholder_ids
from ..models.towers import Tower, find_towers
from ..validation import short_repr
from .prompt_config import PromptConfig
from .prompt_layer import (
    GridWithPrompt,
    PromptLayer,
    TextEmbeddingsWithPrompt,
    TextLayerWithPrompt,
    VisionEmbeddingsWithPrompt,
    VisionLayerWithPrompt,
)
from .tuner_model import TunerModel


@dataclass
class InjectionPoint:
    """Change that an adapter makes at one module of a tower."""

    wrap: Callable[[nn.Module, str], PromptLayer]
    num_tokens: int
    width: int | None = None  # of this module's own prompt, if it has one
    is_entry: bool = False  # True at the module where the tower's first prompt is inserted
    source: str | None = None  # path of the module whose prompt is mapped to this one's


class PromptModel(TunerModel):
    """Base tuner for prompts of a [`PromptConfig`]; each PEFT type with prompts has a subclass with its own prefix."""

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Turn the config's phrase and template into token ids, unless a loaded config already has them."""
        if peft_config.num_text_tokens and not peft_config.is_loaded:
            if peft_config.inference_mode and peft_config.has_changed():
                written = ", ".join(map(short_repr, peft_config.token_ids["of"]))
                raise ValueError(
                    "The adapter's config was changed since it was written, or is damaged: text_init, template and "
                    f"num_text_tokens were {written}. Restore them, or remove token_ids."
                )
            if not peft_config.inference_mode:
                _write_token_ids(peft_config, getattr(self.model, "name_or_path", None))
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check the config against the model's towers, and store the change for each module path."""
        towers = find_towers(model, peft_config.exclude_modules or ())
        model_name = type(model).__name__
        self._injection_points: dict[str, InjectionPoint] = {}
        clipped, prompted = [], {}
        for kind, wrap_all in (("text", _wrap_text), ("vision", _wrap_vision)):
            num_tokens, depth = (getattr(peft_config, name) for name in (f"num_{kind}_tokens", f"{kind}_depth"))
            if not num_tokens:
                continue
            check_prompts(model, kind, towers.get(kind))
            tower, first = towers[kind], peft_config.first_layer
            if first >= len(tower.layers):
                raise ValueError(f"first_layer={first}, but the {kind} tower has {len(tower.layers)} layers.")
            if first + depth > len(tower.layers):
                clipped.append(f"{kind}_depth={depth} > {len(tower.layers) - first}")
            # the embeddings are the entry of layer 0, but a mask of the tokens is made of what they give
            entries = list(tower.layers) if first or tower.is_masked else [tower.embeddings, *tower.layers[1:]]
            prompted[kind] = entries[first : first + depth]
            places = wrap_all(tower, num_tokens, prompted[kind])
            for path in prompted[kind]:
                places[path].width = tower.width
            places[prompted[kind][0]].is_entry = True
            self._injection_points.update(places)
        if peft_config.coupling == "coupled":
            for path, source in zip(prompted["vision"], prompted["text"], strict=False):
                self._injection_points[path].source = source
        if clipped and not peft_config.inference_mode:
            warnings.warn(
                f"{model_name} has fewer layers than asked for ({', '.join(clipped)}), so all of them get prompts.",
                stacklevel=2,
            )

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._injection_points

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        place = self._injection_points[current_key]
        layer = target if isinstance(target, PromptLayer) else place.wrap(target, self.prefix)
        prompt = None if place.width is None else torch.randn(place.num_tokens, place.width) * peft_config.init_std
        if isinstance(layer, TextEmbeddingsWithPrompt):
            layer.configs[adapter_name] = peft_config
            if prompt is not None and peft_config.init_weights and peft_config.phrase_ids:
                _start_from_phrase(prompt, getattr(layer, layer.table), peft_config.phrase_ids)
        if isinstance(layer, VisionLayerWithPrompt):
            layer.is_entry[adapter_name] = place.is_entry
        source = None if place.source is None else self.model.get_submodule(place.source)
        layer.update_layer(adapter_name, place.num_tokens, prompt, peft_config.inference_mode, source)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)


def _wrap_text(tower: Tower, num_tokens: int, prompted: list[str]) -> dict[str, InjectionPoint]:
    assert tower.reading is not None  # check_prompts has checked it
    first = tower.reading.front
    if tower.max_length is not None and num_tokens > tower.max_length - first - 2:  # a name, [EOT]
        raise ValueError(f"num_text_tokens={num_tokens} leaves no room for a name among {tower.max_length} slots.")
    layers = {path: InjectionPoint(partial(TextLayerWithPrompt, first=first), num_tokens) for path in prompted}
    return layers | {tower.embeddings: InjectionPoint(partial(TextEmbeddingsWithPrompt, tower=tower), num_tokens)}


def _wrap_vision(tower: Tower, num_tokens: int, prompted: list[str]) -> dict[str, InjectionPoint]:
    embeddings = partial(VisionEmbeddingsWithPrompt, special_tokens=tower.special_tokens)
    layer, last = partial(VisionLayerWithPrompt, special_tokens=tower.special_tokens), tower.layers[-1]
    places = {tower.embeddings: InjectionPoint(embeddings, num_tokens)}
    if tower.grid:
        places[tower.grid] = InjectionPoint(GridWithPrompt, num_tokens)
    return places | {path: InjectionPoint(partial(layer, is_last=path == last), num_tokens) for path in tower.layers}


def _write_token_ids(config: PromptConfig, model_name: str | None) -> None:
    own = config.tokenizer_name_or_path
    tokenizer = find_tokenizer(own) if own else find_tokenizer(model_name, config.revision)
    if tokenizer is None and isinstance(config.text_init, str):
        warnings.warn(
            f"No tokenizer found for text_init={config.text_init!r}, so text prompts start from N(0, init_std); name "
            "a tokenizer in tokenizer_name_or_path.",
            stacklevel=2,
        )
    slots = config.num_text_tokens
    placeholders = [] if tokenizer is None else placeholder_ids(config.template, slots, tokenizer)
    config.write_token_ids(_phrase_ids(config.text_init, tokenizer), placeholders)


def _phrase_ids(phrase: str | list[int] | None, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if not isinstance(phrase, str):
        return list(phrase or [])
    return [] if tokenizer is None else list(tokenizer(phrase, add_special_tokens=False).input_ids)


def _start_from_phrase(prompt: Tensor, token_embedding: nn.Embedding, ids: list[int]) -> None:
    ids = ids[: prompt.shape[0]]
    if max(ids) >= token_embedding.num_embeddings:
        raise ValueError(f"text_init holds token id {max(ids)}, but the model knows {token_embedding.num_embeddings}.")
    with align_module_device(token_embedding):  # it may be offloaded
        if token_embedding.weight.is_meta:
            return  # the prompt is on meta too, until both are loaded
        prompt[: len(ids)] = token_embedding.weight[ids].detach().to(prompt)
