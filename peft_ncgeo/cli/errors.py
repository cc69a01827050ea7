"""Errors of the command line: one line for errors that a user can mend, a traceback for all others."""

from __future__ import annotations

import dis
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

_PACKAGE = Path(__file__).parents[1]
_EXPLAINED = (ValueError, TypeError, OSError, NotImplementedError, ImportError, FloatingPointError, RuntimeError)
# optional package -> the extra that installs it
_EXTRAS = {"gradio": "demo", "matplotlib": "plot", "onnx": "onnx", "onnxruntime": "onnx", "onnxscript": "onnx"}


class OneLineErrors(TyperGroup):
    """Group of commands whose errors are one line, with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _EXPLAINED as error:
            text = explain(error)
            if text is None:
                raise
            typer.echo(f"Error: {text}", err=True)
            raise typer.Exit(2) from error


def explain(error: BaseException) -> str | None:
    """Return one line for an error of this package, of a file, or of a missing package; else None.

    Any other error is unexpected: its traceback is needed.
    """
    if isinstance(error, typer.Exit | typer.Abort | BrokenPipeError):
        return None  # the reader of a pipe, such as `head`, may stop first: Typer ends the command
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get((error.name or "").split(".")[0])):
        return f"{error.name} is not installed; install it with `pip install peft_ncgeo[{extra}]`."
    return " ".join(str(error).split()) if isinstance(error, OSError) or _is_own(error) else None


def _is_own(error: BaseException) -> bool:
    """Return True if a `raise` statement of this package raised the error, not the interpreter or a library."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    code = place.tb_frame.f_code
    raised = code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and Path(code.co_filename).is_relative_to(_PACKAGE)
