"""Extension of Griffe: references such as [`~peft_ncgeo.data.long_tailed`] as links, equations as MathML."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert

REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
EQUATION = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 {2,}.*|[ ]*$))*)", flags=re.MULTILINE)
SESSION = re.compile(r"^( *)>>> .*(?:\n *\S.*)*", flags=re.MULTILINE)


def mathml(found: re.Match[str]) -> str:
    """Return an equation as MathML, which browsers draw without a library."""
    lines = found[2].splitlines()
    latex = "\n".join([lines[0].strip(), dedent("\n".join(lines[1:]))]).strip()
    return f'{found[1]}<div class="equation">{convert(latex, display="block")}</div>\n'


def reference(found: re.Match[str]) -> str:
    """Return a reference as a link where the API pages have the name, and as code elsewhere."""
    short, name = found.groups()
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'


def session(found: re.Match[str]) -> str:
    """Return lines of an interactive session as a block of code."""
    return f"{found[1]}```pycon\n{found[0]}\n{found[1]}```"


class Docstrings(Extension):
    """Rewrites each docstring before Griffe divides it into sections."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            text = REFERENCE.sub(reference, obj.docstring.value)
            obj.docstring.value = SESSION.sub(session, EQUATION.sub(mathml, text))
