"""Recipes: training settings in a YAML file, which the command line overrides.

```yaml
peft: {NPTConfig.prompt_ot: {text_depth: 9}}       # a config or one of its presets; PEFT's own (LoraConfig) too
losses: [{OTPreservation: {budget: 0.05}}]
classification_loss: {CrossEntropy: {}}            # the default; null leaves it out
callbacks: [{PromptAveraging: {mean: 15, std: 1}}]
head: {TipAdapter: {train_keys: true}}             # from `peft_ncgeo.few_shot`; default: no head
args: {num_train_epochs: 40, learning_rate: 0.005} # defaults of the script's arguments
```

`peft-ncgeo train` and comparisons (the protocols and `peft-ncgeo compare`) fit a head. They fit it after training, as
[`~peft_ncgeo.adapt`] does, on cached features of the training images; without peft, these are features of the frozen
model.

In a recipe of several stages, each stage has these keys, except head. Beside `stages` the recipe may have `head`, and
`args` for all stages:

```yaml
stages:
  - peft: {LNTuningConfig: {target_modules: [layer_norm1, layer_norm2]}}  # only in the first stage
    args: {max_steps: 2880}
  - rows: texts                                    # train a row of weights for each class; it starts at its text
    fraction: 0.5                                  # place between text (0) and trained row (1, the default)
    args: {max_steps: 1920}
args: {learning_rate: 2e-4}
```
"""

from __future__ import annotations

import inspect
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from torch import nn
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

from .. import losses as loss_names
from ..classifiers.heads import HEADS, FeatureHead
from ..files import read_yaml
from ..loading.patterns import check_patterns
from ..losses import CrossEntropy, MultiLabelLoss, Regularizer
from ..tuners.copa import CoPAConfig
from ..validation import check_float, one_line, short_repr
from .callbacks.alignment import GradientProjection, SlerpAlignment
from .callbacks.averaging import PromptAveraging
from .callbacks.monitor import GeometryMonitor
from .recipe_files import find_recipe

_COMPARED = 80  # characters of an unknown name; the time of a comparison grows with their square
_LISTED = 12  # an error lists so many known names at most, if none is similar
_KEYS = ("peft", "losses", "classification_loss", "callbacks", "args", "head", "stages")
_OF_STAGE = ("peft", "rows", "fraction", "losses", "classification_loss", "callbacks", "args")
_ALL_LOSSES = {name: getattr(loss_names, name) for name in loss_names.__all__}
_LOSSES = {n: c for n, c in _ALL_LOSSES.items() if issubclass(c, Regularizer) and c is not Regularizer}
_CLASSIFICATION = {n: c for n, c in _ALL_LOSSES.items() if issubclass(c, CrossEntropy | MultiLabelLoss)}
_CALLBACKS = {c.__name__: c for c in (GeometryMonitor, GradientProjection, PromptAveraging, SlerpAlignment)}


@dataclass
class Recipe:
    """Training setting, such as one read from a file; `config()`, `losses()` etc. make new objects at each call.

    Attributes:
        name: the file's stem.
        config: makes the PEFT config; None if the recipe has none.
        losses: makes the list of terms.
        classification_loss: makes the classification term; None if the recipe has none.
        callbacks: makes the list of callbacks.
        head: makes the head that is fitted after training; None if the recipe has none.
        args: defaults of the script's arguments.
        rows: "texts" for a stage that trains a row of weights for each class; "" for any other.
        fraction: position of these rows between the texts (0) and the trained rows (1), after the stage.
        stages: the recipe's stages, or none; see [`~peft_ncgeo.training.train_stages`].
        source: the content that was read; recipes with the same source are equal.
    """

    name: str
    config: Callable[[], PeftConfig] | None = None
    losses: Callable[[], list[Regularizer]] = list
    classification_loss: Callable[[], nn.Module | None] = CrossEntropy
    callbacks: Callable[[], list[TrainerCallback]] = list
    head: Callable[[], FeatureHead] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    rows: str = ""
    fraction: float = 1.0
    stages: list[Recipe] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Read a recipe and check every name in it.

        Args:
            path: a YAML file, or the name of one of the package's recipes, such as "lora_budget" or "demo/budget".

        Raises:
            ValueError: one line that names the file, the unknown key or name, and the nearest known one.
        """
        path = find_recipe(path)
        content = read_yaml(path, "Recipe")
        return cls.from_dict(Path(path).stem, {} if content is None else content, str(path))

    @classmethod
    def from_dict(cls, name: str, content: dict[str, Any], path: str | None = None) -> Recipe:
        """Make a recipe from a file's content; see [`Recipe.read`] for the errors, which name `path` or `name`."""
        path = path or name
        if not isinstance(content, dict):
            raise ValueError(
                f"Recipe {path} must hold the keys {', '.join(_KEYS)}, or some of them; got {short_repr(content)}."
            )
        try:
            recipe = cls._parse(name, content, _KEYS)
            if "stages" in content:
                recipe.stages = _stages(name, content)
        except Exception as error:  # PEFT's configs raise many types
            raise ValueError(f"Recipe {path}: {one_line(error)}") from error
        return recipe

    @classmethod
    def _parse(cls, name: str, content: dict[str, Any], keys: Sequence[str]) -> Recipe:
        _known(content, keys, "key")
        recipe = cls(name=name, args=dict(_mapping(content.get("args"), "args")), source=content)
        recipe.rows, recipe.fraction = content.get("rows", ""), content.get("fraction", 1.0)
        if content.get("peft"):
            recipe.config = _maker(content["peft"], _configs())
        terms = [_maker(term, _LOSSES) for term in _list(content, "losses")]
        recipe.losses = lambda: [make() for make in terms]
        if "classification_loss" in content:
            term = content["classification_loss"]
            recipe.classification_loss = (lambda: None) if term is None else _maker(term, _CLASSIFICATION)
        callbacks = [_maker(callback, _CALLBACKS) for callback in _list(content, "callbacks")]
        recipe.callbacks = lambda: [make() for make in callbacks]
        if content.get("head"):
            recipe.head = _maker(content["head"], HEADS)
            trained = [key for key in ("losses", "classification_loss", "callbacks") if content.get(key)]
            if trained and not content.get("peft"):
                raise ValueError(
                    f"{trained[0]} without peft trains nothing, and the head does not use it; leave it out."
                )
        for make in (recipe.config, recipe.losses, recipe.classification_loss, recipe.callbacks, recipe.head):
            _ = make and make()  # constructors check the values now
        if recipe.config:
            check_patterns(vars(recipe.config()))
        return recipe

    def set_defaults(self, parser: HfArgumentParser) -> None:
        """Make `args` the parser's defaults, so that the command line still overrides them."""
        self.check_args(action.dest for action in parser._actions if action.dest != "help")
        for action in parser._actions:
            if action.type is not None and self.args.get(action.dest) is not None:
                self._check_value(action.dest, self.args[action.dest], action.type)
        parser.set_defaults(**self.args)

    def _check_value(self, name: str, value: Any, read: Any) -> None:
        """Raise for a default that the parser would accept unchecked, such as 2.5 for a whole number."""
        for word in value if isinstance(value, list) else [value]:
            try:
                if not isinstance(word, dict):
                    read(str(word))
            except (TypeError, ValueError, ArgumentTypeError) as error:
                kind = getattr(read, "__name__", "of its kind").replace("string_to_bool", "bool")
                raise ValueError(
                    f"Recipe {self.name}: argument {name}={short_repr(word)} is not a valid {kind}."
                ) from error

    def refuse_head(self, instead: str) -> None:
        """Raise if the recipe has a head.

        Args:
            instead: what to do instead, for the end of the error message.
        """
        if self.head is not None:
            name = type(self.head()).__name__
            raise ValueError(f"Recipe {self.name} has the head {name}, which is not fitted here; {instead}.")

    def check_args(self, known: Iterable[str]) -> None:
        """Raise for an argument of the recipe or a stage that is not in `known`; the error names the nearest one."""
        known = list(known)
        for part in (self, *self.stages):
            try:
                _known(part.args, known, "argument")
            except ValueError as error:
                raise ValueError(f"Recipe {part.name}: {error}") from error


def parse_with_recipe(
    parser: HfArgumentParser,
    argv: Sequence[str] | None = None,
    default: str | Path | None = None,
    takes_head: bool = False,
) -> tuple[tuple[Any, ...], Recipe | None]:
    """Parse the command line, with defaults from the recipe named by `--recipe`, or from the `default` one.

    Args:
        parser: of the script's arguments.
        argv: words of the command line. Default: those that the script was called with.
        default: a recipe's file or name.
        takes_head: accept a recipe with a head; the caller fits it.

    Returns:
        The parser's dataclasses, and the recipe or None.

    Raises:
        ValueError: the parser does not have an argument (the error names the nearest one, and the recipe's file), the
            recipe cannot be read or has a value of a wrong type, or it has a head and `takes_head` is False.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if default is not None and not any(word.split("=")[0] == "--recipe" for word in argv):
        argv = ["--recipe", str(default), *argv]
    recipe, advice, given = None, "", named_arguments(argv)
    for i, word in enumerate(argv):
        if word.split("=")[0] == "--recipe":
            path = find_recipe(word.partition("=")[2] or "".join(argv[i + 1 : i + 2]))
            recipe = Recipe.read(path)
            for part in (recipe, *recipe.stages):
                part.args = without_steps(part.args, given)
            advice = (
                " Settings of losses, PEFT config and head cannot be set on the command line: copy the recipe's YAML "
                f"({path}) and change them there."
            )
            if not takes_head:
                recipe.refuse_head("train it with `peft-ncgeo train`, or fit the head with adapt")
            recipe.set_defaults(parser)
    *parsed, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if unknown:
        if not unknown[0].startswith("-"):
            raise ValueError(f"{short_repr(unknown[0])} is not the value of an argument; put commas between names.")
        _known([unknown[0].split("=")[0]], parser._option_string_actions, "argument", advice)
    if recipe is not None and recipe.stages:
        _override_stages(recipe, given, parsed)
    return tuple(parsed), recipe


def without_steps(args: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """Return a recipe's arguments, without its `max_steps` if the user gives epochs: Trainer would ignore these."""
    left_out = {"max_steps"} if "num_train_epochs" in given and "max_steps" not in given else set()
    return {name: value for name, value in args.items() if name not in left_out}


def named_arguments(argv: Sequence[str]) -> set[str]:
    """Return the names of the arguments on a command line, `--num-train-epochs=2` as `num_train_epochs`."""
    return {word.split("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")}


def _override_stages(recipe: Recipe, given: set[str], parsed: Iterable[Any]) -> None:
    """Give the arguments of the command line to every stage."""
    in_recipe = {name for part in (recipe, *recipe.stages) for name in part.args}
    for part in parsed:
        of_training = {f.name for f in fields(part)} if isinstance(part, TrainingArguments) else set()
        for name in given & vars(part).keys() & (in_recipe | of_training) - {"output_dir"}:
            recipe.args[name] = getattr(part, name)
            for stage in recipe.stages:
                stage.args.pop(name, None)


def _configs() -> dict[str, type[PeftConfig]]:
    """Return the configs that are now registered with PEFT, except CoPA's, since `adapt` fits CoPA.

    If two have one name, the config of PEFT or of this package is used.
    """
    found = [config for config in PEFT_TYPE_TO_CONFIG_MAPPING.values() if config is not CoPAConfig]
    found.sort(key=lambda config: config.__module__.partition(".")[0] in ("peft", __name__.partition(".")[0]))
    return {config.__name__: config for config in found}


def _stages(name: str, content: dict[str, Any]) -> list[Recipe]:
    strange = sorted(content.keys() - {"stages", "head", "args"})
    if strange:
        raise ValueError(f"{strange[0]} is given beside stages; move it into the stage that it is for.")
    stages = []
    for number, part in enumerate(_list(content, "stages"), 1):
        try:
            stage = Recipe._parse(f"{name}, stage {number}", _mapping(part, "a stage"), _OF_STAGE)
            if stage.rows not in ("", "texts"):
                raise ValueError(f"rows={short_repr(stage.rows)} must be 'texts'.")
            if (stage.config is not None) != (number == 1) or (stage.rows and number == 1):
                raise ValueError(
                    "the first stage must have a peft config and no rows; later ones must have no peft config."
                )
            if stage.rows and "losses" in part:
                raise ValueError("a stage with rows uses only classification_loss; leave losses out.")
            if "fraction" in part and not stage.rows:
                raise ValueError("fraction belongs to a stage with rows; leave it out.")
            stage.fraction = check_float("fraction", stage.fraction, "a number from 0 to 1", lambda a: 0 <= a <= 1)
        except Exception as error:
            raise ValueError(f"stage {number}: {one_line(error)}") from error
        stages.append(stage)
    if not stages:
        raise ValueError("stages must be a list of at least one stage.")
    return stages


def _list(content: dict[str, Any], key: str) -> list[Any]:
    value = content.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list; write `{key}: [{{Name: {{...}}}}]`.")
    return value


def _known(given: Iterable[str], right: Iterable[str], what: str, advice: str = "") -> None:
    words = {name.lstrip("-"): name for name in right}  # dashes would make any two options look alike
    for name in given:
        if name not in words.values():
            near = get_close_matches(str(name).lstrip("-")[:_COMPARED], words, n=1)
            few = (
                f"known are {', '.join(words.values())}." if 0 < len(words) <= _LISTED else "no known name is similar."
            )
            hint = f"did you mean {words[near[0]]!r}?" if near else few
            raise ValueError(f"unknown {what} {short_repr(name)}; {hint}{advice}")


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
