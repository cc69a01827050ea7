"""Packing of many class texts into one row: their common beginning is computed once, and rows need little padding.

Attention in CLIP's text tower is causal. Texts with the same beginning can follow one another in a row,
`[BOS] context | name 1 . [EOT] | name 2 . [EOT] | ...`. Each name attends to the context and to itself, and has the
same positions as in a row of its own. The tower's layers are not changed; features equal those of padded rows.
"""

from __future__ import annotations

import heapq
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .text_reading import EndOfText

_TOKENS = 96  # of a row; longer rows make attention cost more, shorter rows repeat the context more often
_REMEMBERED = 32  # lists of texts with their layouts, of all models together
_LOCK = threading.Lock()  # held while the remembered lists are read or changed, never in a pass


class Slots(NamedTuple):
    """Token slots after [BOS] that prompts fill. `replaced`: True if the tower's input already holds the prompts."""

    number: int = 0
    replaced: bool = False


@dataclass
class Layout:
    """Arrangement of K texts in R rows of T tokens.

    Attributes:
        input_ids: (R, T), the rows.
        positions: (R, T), each token's position in its own text.
        mask: (R, 1, T, T), True where a token attends to another.
        ends: (K,), position of each text's [EOT] in the flattened rows.
        added: dtype -> additive mask in that dtype, made on first use.
        blocks: rows of a piece -> the masks of the pieces for flex attention, made on first use.
        pieces: rows of a piece -> the texts of each piece, made on first use.
    """

    input_ids: Tensor
    positions: Tensor
    mask: Tensor
    ends: Tensor
    added: dict[torch.dtype, Tensor] = field(default_factory=dict)
    blocks: dict[int, list[BlockMask]] = field(default_factory=dict)
    pieces: dict[int, tuple[list[Tensor], Tensor]] = field(default_factory=dict)

    def to(self, device: torch.device) -> Layout:
        """Return a copy on another device."""
        input_ids, positions = self.input_ids.to(device), self.positions.to(device)
        return Layout(input_ids, positions, self.mask.to(device), self.ends.to(device))

    @torch.inference_mode(False)
    def attention_mask(self, implementation: str, dtype: torch.dtype) -> Tensor:
        """Return the mask (R, 1, T, T) in the form that the tower's attention takes.

        For "sdpa" it is True where a token attends to another. Otherwise it is 0 there, and the lowest number of the
        dtype elsewhere.
        """
        if implementation == "sdpa":
            return self.mask
        if dtype not in self.added:
            zero = torch.zeros((), dtype=dtype, device=self.mask.device)
            added = torch.where(self.mask, zero, torch.finfo(dtype).min)
            with _LOCK:
                self.added.setdefault(dtype, added)
        return self.added[dtype]

    @torch.inference_mode(False)
    def block_masks(self, size: int) -> list[BlockMask]:
        """Return the mask of each piece of `size` rows in the form of flex attention."""
        if size not in self.blocks:
            made = [_block_mask(mask) for mask in self.mask[:, 0].split(size)]
            with _LOCK:
                self.blocks.setdefault(size, made)
        return self.blocks[size]

    def split(self, size: int, implementation: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Any, Tensor]]:
        """Return pieces of `size` rows: ids, positions, mask, and the ends of their texts in the flattened rows.

        [`order`] gives the order of the texts in the concatenated pieces.
        """
        flex = implementation == "flex_attention"
        masks = self.block_masks(size) if flex else self.attention_mask(implementation, dtype).split(size)
        parts = (self.input_ids.split(size), self.positions.split(size), masks, self._texts(size)[0])
        return list(zip(*parts, strict=True))

    def order(self, size: int) -> Tensor:
        """Return the index (K,) of each text among the texts of all pieces."""
        return self._texts(size)[1]

    @torch.inference_mode(False)
    def _texts(self, size: int) -> tuple[list[Tensor], Tensor]:
        if size not in self.pieces:
            width = size * self.input_ids.shape[1]
            count = -(-len(self.input_ids) // size)
            if count == 1:
                made = [self.ends], torch.arange(len(self.ends), device=self.ends.device)
            else:
                piece = (self.ends // width).cpu()
                by_piece = piece.argsort(stable=True)
                texts = by_piece.split(piece.bincount(minlength=count).tolist())
                ends = [self.ends[own.to(self.ends.device)] - i * width for i, own in enumerate(texts)]
                made = ends, by_piece.argsort().to(self.ends.device)
            with _LOCK:
                self.pieces.setdefault(size, made)
        return self.pieces[size]


def _block_mask(mask: Tensor) -> BlockMask:
    """Return a mask (R, T, T) in the form of flex attention, which reads whole blocks of 128 tokens."""
    rows, tokens, _ = mask.shape
    blocks = nn.functional.pad(mask, (0, -tokens % 128, 0, -tokens % 128))

    def attends(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return blocks[row, query, key]

    return create_block_mask(attends, rows, None, tokens, tokens, device=mask.device)


def lay_out(input_ids: Tensor, ends: list[int], context: int) -> Layout | None:
    """Put K texts with the same first `context` tokens into rows; return None if that saves no tokens.

    Args:
        input_ids: (K, L), on the CPU.
        ends: position of each text's [EOT], at least `context`.
    """
    own = [end + 1 - context for end in ends]
    members: list[list[int]] = [[] for _ in range(min(len(ends), max(1, round(sum(own) / _TOKENS))))]
    filled = [0] * len(members)
    space = [(0, row) for row in range(len(members))]  # a heap: tokens in a row, and its number
    for k in sorted(range(len(ends)), key=lambda k: -own[k]):  # longest first, each into the row with most space
        _, row = space[0]
        members[row].append(k)
        filled[row] += own[k]
        heapq.heapreplace(space, (filled[row], row))
    width = context + max(filled)
    if len(members) * width >= input_ids.numel():
        return None
    rows, positions, text = (torch.zeros(len(members), width, dtype=torch.int64) for _ in range(3))
    places = torch.zeros(len(ends), dtype=torch.int64)
    for row, texts in enumerate(members):
        rows[row, :context], positions[row, :context] = input_ids[texts[0], :context], torch.arange(context)
        stop = context
        for k in texts:
            start, stop = stop, stop + own[k]
            rows[row, start:stop] = input_ids[k, context : ends[k] + 1]
            positions[row, start:stop] = torch.arange(context, ends[k] + 1)
            text[row, start:stop] = k + 1  # 0 marks the context, and the unused end of the row
            places[k] = row * width + stop - 1
    seen = (text[:, :, None] == text[:, None, :]) | (torch.arange(width) < context)
    seen &= torch.ones(width, width, dtype=torch.bool).tril()
    return Layout(rows, positions, seen[:, None], places)


@dataclass
class Texts:
    """List of texts whose [EOT] positions and layout are known.

    On the CPU, a list is recognised by its values. On other devices this would make the host wait; there a list is
    recognised by its address in memory, which is not reused while this object exists, and by torch's version counter,
    which misses changes through `.data`.

    Attributes:
        input_ids: (K, L), the tensor of the caller.
        ends: position of each text's [EOT].
        layout: arrangement of the texts in rows, or None.
    """

    input_ids: Tensor
    values: Tensor
    version: int
    asked: tuple[EndOfText, int, bool, bool]
    ends: list[int]
    layout: Layout | None

    def matches(self, input_ids: Tensor, asked: tuple[EndOfText, int, bool, bool]) -> bool:
        """Return True if these are the same texts with the same settings."""
        mine = self.input_ids
        if self.asked != asked or mine.device != input_ids.device:
            return False
        if input_ids.device.type == "cpu":
            return torch.equal(self.values, input_ids)
        return (
            not input_ids.is_inference()  # inference tensors have no version counter
            and mine.data_ptr() == input_ids.data_ptr()
            and (mine.shape, mine.stride()) == (input_ids.shape, input_ids.stride())
            and self.version == input_ids._version
        )


_TEXTS: list[Texts] = []  # the latest first


def read_texts(
    input_ids: Tensor, end_of_text: EndOfText, slots: int = 0, replaced: bool = False, packed: bool = False
) -> Texts:
    """Find the end of each text and a layout in rows; reuse the result for a list that was read recently.

    A new list is copied from its device.

    Args:
        input_ids: (K, L).
        end_of_text: the rule by which the tower finds [EOT].
        slots: n, number of token slots after [BOS] that prompts fill.
        replaced: True if prompts fill these slots in the tower's input, so that the words there do not matter.
        packed: True: also make a layout.
    """
    asked = (end_of_text, slots, replaced, packed)
    with _LOCK:
        known = next((texts for texts in _TEXTS if texts.matches(input_ids, asked)), None)
    if known is None:
        known = _look(input_ids, asked)
        with _LOCK:
            _TEXTS[:] = [known, *_TEXTS[: _REMEMBERED - 1]]
    return known


@torch.inference_mode(False)  # remembered tensors may be used in training later
def _look(input_ids: Tensor, asked: tuple[EndOfText, int, bool, bool]) -> Texts:
    end_of_text, slots, replaced, packed = asked
    ids = input_ids.to("cpu", copy=True)
    ends = end_of_text.positions(ids).tolist()
    layout = None
    if packed and len(ids) > 1:
        alike = (ids == ids[0]).all(0)
        if replaced:
            alike[1 : 1 + slots] = True
        context = min(int(alike.int().cumprod(0).sum()), min(ends))
        layout = lay_out(ids, ends, context) if context > slots else None
    layout = None if layout is None else layout.to(input_ids.device)
    version = 0 if input_ids.is_inference() else input_ids._version
    return Texts(input_ids, ids, version, asked, ends, layout)
