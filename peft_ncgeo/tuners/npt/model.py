"""Tuner that adds only prompts."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..prompt_model import PromptModel


class NPTModel(PromptModel):
    """Tuner that applies an [`NPTConfig`] to a model; created by `get_peft_model`."""

    prefix = "ncgeo_npt_"

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if not peft_config.num_text_tokens and not peft_config.num_vision_tokens:
            raise ValueError(
                "Nothing to learn: set num_text_tokens or num_vision_tokens, or start from a preset such as "
                "NPTConfig.ivlp()."
            )
        super()._prepare_model(peft_config, model)
