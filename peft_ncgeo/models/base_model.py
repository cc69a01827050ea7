"""Where a base model came from: a folder of this machine, or a repository of the Hub at some revision."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from torch import nn

from .adapters import unwrap


def base_name(model: nn.Module) -> str:
    """The Hub id that the base model was loaded from, or the absolute path; empty where nothing says so.

    A relative name of which the Hub's cache on this machine holds nothing is a path, also where no such folder is
    seen: the working folder may have changed, and on the Hub the name may be somebody else's.
    """
    name = str(getattr(unwrap(model), "name_or_path", "") or "")
    return os.path.abspath(name) if name and (is_folder(name) or not _is_cached(name)) else name


def is_folder(name: str | None) -> bool:
    """Whether what a base model was loaded from is a path of this machine, rather than an id on the Hub."""
    return name is not None and (Path(name).exists() or os.path.isabs(name) or name.count("/") > 1)


def base_revision(model: Any) -> str | None:
    """The revision of the base model that a model's adapters were made for, as their configs say."""
    name, configs = getattr(unwrap(model), "name_or_path", None), getattr(model, "peft_config", {}).values()
    revisions = {config.revision for config in configs if config.base_model_name_or_path in (None, name)} - {None}
    return revisions.pop() if len(revisions) == 1 else None


def _is_cached(name: str) -> bool:
    held = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    return any(held.glob("*/config.json"))
