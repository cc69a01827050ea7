"""Command line: `peft-ncgeo`, or `python -m peft_ncgeo.cli`.

One file a command says what it takes; what it does is in `run`, which is imported when the command is given.
"""

from .app import app, main

__all__ = ["app", "main"]
