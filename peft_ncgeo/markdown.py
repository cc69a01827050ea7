"""Markdown from untrusted texts, which are escaped so that none is read as Markdown, HTML or Python."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

# Control characters, lone surrogates, and marks that change the direction of the text after them.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_READ = re.compile(r"[\\`*~|\[\]$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # an underscore inside a word is not emphasis
_BEGINS = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=[#+-]))")  # a heading or a list at the start of a line


def escape(text: Any) -> str:
    """Return a text in one line for a paragraph or a table cell, with all Markdown and HTML escaped."""
    return _BEGINS.sub(r"\1\\", _READ.sub(r"\\\g<0>", html.escape(_one_line(text), quote=False)))


def code_cell(value: Any) -> str:
    """Return a value as inline code for a paragraph or a table cell, with bars and backticks escaped."""
    text = _one_line(value)
    if "``" in text or "\\|" in text or not text:
        return escape(text)  # inline code cannot hold these, and three backticks would begin a block
    fence = "`` {} ``" if "`" in text else "`{}`"
    return fence.format(text).replace("|", "\\|")


def literal(text: str) -> str:
    """Return a text as a Python string literal in double quotes on one line; escape non-printable characters."""
    return "".join(c if c.isprintable() else _numbered(c) for c in json.dumps(text, ensure_ascii=False))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], alignment: str = "") -> str:
    """Return a Markdown table. The head is escaped, the cells are not; "l" and "r" align columns left and right."""
    rule = [{"l": ":---", "r": "---:"}[side] for side in alignment] or ["---"] * len(head)
    head = [escape(title) for title in head]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _one_line(text: Any) -> str:
    return _UNSHOWN.sub("\ufffd", " ".join(str(text).split()))


def _numbered(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"
