"""`peft-ncgeo demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import run
from .options import Adapter, BaseModel


def demo(
    adapter: Adapter,
    base_model: BaseModel = None,
    share: Annotated[bool, typer.Option("--share", help="Give the page a public address for some days.")] = False,
    port: Annotated[int | None, typer.Option("--port", help="Default: 7860 or the next free one.")] = None,
) -> None:
    """Open a page in the browser that classifies images.

    Needs gradio: `pip install peft_ncgeo[demo]`.
    """
    run.demo(adapter, base_model, share, port)
