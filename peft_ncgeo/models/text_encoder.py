"""Encoder of class texts for the whole library; it packs texts into rows if that is exact, and splits long lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapters import unwrap
from .devices import is_offloaded
from .families import find_text_reading
from .substitution import substitute
from .text_packing import Slots, read_texts
from .text_reading import EndOfText, check_full_length

_WHOLE = 4096  # tokens that are encoded in one piece, unless the caller says how many texts
_PIECE = 1024  # tokens of a piece otherwise


def encode_texts(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, batch_size: int | None = None
) -> Tensor:
    """Return the projected, unnormalised features (K, d) of texts (K, L), as `get_text_features` does.

    [`~peft_ncgeo.data.class_prompts`] writes texts in the form that the model's tower reads.

    Texts with the same beginning share rows if that is exact (see `text_packing`): in a causal tower that pools at
    [EOT], without adapters, under adapters that treat each token separately (LoRA for example), and under prompts with
    `pack_text`. Other texts are encoded with one text in each row. In training, dropout draws one mask for the words
    that texts share.

    Long lists of texts are encoded in pieces. With gradients, each piece is encoded a second time in the backward
    pass, with the same dropout, so that only the activations of one piece are kept at a time: memory grows with the
    number of texts only by their features and ids. Features are equal up to rounding.

    All state of a pass is in its arguments, so threads do not disturb each other.

    Args:
        batch_size: approximate number of texts in a piece. Default: all texts up to 4,096 tokens, else about 1,024
            tokens.

    Raises:
        ValueError: SigLIP's texts are not padded to its full length, or have a mask.
    """
    base = unwrap(model)
    reading = find_text_reading(base.text_model) if hasattr(base, "text_model") else None
    if reading is not None and reading.full_length:
        check_full_length(base, input_ids, attention_mask)
    packed = None
    if reading is not None and reading.end_of_text is not None:
        packed = _pack(base, input_ids, reading.end_of_text, batch_size)
    if packed is None:
        texts = len(input_ids)
        ids = input_ids.split(_piece_size(texts, input_ids.numel(), texts, batch_size))
        masks = [None] * len(ids) if attention_mask is None else attention_mask.split(len(ids[0]))
        return _in_pieces([partial(text_features, model, *piece) for piece in zip(ids, masks, strict=True)])
    pieces, order = packed
    tower = base.text_model
    if not isinstance(tower.embeddings, BaseTunerLayer):  # the tower's own embeddings refuse rows longer than one text
        tower = substitute(tower, {"embeddings": _PackedEmbeddings(tower.embeddings)})
    features = _in_pieces([partial(_encode_rows, tower, base.text_projection, *piece) for piece in pieces])
    return features if len(pieces) == 1 else features.index_select(0, order)


def _encode_rows(tower: Any, projection: Any, input_ids: Tensor, positions: Tensor, mask: Any, ends: Tensor) -> Tensor:
    """Return the features of the texts that end at `ends` in packed rows (R, T)."""
    out = tower(input_ids=input_ids, position_ids=positions, attention_mask=mask, return_dict=True)
    return projection(out.last_hidden_state.flatten(0, 1).index_select(0, ends))


def _piece_size(rows: int, tokens: int, texts: int, batch_size: int | None) -> int:
    """Return the number of rows of a piece."""
    if batch_size is not None:
        return max(1, round(rows * batch_size / texts))
    return rows if tokens <= _WHOLE else max(1, rows * _PIECE // tokens)


def _in_pieces(pieces: list[Callable[[], Tensor]]) -> Tensor:
    """Return the results of the pieces, concatenated; if there are several, do not keep activations for backward."""
    if len(pieces) == 1:
        return pieces[0]()
    if not torch.is_grad_enabled():
        return torch.cat([piece() for piece in pieces])
    return torch.cat([checkpoint(piece, use_reentrant=False) for piece in pieces])


def text_features(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the projected, unnormalised features (K, d) of texts (K, L), with one text in each row."""
    return unwrap(model).get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output


@torch.compiler.disable  # type: ignore[untyped-decorator]  # reads values, so it runs before what is compiled
def _pack(
    base: Any, input_ids: Tensor, end_of_text: EndOfText, batch_size: int | None
) -> tuple[list[tuple[Tensor, Tensor, Any, Tensor]], Tensor] | None:
    """Return texts (K, L) as pieces of packed rows, and each text's index in them; None if they cannot share rows.

    A piece has ids, positions and mask of its rows, and the ends of their texts, see [`Layout.split`].
    """
    tower: Any = base.text_model
    if not hasattr(base, "text_projection") or torch.jit.is_tracing():
        return None
    takes_positions = "position_ids" in inspect.signature(tower.forward).parameters
    attention = tower.config._attn_implementation
    if not takes_positions or attention not in ("eager", "sdpa", "flex_attention"):
        return None
    prompted = isinstance(tower.embeddings, BaseTunerLayer)
    slots: Slots | None = tower.embeddings.slots() if prompted else Slots()
    if slots is None or not all(map(_keeps_tokens_apart, tower.modules())) or (not prompted and is_offloaded(tower)):
        return None
    layout = read_texts(input_ids, end_of_text, *slots, packed=True).layout
    if layout is None:
        return None
    size = _piece_size(len(layout.input_ids), layout.input_ids.numel(), len(input_ids), batch_size)
    return layout.split(size, attention, tower.embeddings.token_embedding.weight.dtype), layout.order(size)


def _keeps_tokens_apart(module: nn.Module) -> bool:
    """Return False for an adapter that may mix tokens: one around several layers, unless it declares otherwise."""
    if not isinstance(module, BaseTunerLayer) or getattr(module, "keeps_tokens_apart", False):
        return True
    return isinstance(module.get_base_layer(), nn.Linear | nn.Embedding | nn.LayerNorm)


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
