"""Config classes of this package's methods, as they are registered with PEFT."""

from __future__ import annotations

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig


def own_configs() -> dict[str, type[PeftConfig]]:
    """Return the config classes of this package's methods by their names."""
    package = __name__.partition(".")[0]
    found = PEFT_TYPE_TO_CONFIG_MAPPING.values()
    return {config.__name__: config for config in found if config.__module__.startswith(f"{package}.")}
