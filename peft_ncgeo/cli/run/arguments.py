"""Arguments of a training: the command's own options, the recipe's, and any training argument by name."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser

from ...training import GeometryTrainingArguments, Recipe, parse_with_recipe


def words(data: str | None, options: Mapping[str, Any], further: Sequence[str]) -> list[str]:
    """Return the command line of a command with training arguments, in one list.

    Words that the command does not know come last: one of their values may have been parsed as `data`.
    """
    own = [f"--{name}={value}" for name, value in options.items() if value is not None and value is not False]
    return [*own, *([] if data is None else [data]), *further]


def parse(
    options: type, words: Sequence[str], defaults: Mapping[str, Any], default_recipe: str | None = None
) -> tuple[Any, GeometryTrainingArguments, str | None, Recipe | None]:
    """Parse a command line; return the command's own options, training arguments, the data, and the recipe.

    Raises:
        ValueError: an argument is unknown (the message gives the nearest one), or a value is wrong.
    """
    kinds: Any = (options, GeometryTrainingArguments)
    parser = HfArgumentParser(kinds, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("data", nargs="?")
    parser.set_defaults(**defaults)
    try:
        (own, args, rest), recipe = parse_with_recipe(parser, words, default_recipe, takes_head=True)
    except ArgumentError as error:
        raise ValueError(f"{error}; `peft-ncgeo COMMAND --help` lists the options.") from None
    return own, args, rest.data, recipe
