"""A last look at all that would be published: no tokens, and no paths of this machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath

from huggingface_hub import get_token
from huggingface_hub.utils import get_stored_tokens

_SHORTEST = 8  # characters of a secret; fewer could be anything
_PRIVATE = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY)$")  # how variables of the environment with secrets end
_SHAPES = {  # what looks so is a secret, whoever's it is
    "what looks like a token of the Hub": re.compile(rb"hf_[A-Za-z0-9]{20,}"),
    "what looks like a token of GitHub": re.compile(rb"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"),
    "what looks like an API key": re.compile(
        rb"(?<![A-Za-z0-9])(sk-[\w-]{32,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{20,})"
    ),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_NESTED = 3  # JSON texts in the strings of others
_ESCAPED = re.compile(rb"(?P<letters>(?:\\u[0-9a-fA-F]{4})+)|\\(?P<letter>.)", re.DOTALL)


def refuse_secrets(folder: Path, base: str, token: str | None, texts: Mapping[str, str | None]) -> None:
    """Look for secrets in every file of a folder, and in texts that are published beside it.

    Args:
        base: where the base model was loaded from.
        token: with which will be published.
        texts: name -> text.

    Raises:
        ValueError: one line that names the file and the line in it, and says which kind of secret it holds.
    """
    shapes = [(what, re.compile(re.escape(secret.encode()))) for secret, what in _known(token).items()]
    shapes += [*_SHAPES.items(), *(("a path of this machine", place) for place in _places(folder, base))]
    for name, content in _contents(folder, texts):
        for form in _forms(content):
            for what, shape in shapes:
                found = shape.search(form)
                if found:
                    line = form.count(b"\n", 0, found.start()) + 1
                    raise ValueError(
                        f"{name} holds {what} in line {line} and was not pushed; nothing was. Take it out."
                    )


def _contents(folder: Path, texts: Mapping[str, str | None]) -> Iterator[tuple[str, bytes]]:
    yield from ((name, text.encode("utf-8", "surrogatepass")) for name, text in texts.items() if text)
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix != ".png":
            yield file.relative_to(folder).as_posix(), file.read_bytes()


def _known(token: str | None) -> dict[str, str]:
    """Secret -> what it is: tokens for the Hub, and what the environment holds under a name that says so."""
    held = {value: f"the value of {name}" for name, value in os.environ.items() if _PRIVATE.search(name)}
    tokens = [token, get_token(), *get_stored_tokens().values()]
    held |= {secret: "the token" for secret in tokens if secret}
    return {secret: what for secret, what in held.items() if len(secret) >= _SHORTEST}


def _forms(content: bytes) -> Iterator[bytes]:
    """A text as it is and without what was put in front of its letters: once for each text that is inside another."""
    yield content
    yield content.replace(b"\\", b"")  # Markdown's, which stand in front of some letters
    for _ in range(_NESTED):
        content = _ESCAPED.sub(_plain, content)
        yield content


def _plain(escaped: re.Match[bytes]) -> bytes:
    if escaped["letters"]:
        letters: str = json.loads(b'"%b"' % escaped["letters"])
        return letters.encode("utf-8", "surrogatepass")
    return b" " if escaped["letter"] in b"nrtbf" else escaped["letter"]  # no line more


def _places(folder: Path, base: str) -> Iterator[re.Pattern[bytes]]:
    """Find where a path of this machine begins: not inside another one, nor behind the name of a host."""
    own = {str(Path.cwd()): False, str(folder.parent): False, str(Path.home()): True, base: True}
    for place, by_itself in own.items():
        trimmed = place.rstrip("/\\")
        if not _is_absolute(trimmed) or len(trimmed) < len("/xy"):
            continue
        # one name at the root, /data say, tells nothing by itself
        by_itself = by_itself or len(re.split(r"[/\\]", trimmed)) > 2
        end = r"(?![\w-]|\.\w)" if by_itself else r"[/\\]"
        yield re.compile(rb"(?<![\w.-])" + re.escape(trimmed.encode("utf-8", "surrogateescape")) + end.encode())


def _is_absolute(place: str) -> bool:
    return os.path.isabs(place) or PureWindowsPath(place).is_absolute()
