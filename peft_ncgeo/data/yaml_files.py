"""YAML files, read in one way everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..values import reason


class _Loader(yaml.SafeLoader):
    """Reads 5e-3 as a number, as YAML 1.2 does and PyYAML does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def read_yaml(path: str | Path, what: str) -> Any:
    """What a file holds.

    Args:
        what: it describes, for the error.

    Raises:
        ValueError: it is missing or no YAML.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except Exception as error:  # PyYAML's constructors have errors of many kinds
        raise ValueError(f"{what} {path} cannot be read: {reason(error)}") from error
