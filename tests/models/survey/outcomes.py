"""Outcomes of the survey's tries."""

from __future__ import annotations

import contextlib
import io
import traceback
from collections.abc import Callable

from .inputs import NotApplicable, Wrong


def describe(error: BaseException) -> str:
    """`refused` where the package says no in words of its own, else `CRASH`, with the error's first line."""
    frames = traceback.extract_tb(error.__traceback__)
    last, own = frames[-1], [frame for frame in frames if "/peft_ncgeo/" in frame.filename]
    lines = (str(error).strip() or "(no message)").splitlines()
    text = f"{type(error).__name__}: {(lines[0] if len(lines[0]) > 25 else ' '.join(lines[:3]))[:260]}"
    said = "/peft_ncgeo/" in last.filename and (last.line or "").strip().startswith("raise")
    if said and isinstance(error, ValueError | TypeError | NotImplementedError):
        return f"refused {text}"
    where = " from ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in (last, *own[-1:]))
    return f"CRASH {text} @ {where}"


def outcome(attempt: Callable[[], str | None]) -> tuple[str, str]:
    """Run an attempt and return its outcome (works, WRONG, n/a, refused or CRASH) and a remark on it."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return "works", attempt() or ""
    except Wrong as error:
        return "WRONG", str(error)
    except NotApplicable as error:
        return "n/a", str(error)
    except Exception as error:
        status, _, message = describe(error).partition(" ")
        return status, message
