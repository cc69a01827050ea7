"""Many class texts in one row: what they begin with is computed once, and nothing is padded to the longest.

Attention in CLIP's text tower is causal. Texts that begin alike can follow one another in a row,
`[BOS] context | name 1 . [EOT] | name 2 . [EOT] | ...`, each name seeing the context and itself, with the positions
that it has by itself. The tower's layers run as they are; features are those of the padded rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    from transformers.utils.output_capturing import _active_collector as _collector
except ImportError:  # nobody can tell then whether the layers' outputs are asked for
    _collector = None  # type: ignore[assignment]

_TOKENS = 96  # of a row: attention grows with longer ones, shorter ones repeat the context more often
_REMEMBERED = 4  # lists of texts


@dataclass
class Layout:
    """Where K texts of L tokens are in R rows of T tokens.

    Attributes:
        shape: (K, L).
        tokens: (R, T), place of each in the flattened (K, L) input.
        positions: (R, T), its position in its own text.
        mask: (R, 1, T, T), True where a token sees another.
        places: (K L,), where in the flattened (R, T) rows each token of the input is; behind an [EOT], that [EOT].
        added: dtype -> the mask as a number that is added to scores, made when it is first needed.
    """

    shape: tuple[int, int]
    tokens: Tensor
    positions: Tensor
    mask: Tensor
    places: Tensor
    added: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        tokens, positions = self.tokens.to(device), self.positions.to(device)
        return Layout(self.shape, tokens, positions, self.mask.to(device), self.places.to(device))

    @torch.inference_mode(False)
    def added_mask(self, dtype: torch.dtype) -> Tensor:
        """0 where a token sees another, the least number of that dtype elsewhere: (R, 1, T, T)."""
        if dtype not in self.added:
            zero = torch.zeros((), dtype=dtype, device=self.mask.device)
            self.added[dtype] = torch.where(self.mask, zero, torch.finfo(dtype).min)
        return self.added[dtype]


def lay_out(ends: list[int], length: int, context: int) -> Layout | None:
    """Put K texts that agree in their first `context` tokens into rows; None where that is no shorter.

    Args:
        ends: place of each text's [EOT], not before `context`.
        length: L.
    """
    own = [end + 1 - context for end in ends]
    members: list[list[int]] = [[] for _ in range(min(len(ends), max(1, round(sum(own) / _TOKENS))))]
    filled = [0] * len(members)
    for k in sorted(range(len(ends)), key=lambda k: -own[k]):  # the longest first, each into the emptiest row
        row = filled.index(min(filled))
        members[row].append(k)
        filled[row] += own[k]
    width = context + max(filled)
    if len(members) * width >= len(ends) * length:
        return None
    tokens, positions, text = (torch.zeros(len(members), width, dtype=torch.int64) for _ in range(3))
    places = torch.zeros(len(ends), length, dtype=torch.int64)
    head = torch.arange(context)
    for row, texts in enumerate(members):
        tokens[row, :context], positions[row, :context] = texts[0] * length + head, head
        stop = context
        for k in texts:
            start, stop = stop, stop + own[k]
            inside = torch.arange(context, ends[k] + 1)
            tokens[row, start:stop], positions[row, start:stop] = k * length + inside, inside
            text[row, start:stop] = k + 1  # 0 is the context, and what is left of the row, which nobody reads
            places[k] = row * width + torch.arange(start - context, start - context + length).clamp(max=stop - 1)
            places[k, :context] = row * width + head
    seen = (text[:, :, None] == text[:, None, :]) | (torch.arange(width) < context)
    seen &= torch.ones(width, width, dtype=torch.bool).tril()
    return Layout((len(ends), length), tokens, positions, seen[:, None], places.flatten())


@dataclass
class _Texts:
    """A list of texts that was seen.

    On the CPU texts are known again by value. Elsewhere that would make the host wait: by their place in memory, which
    holding the tensor keeps from others, and by torch's count of changes, which writes through `.data` escape.
    """

    input_ids: Tensor
    values: Tensor
    version: int
    asked: tuple[int, bool, bool]
    eot: list[int]
    layout: Layout | None

    def is_(self, input_ids: Tensor, asked: tuple[int, bool, bool]) -> bool:
        mine = self.input_ids
        if self.asked != asked or mine.device != input_ids.device:
            return False
        if input_ids.device.type == "cpu":
            return torch.equal(self.values, input_ids)
        return (
            not input_ids.is_inference()  # those have no count
            and mine.data_ptr() == input_ids.data_ptr()
            and (mine.shape, mine.stride()) == (input_ids.shape, input_ids.stride())
            and self.version == input_ids._version
        )


class TextPacking:
    """What the wrappers of one text tower share: the layout of the pass that is under way.

    Args:
        config: the tower's, which says how it computes attention.
        eot_token_id: 2 in models saved before Transformers knew better: then the largest id ends a text.
    """

    def __init__(self, config: Any, eot_token_id: int) -> None:
        self.config, self.eot_token_id = config, eot_token_id
        self.layout: Layout | None = None
        self._remembered: list[_Texts] = []

    def read(self, input_ids: Tensor, slots: int, replaced: bool, packed: bool) -> list[int]:
        """Place of every text's [EOT]; `layout` is set for the pass that begins, or None.

        Looks at the ids once for each list of texts: that copies them from the device.

        Args:
            input_ids: (K, L).
            slots: n, tokens behind [BOS] that prompts own.
            replaced: the prompt stands in these slots from the input on, whatever words were there.
            packed: whether to pack at all.
        """
        asked = (slots, replaced, packed and self._can_pack())
        texts = next((known for known in self._remembered if known.is_(input_ids, asked)), None)
        if texts is None:
            texts = self._look(input_ids, asked)
        self.layout = texts.layout
        return texts.eot

    @torch.inference_mode(False)  # what is remembered may be trained with next
    def _look(self, input_ids: Tensor, asked: tuple[int, bool, bool]) -> _Texts:
        slots, replaced, packed = asked
        ids = input_ids.cpu()
        score = ids if self.eot_token_id == 2 else (ids == self.eot_token_id).int()
        eot = score.argmax(dim=-1)
        layout = None
        if packed and len(ids) > 1:
            alike = (ids == ids[0]).all(0)
            if replaced:
                alike[1 : 1 + slots] = True
            context = min(int(alike.int().cumprod(0).sum()), int(eot.min()))
            layout = lay_out(eot.tolist(), ids.shape[1], context) if context > slots else None
        layout = None if layout is None else layout.to(input_ids.device)
        version = 0 if input_ids.is_inference() else input_ids._version
        texts = _Texts(input_ids, ids.clone(), version, asked, eot.tolist(), layout)
        self._remembered = [texts, *self._remembered[: _REMEMBERED - 1]]
        return texts

    def _can_pack(self) -> bool:
        if self.config._attn_implementation not in ("eager", "sdpa") or torch.jit.is_tracing() or _collector is None:
            return False
        return not _collector.get()  # whoever asks for hidden states or attentions wants those of padded rows

    def mask(self, hidden_states: Tensor) -> Tensor:
        """As the tower's attention takes it: True where a token sees another, or what is added to its scores."""
        assert self.layout is not None
        sdpa = self.config._attn_implementation == "sdpa"
        return self.layout.mask if sdpa else self.layout.added_mask(hidden_states.dtype)

    def texts(self, hidden_states: Tensor) -> Tensor:
        """(R, T, width) back to (K, L, width), at the end of the pass."""
        assert self.layout is not None
        layout, self.layout = self.layout, None
        return hidden_states.flatten(0, 1).index_select(0, layout.places).unflatten(0, layout.shape)
