"""The text around a class name for Transformers' zero-shot pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from ..models.templates import DEFAULT_TEMPLATE, find_tokenizer, padded_template
from ..models.text_setting import text_setting
from .load import fetch_adapter, read_config
from .text_setting_file import read_text_setting


def hypothesis_template(
    config_or_repo: PeftConfig | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Return the `hypothesis_template` for `pipeline("zero-shot-image-classification")` with a tuned model.

    Text prompts replace the first words before the class name. A pipeline does not know this: with another template,
    prompts would replace words of it. The returned template has one word for every prompt. For adapters without text
    prompts, such as LoRA, it is the template that they were trained with, from the file `geometry.json` beside them.

    Args:
        config_or_repo: config, folder or Hub repository of an adapter.
        tokenizer: the model's tokenizer. Default: the one beside the adapter, else the base model's.
        revision, token: for the Hub repository.

    Raises:
        OSError, ValueError: the adapter cannot be read, or no tokenizer is found.

    Example:

    ```python
    classify = pipeline("zero-shot-image-classification", model="user/adapter")
    classify(image, candidate_labels=names, hypothesis_template=hypothesis_template("user/adapter"))
    ```
    """
    places: list[tuple[Any, Any]] = []
    config: Any = config_or_repo
    template = text_setting(config).template
    if not isinstance(config_or_repo, PeftConfig):
        folder = fetch_adapter(config_or_repo, revision, token)
        config, places = read_config(folder, config_or_repo), [(str(folder), None)]
        template = text_setting(config).template or read_text_setting(folder).template
    slots, template = getattr(config, "num_text_tokens", 0), template or DEFAULT_TEMPLATE
    if not slots:
        return template
    places += [(getattr(config, "tokenizer_name_or_path", None), None)]
    places += [(config.base_model_name_or_path, config.revision)]
    for place, at in places:
        tokenizer = tokenizer or find_tokenizer(place, at)
    if tokenizer is None:
        raise ValueError("No tokenizer is found with the adapter or its base model; pass tokenizer.")
    return padded_template(template, slots, tokenizer)
