"""`peft-ncgeo describe`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import run


def describe(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a model, or 'demo'.")],
) -> None:
    """Show a model's parts, and which methods fit it.

    No weights are loaded.
    """
    run.describe(model)
