"""Encoder of class texts, used by the whole library. It packs many texts into a row where that is exact."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .adapters import unwrap
from .devices import is_offloaded
from .families import find_text_reading
from .substitution import substitute
from .text_packing import Layout, Slots, read_texts
from .text_reading import EndOfText, check_full_length


def encode_texts(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the projected, unnormalised features (K, d) of texts (K, L), as `get_text_features` gives them.

    [`~peft_ncgeo.data.class_prompts`] writes the texts of a model as its tower reads them.

    Texts with the same beginning share rows where that is exact (see `text_packing`): in a causal tower that pools at
    [EOT], without adapters, under adapters that treat each token alone (LoRA for example), and under prompts with
    `pack_text`. Other texts are encoded one in a row. In training, dropout draws one mask for the words that texts
    share.

    All state of a pass is in its arguments, so threads do not disturb each other.

    Raises:
        ValueError: SigLIP's texts are not padded to its full length, or come with a mask.
    """
    base = unwrap(model)
    reading = find_text_reading(base.text_model) if hasattr(base, "text_model") else None
    if reading is not None and reading.full_length:
        check_full_length(base, input_ids, attention_mask)
    layout = None if reading is None or reading.end_of_text is None else _lay_out(base, input_ids, reading.end_of_text)
    if layout is None:
        return text_features(model, input_ids, attention_mask)
    tower = base.text_model
    if not isinstance(tower.embeddings, BaseTunerLayer):  # the tower's own embeddings refuse rows longer than one text
        tower = substitute(tower, {"embeddings": _PackedEmbeddings(tower.embeddings)})
    out = tower(
        input_ids=layout.input_ids,
        position_ids=layout.positions,
        attention_mask=layout.attention_mask(tower.config._attn_implementation, _dtype(tower)),
        return_dict=True,
    )
    return base.text_projection(out.last_hidden_state.flatten(0, 1).index_select(0, layout.ends))


def text_features(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the projected, unnormalised features (K, d) of texts (K, L), with one text in a row."""
    return unwrap(model).get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


def _lay_out(base: Any, input_ids: Tensor, end_of_text: EndOfText) -> Layout | None:
    """Return a layout by which texts (K, L) share rows of this model's tower, or None if they cannot."""
    tower: Any = base.text_model
    if not hasattr(base, "text_projection") or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    takes_positions = "position_ids" in inspect.signature(tower.forward).parameters
    if not takes_positions or tower.config._attn_implementation not in ("eager", "sdpa"):
        return None
    prompted = isinstance(tower.embeddings, BaseTunerLayer)
    slots: Slots | None = tower.embeddings.slots() if prompted else Slots()
    if slots is None or not all(map(_keeps_tokens_apart, tower.modules())) or (not prompted and is_offloaded(tower)):
        return None
    return read_texts(input_ids, end_of_text, *slots, packed=True).layout


def _keeps_tokens_apart(module: nn.Module) -> bool:
    """Return False for an adapter that may mix tokens: one around more than a single layer, unless it says not to."""
    if not isinstance(module, BaseTunerLayer) or getattr(module, "keeps_tokens_apart", False):
        return True
    return isinstance(module.get_base_layer(), nn.Linear | nn.Embedding | nn.LayerNorm)


def _dtype(tower: Any) -> torch.dtype:
    return tower.embeddings.token_embedding.weight.dtype


class _PackedEmbeddings(nn.Module):
    """Token and position embeddings of packed rows. They replace a tower's own embeddings in one pass."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings: Any = embeddings

    @property
    def token_embedding(self) -> Any:
        return self.embeddings.token_embedding

    def forward(self, input_ids: Tensor, position_ids: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        return self.token_embedding(input_ids) + self.embeddings.position_embedding(position_ids)
