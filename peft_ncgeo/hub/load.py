"""Load an adapter, from a folder or from the Hub, onto its base model."""

from __future__ import annotations

import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from torch import nn


def load_adapter(repo_id: str, base_model: nn.Module | str | None = None) -> PeftModel:
    """The tuned model in evaluation mode.

    Args:
        repo_id: Hub repository or local folder with `adapter_config.json` and `adapter_model.safetensors`.
        base_model: the model to adapt, or where to load it from. Default: the one named in the adapter's config.

    Raises:
        ValueError: no base model is known; the file is damaged; or it does not fit the model, where any missing or
            unexpected weight is named.
    """
    repo_id = str(repo_id)
    config = PeftConfig.from_pretrained(repo_id)
    if not isinstance(base_model, nn.Module):
        base_model = _load_base(config, base_model)
    try:
        given = load_peft_weights(repo_id, device="cpu")
        model = PeftModel.from_pretrained(base_model, repo_id, config=config).eval()
    except SafetensorError as error:
        raise ValueError(f"The adapter file in {repo_id} is damaged or truncated ({error}).") from error
    except KeyError as error:  # PEFT looks the weights of modules_to_save up by name
        raise ValueError(f"The adapter file in {repo_id} does not fit the model: missing {error}.") from error
    differing = sorted(get_peft_model_state_dict(model).keys() ^ given.keys())
    if differing:
        which = "unexpected" if differing[0] in given else "missing"
        raise ValueError(
            f"The adapter file in {repo_id} does not fit the model: {which} {differing[0]} (of {len(differing)})."
        )
    return model


def _load_base(config: PeftConfig, name_or_path: str | None) -> nn.Module:
    name_or_path = name_or_path or config.base_model_name_or_path
    if not name_or_path:
        raise ValueError("The adapter's config names no base model; pass base_model.")
    class_name = (config.auto_mapping or {}).get("base_model_class", "AutoModel")
    return getattr(transformers, class_name, transformers.AutoModel).from_pretrained(str(name_or_path))
