"""Origin of a base model: a folder of this machine, or a Hub repository at a revision."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from torch import nn

from .adapters import unwrap


def base_name(model: nn.Module) -> str:
    """Return the Hub id or the absolute path that the base model was loaded from, or "" if it is not known.

    A relative name that is not in this machine's Hub cache is treated as a path, even if no such folder exists: the
    working folder may have changed, and on the Hub the name may belong to another user.
    """
    name = str(getattr(unwrap(model), "name_or_path", "") or "")
    return os.path.abspath(name) if name and (is_folder(name) or not _is_cached(name)) else name


def is_folder(name: str | None) -> bool:
    """Return True if the name of a base model is a path on this machine, not a Hub id."""
    return name is not None and (Path(name).exists() or os.path.isabs(name) or name.count("/") > 1)


def base_revision(model: Any) -> str | None:
    """Return the base model's revision from the configs of a model's adapters, or None if they do not agree on one."""
    name, configs = getattr(unwrap(model), "name_or_path", None), getattr(model, "peft_config", {}).values()
    revisions = {config.revision for config in configs if config.base_model_name_or_path in (None, name)} - {None}
    return revisions.pop() if len(revisions) == 1 else None


def _is_cached(name: str) -> bool:
    held = Path(HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    return any(held.glob("*/config.json"))
