"""Templates such as "a photo of a {}." and the token slots before the class name."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..validation import check_length, short_repr

DEFAULT_TEMPLATE = "a photo of a {}."  # CLIP's own; used if neither an adapter nor an argument gives one

_PLACEHOLDER = "X"  # as in CoOp; any word of one token works, its embedding is replaced


def find_tokenizer(name_or_path: str | None, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a Hub id or folder, or None if there is none or it needs remote code."""
    if not name_or_path:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None
    # For a CLIP saved without a tokenizer, Transformers builds one without any words.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def spelled(name: str) -> str:
    """Return a class name as it is written in texts, with spaces in place of underscores."""
    return name.replace("_", " ")


def check_template(template: Any, name: str = "template") -> None:
    """Raise an error unless a template is a text that holds "{}", the place of the class name, exactly once."""
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ValueError(f"{name}={short_repr(template)} must hold '{{}}' once, at the place of the class name.")
    check_length(name, template)


def padded_template(template: str, num_text_tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Put placeholder words before the template until at least `num_text_tokens` tokens precede the name.

    Example: `padded_template("a photo of a {}.", 6, tokenizer)` is `"X X a photo of a {}."`; with 4 it is unchanged.
    """
    check_template(template)
    prefix = template.split("{}")[0].rstrip()
    missing = num_text_tokens - len(tokenizer(prefix, add_special_tokens=False).input_ids)
    return f"{_PLACEHOLDER} " * max(0, missing) + template


def behind_prompts(template: str, num_text_tokens: int) -> str:
    """Put one placeholder word for each prompt before the template, so that prompts replace none of its own words."""
    return f"{_PLACEHOLDER} " * num_text_tokens + template


def placeholder_ids(template: str, num_text_tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token ids that the padded template puts into slots `1..num_text_tokens`."""
    prefix = padded_template(template, num_text_tokens, tokenizer).split("{}")[0].rstrip()
    return list(tokenizer(prefix, add_special_tokens=False).input_ids[:num_text_tokens])
