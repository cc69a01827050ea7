"""Class names as texts whose first slots are free for prompts (CoOp's layout)."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..models.templates import padded_template, placeholder_ids
from ..validation import check_int, short_repr

_LOCK = threading.Lock()  # fast tokenizers change their settings in a call, and fail where another thread reads them


def class_prompts(
    names: Sequence[str],
    template: str,
    num_text_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> BatchEncoding:
    """Tokenise `template` for every class name, with slots `1..num_text_tokens` free for prompts.

    Where the template has fewer tokens in front of the name, placeholder words are written before it; where it has
    more, those past slot `num_text_tokens` stay as they are. Rows are as long as the longest text: the text tower is
    causal and pooled at [EOT], so padding to its full length would change nothing but the time.

    Args:
        names: K class names, all different. An underscore is read as a space, as CoOp does.
        template: text around a name, `{}` standing for it.
        num_text_tokens: number of slots that prompts will overwrite; 0 for a model without text prompts.
        tokenizer: the model's tokenizer. It must put one [BOS] token in front.
        max_length: positions of the text tower. Default: `tokenizer.model_max_length`.

    Returns:
        `input_ids` and `attention_mask`, each `(K, L)` int64.

    Names that are all numbers bring a warning: they may be digits to be read off the images, or what
    `class_encode_column` makes of labels whose names nobody told.

    Raises:
        TypeError: no list of names.
        ValueError: naming the class, when there are none, a name is empty (also for the tokenizer) or given twice
            (also as the same tokens: two equal texts never separate), holds a token such as [EOT] that means something
            else to the model, does not fit into `max_length`, or would be overwritten because the tokenizer joins it
            with the words in front of it.

    Example:

    ```python
    texts = class_prompts(["red panda", "snow leopard"], "a photo of a {}.", 4, processor.tokenizer)
    features = model.get_text_features(**texts).pooler_output
    ```
    """
    names = list_names(names)
    if not names:
        raise ValueError("class_prompts needs at least one class name.")
    if all(is_number(name) for name in names):
        warnings.warn(
            f"All class names are numbers ({short_repr(names[0])}, ...), which the model reads as they are; if they "
            "stand "
            'for something else, name it: dataset.cast_column("label", datasets.ClassLabel(names=[...])).',
            stacklevel=2,
        )
    num_text_tokens = check_int("num_text_tokens", num_text_tokens, least=0)
    limit = check_int("max_length", tokenizer.model_max_length if max_length is None else max_length, least=1)
    if num_text_tokens > limit:
        raise ValueError(f"num_text_tokens={num_text_tokens} leaves no room for a name among {limit} slots.")
    with _LOCK:
        padded = padded_template(template, num_text_tokens, tokenizer)
        # replace, not format: a name or template may hold braces of its own
        nameless, *rows = tokenizer([padded.replace("{}", name.replace("_", " ")) for name in ["", *names]]).input_ids
        expected = placeholder_ids(template, num_text_tokens, tokenizer)
    if num_text_tokens and nameless[0] != tokenizer.bos_token_id:
        raise ValueError("Text prompts need a tokenizer that puts one [BOS] token in front, as CLIP's does.")

    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    first_with: dict[tuple[int, ...], str] = {}
    for name, row in zip(names, rows, strict=True):
        if len(row) > limit:
            raise ValueError(
                f"Class name {short_repr(name)} would be cut off: its text has {len(row)} tokens and the model takes "
                f"{limit}; shorten the name or the template, or use fewer text tokens."
            )
        if list(row[1 : 1 + num_text_tokens]) != expected:
            raise ValueError(
                f"Class name {short_repr(name)} would be overwritten by prompts: the tokenizer joins it with the "
                f"words in front of it in {short_repr(template)}; put a space before '{{}}'."
            )
        if row == nameless:
            raise ValueError(
                f"Class name {short_repr(name)} is no word to the tokenizer, which passes it over; rename it."
            )
        if not special.isdisjoint(row[1:-1]):
            raise ValueError(
                f"Class name {short_repr(name)} or {short_repr(template)} holds a token that begins or ends a text, "
                "and the model would not read all of it; take it out."
            )
        if tuple(row) in first_with:
            other = short_repr(first_with[tuple(row)])
            raise ValueError(
                f"Duplicate class names: {other} and {short_repr(name)} give the same text and cannot separate."
            )
        first_with[tuple(row)] = name
    return tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")


def is_number(name: str) -> bool:
    """Return True for a class name of digits alone, with or without a sign and a decimal point."""
    return re.fullmatch(r"[+-]?\d+(\.\d*)?", name.strip()) is not None


def list_names(names: Any) -> list[str]:
    """Class names as a list, in their order.

    Raises:
        TypeError: something that has no order, or no names at all.
        ValueError: a name that is no string or empty, or that is no text.
    """
    if isinstance(names, str):
        raise TypeError(f"class names must be a list of names, got the single string {short_repr(names)}.")
    if not isinstance(names, Iterable) or isinstance(names, bytes | Mapping | set | frozenset):
        raise TypeError(f"class names must be a list of names, got {type(names).__name__}.")
    names = list(names)
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"Class {i} has the name {short_repr(name)}; names must be non-empty strings.")
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"Class {i} has the name {short_repr(name)} with half a letter in it; write it anew.")
    return names
