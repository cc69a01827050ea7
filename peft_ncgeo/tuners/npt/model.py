"""`NPTModel`: finds the towers, wraps their embeddings and layers, and starts the prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...templates import find_tokenizer, placeholder_ids
from ...towers import Tower, find_towers, unwrap
from ..prompt_config import PromptConfig
from .layer import (
    PromptLayer,
    TextEmbeddingsWithPrompt,
    TextLayerWithPrompt,
    VisionEmbeddingsWithPrompt,
    VisionLayerWithPrompt,
)

# How to wrap the module at a place, how many of its tower's slots the adapter owns, and the width of the prompt that
# the place itself gets, or None.
_Place = tuple[Callable[[nn.Module], PromptLayer], int, int | None]


class NPTModel(BaseTuner):
    """Puts the prompts of an [`NPTConfig`] into a model. Made by `get_peft_model`, not by hand."""

    prefix = "ncgeo_npt_"
    tuner_layer_cls = PromptLayer
    target_module_mapping = {}  # noqa: RUF012  as PEFT declares it

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        """Turn the config's phrase and template into token ids; a loaded config has them already."""
        if peft_config.num_text_tokens and not peft_config.inference_mode and not peft_config.is_loaded:
            _write_token_ids(peft_config, getattr(self.model, "name_or_path", None))
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check the config against the model's towers and note what to do at each place: module path -> action."""
        towers = find_towers(model, peft_config.exclude_modules or ())
        model_name = type(model).__name__
        if not peft_config.num_text_tokens and not peft_config.num_vision_tokens:
            raise ValueError(
                "Nothing to learn: set num_text_tokens or num_vision_tokens, or start from a preset such as "
                "NPTConfig.ivlp()."
            )
        self._places: dict[str, _Place] = {}
        clipped = []
        for kind, num_tokens, depth, place in (
            ("text", peft_config.num_text_tokens, peft_config.text_depth, self._place_text),
            ("vision", peft_config.num_vision_tokens, peft_config.vision_depth, self._place_vision),
        ):
            if not num_tokens:
                continue
            if kind not in towers:
                raise ValueError(f"{model_name} has no {kind} tower to prompt; set num_{kind}_tokens=0.")
            tower = towers[kind]
            if depth > len(tower.layers):
                clipped.append(f"{kind}_depth={depth} > {len(tower.layers)}")
            place(tower, num_tokens, depth)
        if clipped and not peft_config.inference_mode:
            warnings.warn(f"{', '.join(clipped)} layers of {model_name}: all of them get prompts.", stacklevel=2)

    def _place_text(self, tower: Tower, num_tokens: int, depth: int) -> None:
        if tower.max_length is not None and num_tokens > tower.max_length - 3:  # [BOS], a name, [EOT]
            raise ValueError(f"num_text_tokens={num_tokens} leaves no room for a name among {tower.max_length} slots.")
        if tower.eot_token_id is None:
            raise NotImplementedError("Text prompts need a text tower that pools at an [EOT] token, as CLIP's does.")
        wrap = partial(TextEmbeddingsWithPrompt, eot_token_id=tower.eot_token_id)
        self._places[tower.embeddings] = (wrap, num_tokens, tower.width)
        for i, path in enumerate(tower.layers):
            self._places[path] = (TextLayerWithPrompt, num_tokens, tower.width if 0 < i < depth else None)

    def _place_vision(self, tower: Tower, num_tokens: int, depth: int) -> None:
        self._places[tower.embeddings] = (VisionEmbeddingsWithPrompt, num_tokens, tower.width)
        for i, path in enumerate(tower.layers):
            wrap = partial(VisionLayerWithPrompt, is_last=i == len(tower.layers) - 1)
            self._places[path] = (wrap, num_tokens, tower.width if 0 < i < depth else None)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._places

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
        wrap, num_tokens, width = self._places[current_key]
        layer = target if isinstance(target, PromptLayer) else wrap(target)
        prompt = None if width is None else torch.randn(num_tokens, width) * peft_config.init_std
        if isinstance(layer, TextEmbeddingsWithPrompt):
            layer.configs[adapter_name] = peft_config
            if prompt is not None and peft_config.init_weights and peft_config.phrase_ids:
                _start_from_phrase(prompt, layer.token_embedding, peft_config.phrase_ids)
        layer.update_layer(adapter_name, num_tokens, prompt, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `.weight` and `.bias`, which embeddings and layers do not have.
        setattr(parent, child_name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's own mapping, after which every prompt must have found its place: a missing one would stay random."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        prompts = {
            f"{name}.ncgeo_npt_prompt.{adapter_name}": layer.ncgeo_npt_prompt[adapter_name].shape
            for name, layer in model.named_modules()
            if isinstance(layer, PromptLayer) and adapter_name in layer.ncgeo_npt_prompt
        }
        given = {key: value.shape for key, value in remapped.items() if cls.prefix in key}
        wrong = [
            *(f"missing {key}" for key in prompts.keys() - given.keys()),
            *(f"unexpected {key}" for key in given.keys() - prompts.keys()),
            *(
                f"{key} is {tuple(given[key])}, the model takes {tuple(prompts[key])}"
                for key in given.keys() & prompts.keys()
                if given[key] != prompts[key]
            ),
        ]
        if wrong:
            shown = "; ".join(sorted(wrong)[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise ValueError(
                f"The adapter does not fit {type(unwrap(model)).__name__}, it was made for another architecture or "
                f"depth: {shown}."
            )
        return remapped


def _write_token_ids(config: PromptConfig, model_name: str | None) -> None:
    tokenizer = find_tokenizer(config.tokenizer_name_or_path or model_name)
    if tokenizer is None and isinstance(config.text_init, str):
        warnings.warn(
            f"No tokenizer found for text_init={config.text_init!r}, so text prompts start from N(0, init_std); name "
            "one in tokenizer_name_or_path.",
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
    if max(ids) >= token_embedding.num_embeddings or min(ids) < 0:
        raise ValueError(f"text_init holds token id {max(ids)}, but the model knows {token_embedding.num_embeddings}.")
    prompt[: len(ids)] = token_embedding.weight[ids].detach().to(prompt)
