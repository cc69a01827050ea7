"""Features of class texts, many texts in a row where that is exact."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..tuners.prompt_layer import TextEmbeddingsWithPrompt
from .adapters import unwrap
from .text_packing import Layout


def encode_texts(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the projected, unnormalised features (K, d) of texts (K, L), as `get_text_features` gives them.

    Under prompts with `pack_text` texts that begin alike share rows, see `text_packing`; everything about that
    travels in arguments, so passes of other threads do not meet it. Others go through the tower as they are.
    """
    base = unwrap(model)
    embeddings = next((module for module in base.modules() if isinstance(module, TextEmbeddingsWithPrompt)), None)
    layout = None if embeddings is None or not _can_pack(base) else embeddings.lay_out(input_ids)
    if layout is None:
        return text_features(model, input_ids, attention_mask)
    return _packed_features(base, layout)


def _packed_features(base: Any, layout: Layout) -> Tensor:
    tower = base.text_model
    dtype = tower.embeddings.token_embedding.weight.dtype
    out = tower(
        input_ids=layout.input_ids,
        position_ids=layout.positions,
        attention_mask=layout.attention_mask(tower.config._attn_implementation, dtype),
        return_dict=True,
    )
    return base.text_projection(out.last_hidden_state.flatten(0, 1).index_select(0, layout.ends))


def _can_pack(base: Any) -> bool:
    """Return True for a tower laid out as CLIP's that takes positions and a mask, in a pass that is not traced."""
    tower: Any = getattr(base, "text_model", None)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not hasattr(base, "text_projection"):
        return False
    takes_positions = tower is not None and "position_ids" in inspect.signature(tower.forward).parameters
    return takes_positions and tower.config._attn_implementation in ("eager", "sdpa")


def text_features(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Projected, unnormalised text features of CLIP: token ids (K, L) to (K, d)."""
    return unwrap(model).get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
