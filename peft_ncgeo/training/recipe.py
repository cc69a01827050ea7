"""Recipes: a training setting as a YAML file, which the command line overrides.

```yaml
peft: {NPTConfig.prompt_ot: {text_depth: 9}}       # a config or one of its presets; PEFT's own (LoraConfig) too
losses: [{OTPreservation: {budget: 0.05}}]
classification_loss: {CrossEntropy: {}}            # the default; null leaves it out
callbacks: [{PromptAveraging: {mean: 15, std: 1}}]
args: {num_train_epochs: 40, learning_rate: 0.005} # defaults of the script's arguments
```
"""

from __future__ import annotations

import inspect
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig
from torch import nn
from transformers import HfArgumentParser, TrainerCallback

from .. import losses as loss_names
from ..files import read_yaml
from ..loading.patterns import check_patterns
from ..losses import CrossEntropy, Regularizer
from ..tuners.npt import NPTConfig
from ..tuners.prototype import PrototypeConfig
from ..validation import one_line, short_repr
from .callbacks.alignment import GradientProjection, SlerpAlignment
from .callbacks.averaging import PromptAveraging
from .callbacks.monitor import GeometryMonitor

_COMPARED = 80  # characters of an unknown name; comparing names takes time with their square
_KEYS = ("peft", "losses", "classification_loss", "callbacks", "args")
_CONFIGS = {
    "NPTConfig": NPTConfig,
    "PrototypeConfig": PrototypeConfig,
    **{n: getattr(peft, n) for n in dir(peft) if n.endswith("Config")},
}
_ALL_LOSSES = {name: getattr(loss_names, name) for name in loss_names.__all__}
_LOSSES = {n: c for n, c in _ALL_LOSSES.items() if issubclass(c, Regularizer) and c is not Regularizer}
_CLASSIFICATION = {n: c for n, c in _ALL_LOSSES.items() if issubclass(c, CrossEntropy)}
_CALLBACKS = {c.__name__: c for c in (GeometryMonitor, GradientProjection, PromptAveraging, SlerpAlignment)}


@dataclass
class Recipe:
    """Setting read from a file; `config()`, `losses()` and so on make new objects at each call.

    Attributes:
        name: the file's stem.
        config: makes the PEFT config; None if the recipe has none.
        losses: makes the list of terms.
        classification_loss: makes the classification term; None if the recipe has none.
        callbacks: makes the list of callbacks.
        args: defaults of the script's arguments.
        source: the content that was read; two recipes with the same source are the same.
    """

    name: str
    config: Callable[[], PeftConfig] | None = None
    losses: Callable[[], list[Regularizer]] = list
    classification_loss: Callable[[], nn.Module | None] = CrossEntropy
    callbacks: Callable[[], list[TrainerCallback]] = list
    args: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe and check every name in it.

        Raises:
            ValueError: one line that names the file, the unknown key or name, and the nearest known one.
        """
        content = read_yaml(path, "Recipe")
        return cls.from_dict(Path(path).stem, {} if content is None else content, str(path))

    @classmethod
    def from_dict(cls, name: str, content: dict[str, Any], path: str | None = None) -> Recipe:
        """Make a recipe from a file's content; see [`Recipe.read`] for the errors, which name `path` or `name`."""
        path = path or name
        if not isinstance(content, dict):
            raise ValueError(f"Recipe {path} must hold the keys {', '.join(_KEYS)}.")
        try:
            _known(content, _KEYS, "key")
            recipe = cls(name=name, args=dict(_mapping(content.get("args"), "args")), source=content)
            if content.get("peft"):
                recipe.config = _maker(content["peft"], _CONFIGS)
            terms = [_maker(term, _LOSSES) for term in _list(content, "losses")]
            recipe.losses = lambda: [make() for make in terms]
            if "classification_loss" in content:
                term = content["classification_loss"]
                recipe.classification_loss = (lambda: None) if term is None else _maker(term, _CLASSIFICATION)
            callbacks = [_maker(callback, _CALLBACKS) for callback in _list(content, "callbacks")]
            recipe.callbacks = lambda: [make() for make in callbacks]
            for make in (recipe.config, recipe.losses, recipe.classification_loss, recipe.callbacks):
                _ = make and make()  # constructors check the values now
            if recipe.config:
                check_patterns(vars(recipe.config()))
        except Exception as error:  # PEFT's configs raise many types
            raise ValueError(f"Recipe {path}: {one_line(error)}") from error
        return recipe

    def set_defaults(self, parser: HfArgumentParser) -> None:
        """Make `args` the parser's defaults, so that the command line still overrides them."""
        self.check_args(action.dest for action in parser._actions if action.dest != "help")
        for action in parser._actions:
            if action.type is not None and self.args.get(action.dest) is not None:
                self._check_value(action.dest, self.args[action.dest], action.type)
        parser.set_defaults(**self.args)

    def _check_value(self, name: str, value: Any, read: Any) -> None:
        """Raise for a value that the parser would take without a check, such as 2.5 for a whole number."""
        for word in value if isinstance(value, list) else [value]:
            try:
                if not isinstance(word, dict):
                    read(str(word))
            except (TypeError, ValueError, ArgumentTypeError) as error:
                kind = getattr(read, "__name__", "of its kind").replace("string_to_bool", "bool")
                raise ValueError(
                    f"Recipe {self.name}: argument {name}={short_repr(word)} is not a valid {kind}."
                ) from error

    def check_args(self, known: Iterable[str]) -> None:
        """Raise for arguments that are not among those `known`, naming the nearest."""
        try:
            _known(self.args, known, "argument")
        except ValueError as error:
            raise ValueError(f"Recipe {self.name}: {error}") from error


def parse_with_recipe(
    parser: HfArgumentParser, argv: Sequence[str] | None = None, default: str | Path | None = None
) -> tuple[tuple[Any, ...], Recipe | None]:
    """Parse the command line, with defaults from the recipe named by `--recipe`, or from the `default` one.

    Returns:
        The parser's dataclasses, and the recipe or None.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if default is not None and not any(word.split("=")[0] == "--recipe" for word in argv):
        argv = ["--recipe", str(default), *argv]
    recipe = None
    for i, word in enumerate(argv):
        if word.split("=")[0] == "--recipe":
            recipe = Recipe.read(word.partition("=")[2] or "".join(argv[i + 1 : i + 2]))
            recipe.set_defaults(parser)
    return parser.parse_args_into_dataclasses(args=argv), recipe


def _list(content: dict[str, Any], key: str) -> list[Any]:
    value = content.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list; write `{key}: [{{Name: {{...}}}}]`.")
    return value


def _known(given: Iterable[str], right: Iterable[str], what: str) -> None:
    right = list(right)
    for name in given:
        if name not in right:
            near = get_close_matches(str(name)[:_COMPARED], right, n=1, cutoff=0)
            hint = f"did you mean {near[0]!r}?" if near else "there is no name like it."
            raise ValueError(f"unknown {what} {short_repr(name)}; {hint}")


def _mapping(value: Any, what: str) -> dict[Any, Any]:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{what} must be a mapping such as {{name: value}}, got {short_repr(value)}.")
    return value or {}


def _maker(entry: Any, names: dict[str, Any]) -> Callable[[], Any]:
    """Return a function without arguments that makes `{Name: {field: value}}`, or `Name` alone."""
    entry = {entry: {}} if isinstance(entry, str) else entry
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError(
            f"{short_repr(entry)} must be one name with its fields, such as {{{next(iter(names))}: {{}}}}."
        )
    (name, fields), *_ = entry.items()
    fields = _mapping(fields, f"the fields of {name}")
    owner, _, preset = str(name).partition(".")
    _known([owner], names, "name")
    target = names[owner]
    if preset:
        presets = [n for n, member in vars(target).items() if isinstance(member, classmethod) and n[0] != "_"]
        _known([preset], presets, f"preset of {owner}")
    _known(fields, [p for p in inspect.signature(target).parameters if p != "self"], f"field of {owner}")
    make = getattr(target, preset) if preset else target
    return lambda: make(**fields)
