"""Search for secrets (tokens, and paths of this machine) in everything that would be published."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath

from huggingface_hub import get_token
from huggingface_hub.utils import get_stored_tokens

_SHORTEST = 8  # characters of a secret; shorter texts could be anything
_PRIVATE = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY)$")  # ends of the names of environment variables with secrets
_SHAPES = {  # text of these shapes is a secret of this user or another
    "what looks like a token of the Hub": re.compile(rb"hf_[A-Za-z0-9]{20,}"),
    "what looks like a token of GitHub": re.compile(rb"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"),
    "what looks like an API key": re.compile(
        rb"(?<![A-Za-z0-9])(sk-[\w-]{32,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{20,})"
    ),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}
_NESTED = 3  # levels of JSON inside JSON strings
_ESCAPED = re.compile(rb"(?P<letters>(?:\\u[0-9a-fA-F]{4})+)|\\(?P<letter>.)", re.DOTALL)


def refuse_secrets(folder: Path, base: str, token: str | None, texts: Mapping[str, str | None]) -> None:
    """Raise an error if a file of a folder, or a text that is published with it, holds a secret.

    Args:
        base: source of the base model.
        token: the token used for publishing.
        texts: name -> text.

    Raises:
        ValueError: there is a secret; the message names the file, the line in it and the kind of secret.
    """
    shapes = [(what, re.compile(re.escape(secret.encode()))) for secret, what in _known(token).items()]
    shapes += [*_SHAPES.items(), *(("a path of this machine", place) for place in _places(folder, base))]
    for name, content in _contents(folder, texts):
        for form in _forms(content):
            for what, shape in shapes:
                found = shape.search(form)
                if found:
                    line = form.count(b"\n", 0, found.start()) + 1
                    raise ValueError(f"{name} holds {what} in line {line}, so it was not pushed; take it out first.")


def _contents(folder: Path, texts: Mapping[str, str | None]) -> Iterator[tuple[str, bytes]]:
    yield from ((name, text.encode("utf-8", "surrogatepass")) for name, text in texts.items() if text)
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix != ".png":
            yield file.relative_to(folder).as_posix(), file.read_bytes()


def _known(token: str | None) -> dict[str, str]:
    """Return secret -> description: tokens for the Hub, and environment variables with the name of a secret."""
    held = {value: f"the value of {name}" for name, value in os.environ.items() if _PRIVATE.search(name)}
    tokens = [token, get_token(), *get_stored_tokens().values()]
    held |= {secret: "the token" for secret in tokens if secret}
    return {secret: what for secret, what in held.items() if len(secret) >= _SHORTEST}


def _forms(content: bytes) -> Iterator[bytes]:
    """Yield a text as it is, without Markdown's escapes, and with JSON's escapes decoded once for each level."""
    yield content
    yield content.replace(b"\\", b"")  # Markdown puts them in front of some letters
    for _ in range(_NESTED):
        content = _ESCAPED.sub(_plain, content)
        yield content


def _plain(escaped: re.Match[bytes]) -> bytes:
    if escaped["letters"]:
        letters: str = json.loads(b'"%b"' % escaped["letters"])
        return letters.encode("utf-8", "surrogatepass")
    return b" " if escaped["letter"] in b"nrtbf" else escaped["letter"]  # a space, so that line numbers stay


def _places(folder: Path, base: str) -> Iterator[re.Pattern[bytes]]:
    """Yield patterns of this machine's paths, which match neither inside a longer path nor after a host name."""
    own = {str(Path.cwd()): False, str(folder.parent): False, str(Path.home()): True, base: True}
    for place, by_itself in own.items():
        trimmed = place.rstrip("/\\")
        if not _is_absolute(trimmed) or len(trimmed) < len("/xy"):
            continue
        # a single name at the root, such as /data, is not a secret by itself
        by_itself = by_itself or len(re.split(r"[/\\]", trimmed)) > 2
        end = r"(?![\w-]|\.\w)" if by_itself else r"[/\\]"
        yield re.compile(rb"(?<![\w.-])" + re.escape(trimmed.encode("utf-8", "surrogateescape")) + end.encode())


def _is_absolute(place: str) -> bool:
    return os.path.isabs(place) or PureWindowsPath(place).is_absolute()
