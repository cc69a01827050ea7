"""Texts of others in a card: shown as they are, none of them read as Markdown, HTML or Python."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

# Control characters, half letters, and marks that turn the direction in which all that follows is read.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_READ = re.compile(r"[\\`*~|\[\]$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # an underscore inside a word is no emphasis
_BEGINS = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=[#+-]))")  # a heading or a list, where a line begins


def escape(text: Any) -> str:
    """A text as a line or a cell shows it, none of it read as Markdown or HTML."""
    return _BEGINS.sub(r"\1\\", _READ.sub(r"\\\g<0>", html.escape(_one_line(text), quote=False)))


def code_cell(value: Any) -> str:
    """A value as code in a line or a cell, where a bar would end the cell and a backtick the code."""
    text = _one_line(value)
    if "``" in text or "\\|" in text or not text:
        return escape(text)  # code has no way to write these, or three backticks would begin a block
    fence = "`` {} ``" if "`" in text else "`{}`"
    return fence.format(text).replace("|", "\\|")


def literal(text: str) -> str:
    """A text as Python writes it, in double quotes and one line; letters that cannot be seen are written by number."""
    return "".join(c if c.isprintable() else _numbered(c) for c in json.dumps(text, ensure_ascii=False))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], alignment: str = "") -> str:
    """A Markdown table of a head that is escaped and cells as they are; "l" and "r" align columns."""
    rule = [{"l": ":---", "r": "---:"}[side] for side in alignment] or ["---"] * len(head)
    head = [escape(title) for title in head]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _one_line(text: Any) -> str:
    return _UNSHOWN.sub("\ufffd", " ".join(str(text).split()))


def _numbered(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"
