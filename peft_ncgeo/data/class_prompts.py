"""Class names as texts whose first slots are free for prompts (CoOp's layout)."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..templates import padded_template, placeholder_ids


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

    Raises:
        ValueError: naming the class, when there are none, a name is empty or given twice (also as the same tokens:
            two equal texts never separate), does not fit into `max_length`, or would be overwritten because the
            tokenizer joins it with the words in front of it.

    Example:

    ```python
    texts = class_prompts(["red panda", "snow leopard"], "a photo of a {}.", 4, processor.tokenizer)
    features = model.get_text_features(**texts).pooler_output
    ```
    """
    if isinstance(names, str):
        raise TypeError(f"class names must be a list of names, got the single string {names!r}.")
    names = list(names)
    if not names:
        raise ValueError("class_prompts needs at least one class name.")
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"Class {i} has the name {name!r}; names must be non-empty strings.")
    limit = max_length or tokenizer.model_max_length
    padded = padded_template(template, num_text_tokens, tokenizer)
    # replace, not format: a name or template may hold braces of its own
    rows = tokenizer([padded.replace("{}", name.replace("_", " ")) for name in names]).input_ids
    expected = placeholder_ids(template, num_text_tokens, tokenizer)
    if num_text_tokens and rows[0][0] != tokenizer.bos_token_id:
        raise ValueError("Text prompts need a tokenizer that puts one [BOS] token in front, as CLIP's does.")

    first_with: dict[tuple[int, ...], str] = {}
    for name, row in zip(names, rows, strict=True):
        if len(row) > limit:
            raise ValueError(
                f"Class name {name!r} would be cut off: its text has {len(row)} tokens and the model takes {limit}; "
                "shorten the name or the template, or use fewer text tokens."
            )
        if list(row[1 : 1 + num_text_tokens]) != expected:
            raise ValueError(
                f"Class name {name!r} would be overwritten by prompts: the tokenizer joins it with the words in front "
                f"of it in {template!r}; put a space before '{{}}'."
            )
        if tuple(row) in first_with:
            other = first_with[tuple(row)]
            raise ValueError(f"Duplicate class names: {other!r} and {name!r} give the same text and cannot separate.")
        first_with[tuple(row)] = name
    return tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
