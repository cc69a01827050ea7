"""Features of class texts, many texts in a row where that is exact."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapters import unwrap
from .devices import is_offloaded
from .families import find_end_of_text
from .substitution import substitute
from .text_packing import Layout, Slots, read_texts


def encode_texts(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the projected, unnormalised features (K, d) of texts (K, L), as `get_text_features` gives them.

    Texts that begin alike share rows where that is exact (see `text_packing`): in a causal tower that pools at [EOT],
    plain or under adapters that treat every token by itself, LoRA's say, and under prompts with `pack_text`. Others go
    through the tower as they are. In training dropout draws one mask for the words that texts share.

    Everything about a pass travels in arguments, so passes of other threads do not meet it.
    """
    base = unwrap(model)
    layout = _lay_out(base, input_ids)
    if layout is None:
        return text_features(model, input_ids, attention_mask)
    tower = base.text_model
    if not isinstance(tower.embeddings, BaseTunerLayer):  # the tower's own refuses rows longer than one text may be
        tower = substitute(tower, {"embeddings": _PackedEmbeddings(tower.embeddings)})
    out = tower(
        input_ids=layout.input_ids,
        position_ids=layout.positions,
        attention_mask=layout.attention_mask(tower.config._attn_implementation, _dtype(tower)),
        return_dict=True,
    )
    return base.text_projection(out.last_hidden_state.flatten(0, 1).index_select(0, layout.ends))


def text_features(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Projected, unnormalised text features of CLIP: token ids (K, L) to (K, d), each text in a row of its own."""
    return unwrap(model).get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


def _lay_out(base: Any, input_ids: Tensor) -> Layout | None:
    """Return how texts (K, L) can share rows of this model's tower, or None where they cannot."""
    tower: Any = getattr(base, "text_model", None)
    if tower is None or not hasattr(base, "text_projection"):
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    end_of_text = find_end_of_text(tower)
    takes_positions = "position_ids" in inspect.signature(tower.forward).parameters
    if end_of_text is None or not takes_positions or tower.config._attn_implementation not in ("eager", "sdpa"):
        return None
    prompted = isinstance(tower.embeddings, BaseTunerLayer)
    slots: Slots | None = tower.embeddings.slots() if prompted else Slots()
    if slots is None or not all(map(_keeps_tokens_apart, tower.modules())) or (not prompted and is_offloaded(tower)):
        return None
    return read_texts(input_ids, end_of_text, *slots, packed=True).layout


def _keeps_tokens_apart(module: nn.Module) -> bool:
    """Return False for an adapter around more than one layer that may mix tokens, of which it says nothing."""
    if not isinstance(module, BaseTunerLayer) or getattr(module, "keeps_tokens_apart", False):
        return True
    return isinstance(module.get_base_layer(), nn.Linear | nn.Embedding | nn.LayerNorm)


def _dtype(tower: Any) -> torch.dtype:
    return tower.embeddings.token_embedding.weight.dtype


class _PackedEmbeddings(nn.Module):
    """Token and position embeddings of rows of texts, in the place of a tower's own for one pass."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings: Any = embeddings

    @property
    def token_embedding(self) -> Any:
        return self.embeddings.token_embedding

    def forward(self, input_ids: Tensor, position_ids: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        return self.token_embedding(input_ids) + self.embeddings.position_embedding(position_ids)
