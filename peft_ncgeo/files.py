"""Safe reading of files from untrusted sources, safe file names, and atomic writing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from safetensors import SafetensorError
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from .validation import one_line, short_repr

LARGEST = 2**20  # bytes of a settings file
_DEEPEST = 50  # levels of nested lists and mappings
_LONGEST_NUMBER = 100  # characters of a number
_LONGEST_NAME = 200  # bytes; file systems allow 255, and file endings are added


def read_text(path: str | Path, largest: int = LARGEST) -> str:
    """Read a UTF-8 text file of at most `largest` bytes; a byte order mark, as Windows writes it, is left out.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is larger, or is not UTF-8 text.
    """
    with Path(path).open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return content.decode("utf-8-sig")


def read_json(path: str | Path, largest: int = LARGEST) -> Any:
    """Read a JSON file; see [`read_text`] and [`parse_json`] for the errors."""
    return parse_json(read_text(path, largest))


def parse_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: the text is not JSON, is nested too deep, repeats a key, or has a number of too many digits.
    """
    try:
        content = json.loads(
            text, parse_int=_within(int), parse_float=_within(float), object_pairs_hook=_without_duplicates
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep") from None
    level: list[Any] = [[content]]
    for _ in range(_DEEPEST + 1):
        parts = (part for inner in level for part in (inner.values() if isinstance(inner, dict) else inner))
        level = [part for part in parts if isinstance(part, list | dict)]
    if level:
        raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
    return content


def read_yaml(path: str | Path, what: str) -> Any:
    """Read a YAML file. Refuse aliases: with them a small file can expand to a huge one.

    Args:
        what: the thing that the file describes, for the error message.

    Raises:
        ValueError: the file is missing, not YAML, too large or nested too deep, has an alias, repeats a key, or has a
            number of too many digits.
    """
    try:
        return yaml.load(read_text(path), _Loader)
    except Exception as error:  # PyYAML's constructors raise many kinds of errors
        raise ValueError(f"{what} {path} cannot be read: {one_line(error)}") from error


def file_name(name: Any, what: str) -> str:
    """Return a safe file or folder name: keep letters, digits and "-_.", replace all else by "_".

    Args:
        what: the thing that has the name, for the error message.

    Raises:
        ValueError: the name could leave its folder, be a hidden file, or not be written: it is empty or too long,
            starts with a dot, or holds a path separator.
    """
    size = len(name.encode("utf-8", "surrogatepass")) if isinstance(name, str) else 0
    if not 0 < size <= _LONGEST_NAME or name.startswith(".") or set("/\\\0") & set(name):
        raise ValueError(
            f"The name {short_repr(name)} of {what} cannot be a file's: it must have 1 to {_LONGEST_NAME} bytes, no "
            "/ or \\, and no dot at the start; rename it."
        )
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _within(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader of numbers that refuses a number of too many characters."""

    def number(text: str) -> Any:
        if len(text) > _LONGEST_NUMBER:
            raise ValueError(f"a number has {len(text):,} characters")
        return read(text)

    return number


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {short_repr(key)} appears twice")
        found[key] = value
    return found


class _Loader(yaml.SafeLoader):
    """YAML loader for settings files. Unlike PyYAML, it reads 5e-3 as a number, as YAML 1.2 does."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise ComposerError(None, None, "aliases and anchors are refused; write the value out", event.start_mark)
        if self._depth == _DEEPEST:
            raise ComposerError(None, None, f"it is nested more than {_DEEPEST} levels deep", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise ConstructorError(None, None, f"the key {short_repr(key.value)} appears twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _short_scalar(construct: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return PyYAML's constructor of a number with a check of the number's length."""

    def number(loader: Any, node: Any) -> Any:
        if len(node.value) > _LONGEST_NUMBER:
            raise ConstructorError(None, None, f"a number has {len(node.value):,} characters", node.start_mark)
        return construct(loader, node)

    return number


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),  # matches in linear time
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _short_scalar(yaml.SafeLoader.construct_yaml_int))
_Loader.add_constructor("tag:yaml.org,2002:float", _short_scalar(yaml.SafeLoader.construct_yaml_float))


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Turn any error in writing a folder (for example a full disk) into one `OSError` that names the folder."""
    try:
        yield
    except Exception as error:
        if not is_of_writing(error):
            raise
        raise OSError(f"{folder} could not be written: {one_line(error)}") from error


def is_of_writing(error: Exception) -> bool:
    """Return True for an error of writing a file."""
    # torch's writer raises a plain RuntimeError
    of_torch = any(part in str(error) for part in ("inline_container", "iostream error"))
    return of_torch or isinstance(error, OSError | SafetensorError)


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: write a temporary file and move it to `path`.

    If several processes write the same file, the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid4().hex}.part")  # unique to this writer
    try:
        part.write_text(text, encoding="utf-8", newline="")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
