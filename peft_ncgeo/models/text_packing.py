"""Many class texts in one row: what they begin with is computed once, and nothing is padded to the longest.

Attention in CLIP's text tower is causal. Texts that begin alike can follow one another in a row,
`[BOS] context | name 1 . [EOT] | name 2 . [EOT] | ...`, each name seeing the context and itself, with the positions
that it has by itself. The tower's layers run as they are; features are those of the padded rows.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .families import EndOfText

_TOKENS = 96  # of a row: attention grows with longer ones, shorter ones repeat the context more often
_REMEMBERED = 32  # lists of texts, and rows made of them, of all models together
_LOCK = threading.Lock()  # held while what is remembered is searched or changed, never in a pass


class Slots(NamedTuple):
    """Tokens behind [BOS] that prompts own: how many, and whether the tower's input holds the prompts already."""

    number: int = 0
    replaced: bool = False


@dataclass
class Layout:
    """Positions of K texts in R rows of T tokens.

    Attributes:
        input_ids: (R, T), the rows.
        positions: (R, T), each token's position in its own text.
        mask: (R, 1, T, T), True where a token sees another.
        ends: (K,), where each text's [EOT] is in the flattened rows.
        added: dtype -> the mask as a number that is added to scores, made when it is first needed.
    """

    input_ids: Tensor
    positions: Tensor
    mask: Tensor
    ends: Tensor
    added: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        input_ids, positions = self.input_ids.to(device), self.positions.to(device)
        return Layout(input_ids, positions, self.mask.to(device), self.ends.to(device))

    @torch.inference_mode(False)
    def attention_mask(self, implementation: str, dtype: torch.dtype) -> Tensor:
        """The mask as the tower's attention takes it, (R, 1, T, T).

        Under "sdpa" True where a token sees another, else 0 there and the least number of that dtype elsewhere.
        """
        if implementation == "sdpa":
            return self.mask
        if dtype not in self.added:
            zero = torch.zeros((), dtype=dtype, device=self.mask.device)
            added = torch.where(self.mask, zero, torch.finfo(dtype).min)
            with _LOCK:
                self.added.setdefault(dtype, added)
        return self.added[dtype]


def lay_out(input_ids: Tensor, ends: list[int], context: int) -> Layout | None:
    """Put K texts that agree in their first `context` tokens into rows; None where that is no shorter.

    Args:
        input_ids: (K, L), on the CPU.
        ends: place of each text's [EOT], not before `context`.
    """
    own = [end + 1 - context for end in ends]
    members: list[list[int]] = [[] for _ in range(min(len(ends), max(1, round(sum(own) / _TOKENS))))]
    filled = [0] * len(members)
    for k in sorted(range(len(ends)), key=lambda k: -own[k]):  # the longest first, each into the emptiest row
        row = filled.index(min(filled))
        members[row].append(k)
        filled[row] += own[k]
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
            text[row, start:stop] = k + 1  # 0 is the context, and what is left of the row, which nobody reads
            places[k] = row * width + stop - 1
    seen = (text[:, :, None] == text[:, None, :]) | (torch.arange(width) < context)
    seen &= torch.ones(width, width, dtype=torch.bool).tril()
    return Layout(rows, positions, seen[:, None], places)


@dataclass
class Texts:
    """A list of texts that was read.

    On the CPU texts are known again by value. Elsewhere that would make the host wait: by their place in memory, which
    holding the tensor keeps from others, and by torch's count of changes, which writes through `.data` escape.

    Attributes:
        input_ids: (K, L), as they were given.
        ends: place of each text's [EOT].
        layout: how to pack them, or None.
    """

    input_ids: Tensor
    values: Tensor
    version: int
    asked: tuple[EndOfText, int, bool, bool]
    ends: list[int]
    layout: Layout | None

    def matches(self, input_ids: Tensor, asked: tuple[EndOfText, int, bool, bool]) -> bool:
        """Return True for a list that was read before, and asked for in the same way."""
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


_TEXTS: list[Texts] = []  # read lately, the last one first


def read_texts(
    input_ids: Tensor, end_of_text: EndOfText, slots: int = 0, replaced: bool = False, packed: bool = False
) -> Texts:
    """Find where texts end and how they can share rows; a list that was read lately is known again.

    Reading copies the ids from the device.

    Args:
        input_ids: (K, L).
        end_of_text: the rule by which the tower finds [EOT].
        slots: n, tokens behind [BOS] that prompts own.
        replaced: the prompt stands in these slots from the input on, whatever words were there.
        packed: lay them out in rows too.
    """
    asked = (end_of_text, slots, replaced, packed)
    with _LOCK:
        known = next((texts for texts in _TEXTS if texts.matches(input_ids, asked)), None)
    if known is None:
        known = _look(input_ids, asked)
        with _LOCK:
            _TEXTS[:] = [known, *_TEXTS[: _REMEMBERED - 1]]
    return known


@torch.inference_mode(False)  # what is remembered may be trained with next
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
