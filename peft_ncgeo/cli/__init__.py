"""Command line: `peft-ncgeo`, or `python -m peft_ncgeo.cli`.

Each command has one file here with its options. Its work is in `run`, which is imported when the command is given.
"""

from .app import app, main

__all__ = ["app", "main"]
