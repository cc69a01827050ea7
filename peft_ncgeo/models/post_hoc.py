"""Changes of an adapter after its training, recorded for its model card."""

from __future__ import annotations

from typing import Any

_ATTRIBUTE = "ncgeo_post_hoc"  # of a PEFT config: no field, so PEFT neither writes nor compares it


def remember_change(model: Any, adapter: str, change: str) -> None:
    """Record a change of an adapter of a model under PEFT, as text."""
    config = model.peft_config[adapter]
    setattr(config, _ATTRIBUTE, [*changes_after_training(config), change])


def forget_change(model: Any, adapter: str, change: str) -> None:
    """Remove the last recorded change with this text, after it was undone."""
    config = model.peft_config[adapter]
    found = changes_after_training(config)
    if change in found:
        last = len(found) - 1 - found[::-1].index(change)
        setattr(config, _ATTRIBUTE, found[:last] + found[last + 1 :])


def changes_after_training(config: Any) -> list[str]:
    """Return the recorded changes of an adapter, the first one first."""
    return list(getattr(config, _ATTRIBUTE, []))
