"""Templates such as "a photo of a {}." and the token slots in front of the class name."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..validation import check_length, shown

DEFAULT_TEMPLATE = "a photo of a {}."  # CLIP's own, where neither an adapter nor an argument names one

_PLACEHOLDER = "X"  # CoOp's; any word of one token would do, its embedding is replaced


def find_tokenizer(name_or_path: str | None, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of that name or folder, or None where there is none to be had without code of its own."""
    if not name_or_path:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None
    # For a CLIP saved without its tokenizer Transformers makes one up that knows no words.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def check_template(template: Any, name: str = "template") -> None:
    """Refuse what is not a text with one place for the class name."""
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ValueError(f"{name}={shown(template)} must hold '{{}}' once, where the class name goes.")
    check_length(name, template)


def padded_template(template: str, num_text_tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template with placeholder words in front, so that at least `num_text_tokens` tokens precede the name.

    Example: `padded_template("a photo of a {}.", 6, tokenizer)` is `"X X a photo of a {}."`; with 4 it is unchanged.
    """
    check_template(template)
    prefix = template.split("{}")[0].rstrip()
    missing = num_text_tokens - len(tokenizer(prefix, add_special_tokens=False).input_ids)
    return f"{_PLACEHOLDER} " * max(0, missing) + template


def behind_prompts(template: str, num_text_tokens: int) -> str:
    """The template with a placeholder word for every prompt in front, so that all of its own words stay."""
    return f"{_PLACEHOLDER} " * num_text_tokens + template


def placeholder_ids(template: str, num_text_tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that the padded template puts into slots `1..num_text_tokens`."""
    prefix = padded_template(template, num_text_tokens, tokenizer).split("{}")[0].rstrip()
    return list(tokenizer(prefix, add_special_tokens=False).input_ids[:num_text_tokens])
