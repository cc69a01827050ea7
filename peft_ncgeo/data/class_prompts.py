"""Tokenisation of class names, with the first positions free for prompts (CoOp's layout)."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..models.adapters import unwrap
from ..models.templates import padded_template, placeholder_ids, spelled
from ..models.text_reading import EndOfText, TextReading
from ..models.towers import text_tower
from ..validation import check_int, short_repr
from .class_texts import ClassTexts, list_class_texts, texts_of

_CLIP = TextReading(EndOfText(None))
_SPECIAL = ("bos", "eos", "pad", "cls", "sep")
_TOKENISED = 1024  # texts in a call of the tokenizer
_HALF_A_LETTER = re.compile("[\ud800-\udfff]")
_LOCK = threading.Lock()  # a fast tokenizer changes its settings in a call, which fails if another thread reads them


def class_prompts(
    names: Sequence[str],
    template: str,
    num_text_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    model: nn.Module | None = None,
    class_texts: ClassTexts | None = None,
) -> BatchEncoding:
    """Tokenise `template` for every class name, with the first `num_text_tokens` slots free for prompts.

    A slot is the position of one token. The slots follow [BOS] or [CLS]; SigLIP has no token in front. If the template
    has too few tokens before the name, placeholder words are put before it; if it has more, the tokens behind the
    slots do not change. Rows are as long as the longest text, which is enough for CLIP, whose text tower is causal and
    pools at [EOT], and for models that read a mask. Rows for SigLIP are padded to its full length and have no mask, as
    it was trained.

    Args:
        names: K different class names. An underscore is read as a space, as in CoOp.
        template: text around a name, with `{}` in place of the name.
        num_text_tokens: number of slots that prompts will overwrite; 0 for a model without text prompts.
        tokenizer: the model's tokenizer.
        max_length: number of positions of the text tower. Default: the model's, or `tokenizer.model_max_length`
            without a model.
        model: the dual encoder that will read the texts. Without it, texts are written for CLIP: if there are prompts,
            the tokenizer must put one [BOS] token first.
        class_texts: texts of some classes, as a dict from a name to a list, in place of the name in the template; "{}"
            in a text stands for the name. Prompts stand before all words of these texts.

    Returns:
        `input_ids` and `attention_mask`, each `(K, L)` int64; no mask for a model that reads texts without a mask. If
        `class_texts` has texts for a class, `(R, L)` with the texts of each class in adjacent rows, and the list
        `counts` of the K numbers of texts; see [`~peft_ncgeo.geometry.sphere.mean_directions`].

    If all names are numbers, a warning says so: they may be digits in the images, or labels that `class_encode_column`
    has turned into names.

    Raises:
        TypeError: `names` is not a list of names.
        NotImplementedError: it is not known how the model reads texts.
        ValueError: `names` is empty; or a name is empty (also for the tokenizer), appears twice (also as the same
            tokens, since equal texts never separate), holds a special token such as [EOT], does not fit into
            `max_length`, or would be overwritten because the tokenizer joins it with the word before it (the message
            gives the name); or the template, a text in `class_texts` or `num_text_tokens` does not fit; or the
            tokenizer is not the model's or has no padding token.

    Example:

    ```python
    texts = class_prompts(["red panda", "snow leopard"], "a photo of a {}.", 4, processor.tokenizer)
    features = model.get_text_features(**texts).pooler_output
    ```
    """
    names = list_names(names)
    if not names:
        raise ValueError("class_prompts needs at least one class name.")
    texts = texts_of(names, list_class_texts(class_texts))
    plain = [name for name, own in zip(names, texts, strict=True) if not own]
    if plain and all(is_number(name) for name in plain):
        warnings.warn(
            f"All class names are numbers ({short_repr(plain[0])}, ...), which the model reads as numbers; if they "
            'stand for words, name the classes: dataset.cast_column("label", datasets.ClassLabel(names=[...])).',
            stacklevel=2,
        )
    num_text_tokens = check_int("num_text_tokens", num_text_tokens, least=0)
    reading, longest = _CLIP, tokenizer.model_max_length
    if model is not None:
        tower = text_tower(model)
        assert tower.reading is not None  # text_tower knows both
        assert tower.max_length is not None
        reading, longest = tower.reading, tower.max_length
    limit = check_int("max_length", longest if max_length is None else max_length, least=1)
    if num_text_tokens > limit:
        raise ValueError(f"num_text_tokens={num_text_tokens} leaves no room for a name among {limit} slots.")
    with _LOCK:
        padded = padded_template(template, num_text_tokens, tokenizer)
        nameless = _token_ids([""], padded, tokenizer)[0]
        expected = placeholder_ids(template, num_text_tokens, tokenizer)
    first, special = reading.front, {getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
    if (num_text_tokens or model is not None) and (len(nameless) > 1 and nameless[0] in special) != first:
        raise ValueError(
            f"The tokenizer must put {'one [BOS] or [CLS] token' if first else 'no special token'} before a text, as "
            f"{'CLIP' if model is None else type(unwrap(model)).__name__} was trained. For another dual encoder, such "
            "as SigLIP, pass model and its own tokenizer."
        )
    rows: dict[str, list[list[int]]] = {}
    for name, row in _rows(plain, padded, tokenizer):
        if len(row) > limit:
            raise ValueError(
                f"Class name {short_repr(name)} would be cut off: its text has {len(row)} tokens and the model takes "
                f"{limit}; shorten the name or the template, or use fewer text tokens."
            )
        if row[first : first + num_text_tokens] != expected:
            raise ValueError(
                f"Class name {short_repr(name)} would be overwritten by prompts: the tokenizer joins it with the word "
                f"before it in {short_repr(template)}; put a space before '{{}}'."
            )
        if row == nameless:
            raise ValueError(
                f"Class name {short_repr(name)} is not a word to the tokenizer, which skips it; rename it."
            )
        if not special.isdisjoint(row[first:-1]):
            raise ValueError(
                f"Class name {short_repr(name)} or {short_repr(template)} holds a token that begins or ends a text, "
                "so the model would not read all of it; remove it."
            )
        rows.setdefault(name, []).append(row)
    for name, own in zip(names, texts, strict=True):
        for text, row in _rows(own, "{}", tokenizer):
            row = [*row[:first], *expected, *row[first:]]
            what = f"Text {short_repr(text)} of class {short_repr(name)}"
            if len(row) > limit:
                raise ValueError(
                    f"{what} would be cut off: it has {len(row)} tokens, {num_text_tokens} of them for prompts, and "
                    f"the model takes {limit}; shorten it."
                )
            if len(row) <= first + num_text_tokens + 1 or not special.isdisjoint(row[first:-1]):
                raise ValueError(f"{what} holds no word, or a token that begins or ends a text; write it again.")
            rows.setdefault(name, []).append(row)
    _check_apart(names, rows)
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no padding token; set tokenizer.pad_token, as the model was trained.")
    of_classes = [rows[name] for name in names]
    written = [row for of_class in of_classes for row in of_class]
    lengths = torch.tensor(list(map(len, written)))
    width = limit if reading.full_length else int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    input_ids = torch.full((len(written), width), tokenizer.pad_token_id)
    input_ids[mask] = torch.tensor([token for row in written for token in row])
    counts = {"counts": list(map(len, of_classes))} if any(texts) else {}
    return BatchEncoding(
        {"input_ids": input_ids, **({} if reading.full_length else {"attention_mask": mask.long()}), **counts}
    )


def _check_apart(names: Sequence[str], rows: Mapping[str, list[list[int]]]) -> None:
    """Raise an error if two classes have the same texts."""
    seen: set[str] = set()
    first_with: dict[frozenset[tuple[int, ...]], str] = {}
    for name in names:
        other = first_with.setdefault(frozenset(map(tuple, rows[name])), name)
        if name in seen or other != name:
            raise ValueError(
                f"Duplicate class names: {short_repr(other)} and {short_repr(name)} give the same text and cannot "
                "separate; rename one."
            )
        seen.add(name)


def _rows(names: Sequence[str], template: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    """Yield each name with the token ids of its text, few at a time, since a tokenizer's output is large."""
    for start in range(0, len(names), _TOKENISED):
        part = names[start : start + _TOKENISED]
        with _LOCK:
            rows = _token_ids(part, template, tokenizer)
        yield from zip(part, rows, strict=True)


def _token_ids(names: Sequence[str], template: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # replace, not format: a name or template may hold other braces
    texts = [template.replace("{}", spelled(name)) for name in names]
    return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False).input_ids


def is_number(name: str) -> bool:
    """Return True for a class name that is a number, with or without a sign and a decimal point."""
    return re.fullmatch(r"[+-]?\d+(\.\d*)?", name.strip()) is not None


def list_names(names: Any) -> list[str]:
    """Return class names as a list, in their order.

    Raises:
        TypeError: `names` is not iterable, has no order, or is a single string.
        ValueError: a name is not a string, is empty, or is not valid Unicode.
    """
    if isinstance(names, str):
        raise TypeError(f"class names must be a list of names, got the single string {short_repr(names)}.")
    if not isinstance(names, Iterable) or isinstance(names, bytes | Mapping | set | frozenset):
        raise TypeError(f"class names must be a list of names, got {type(names).__name__}.")
    names = list(names)
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"Class {i} has the name {short_repr(name)}; names must be non-empty strings.")
        if _HALF_A_LETTER.search(name):
            raise ValueError(
                f"Class {i} has the name {short_repr(name)} with half a letter in it (a surrogate); write it again."
            )
    return names
