"""`peft-ncgeo recipes`."""

from __future__ import annotations

from . import run


def recipes() -> None:
    """List the recipes: name, method, paper and model of each.

    Those under `images` are for image classifiers, those under `demo` for the built-in models.
    """
    run.recipes()
