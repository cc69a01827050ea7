"""Rules by which text towers read texts: tokens in front, padding, attention, and the token that is pooled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class EndOfText:
    """Rule by which a text tower finds [EOT], the token whose feature is the feature of the text.

    Attributes:
        token_id: [EOT] is the first token with this id; None: the first token with the largest id of the text.
    """

    token_id: int | None

    def positions(self, input_ids: Tensor) -> Tensor:
        """Return the position (K,) of each text's [EOT] in token ids (K, L)."""
        score = input_ids if self.token_id is None else (input_ids == self.token_id).int()
        return score.argmax(dim=-1)


@dataclass(frozen=True)
class TextReading:
    """Rules by which a text tower reads texts.

    Attributes:
        pools: the token whose feature is the text's: an [`EndOfText`], "first" ([CLS]) or "last" (of the padded row);
            or "mean", over all tokens.
        front: number of special tokens before the words, 1 for [BOS] or [CLS]. Prompts fill the slots behind them.
        full_length: True if texts are padded to the tower's full length and read without a mask, padding included.
        unused_positions: number of positions in the tower's table that no token gets.

    A tower that pools at [EOT] is causal, so tokens behind [EOT] do not matter. A tower that pools at [CLS], or the
    mean, needs a mask over the padding.
    """

    pools: EndOfText | str
    front: int = 1
    full_length: bool = False
    unused_positions: int = 0

    @property
    def end_of_text(self) -> EndOfText | None:
        """Rule to find [EOT] in a causal tower that pools there, else None."""
        return self.pools if isinstance(self.pools, EndOfText) else None


def check_full_length(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Raise an error if token ids (K, L) are not padded in the way in which SigLIP's text tower was trained.

    Raises:
        ValueError: texts are shorter than the tower's full length, or have a mask.
    """
    length, found = model.config.text_config.max_position_embeddings, input_ids.shape[1]
    if found != length or attention_mask is not None:
        raise ValueError(
            f"{type(model).__name__} reads texts padded to {length} tokens, without a mask; got {found} tokens and "
            f"{'no mask' if attention_mask is None else 'a mask'}. Write them with class_prompts(..., model=model)."
        )


CLS = TextReading("first")
MEAN = TextReading("mean", front=0)
PADDED = TextReading("last", front=0, full_length=True)
