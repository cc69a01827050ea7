"""Comparison of recipes on one set of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import typer
from datasets import Dataset

from ...data import load_demo, split_validation
from ...protocols import Results, all_classes, base_to_new
from ...protocols.cached_runs import is_main_process
from ...training import GeometryTrainingArguments, Recipe
from ...training.recipe import named_arguments
from .arguments import parse
from .models import DEMO, load_model
from .parts import load_parts
from .training import quiet

_RECIPES = ("prompt_ot", "budget", "lora_budget")


@dataclass
class CompareOptions:
    """Options of the command."""

    recipes: str | None = None
    model: str | None = None
    all_classes: bool = False
    shots: int | None = None
    seeds: str = "1,2,3"
    batch_size: int | None = None
    validation_share: float = 0.1


def compare(words: Sequence[str]) -> None:
    """Train every recipe with every seed, and print the table."""
    options, args, data, _ = parse(CompareOptions, words, {})
    if data is not None and options.model is None:
        raise ValueError(
            "Images of your own need --model, such as --model openai/clip-vit-base-patch16; --model demo takes the "
            "built-in mini-CLIP."
        )
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {options.seeds} must be whole numbers with commas between them.") from None
    name = options.model or DEMO
    default = (f"demo/{recipe}" if name == DEMO else recipe for recipe in _RECIPES)
    named = options.recipes.split(",") if options.recipes else default
    recipes = [Recipe("zero-shot"), *(Recipe.read(recipe.strip()) for recipe in named)]
    quiet()
    train, test = _demo(options) if data is None else _own(data, options, args)
    shots = options.shots or (None if options.all_classes else 16)
    tails: Mapping[str, Mapping[str, Any]] = {"all images": {}}
    if shots is not None:
        tails = {f"{shots} shots": {"tau": 1.0, "n_max": shots}}
    protocol: Callable[..., Results] = all_classes if options.all_classes else base_to_new
    results = protocol(
        recipes,
        train,
        test,
        lambda: load_model(name)[0],
        load_model(name)[1],
        str(args.output_dir),
        tails=tails,
        seeds=seeds,
        args=_given(words, args, options),
        label_column=args.label_column,
    )
    if is_main_process():
        typer.echo(f"{results.markdown()}\n\n{results.note}\n\nTables are in {args.output_dir}.")


def _demo(options: CompareOptions) -> tuple[Callable[[int, int], Dataset], Any]:
    splits = load_demo().splits
    test: Any = {"base": splits["base"], "new": splits["new"], "kept": splits["fashion_mnist"]}
    return _demo_shots, splits["base"] if options.all_classes else test


def _demo_shots(seed: int, n_max: int) -> Dataset:
    return load_demo(shots=n_max, seed=seed).splits["train"]


def _own(data: str, options: CompareOptions, args: GeometryTrainingArguments) -> tuple[Dataset, Dataset]:
    parts = load_parts(data, args)
    if not {"test", "validation"} & set(parts):
        parts = split_validation(parts, options.validation_share, label_column=args.label_column)
    return parts["train"], parts["test" if "test" in parts else "validation"]


def _given(words: Sequence[str], args: GeometryTrainingArguments, options: CompareOptions) -> dict[str, Any]:
    """Return the training arguments that the command line sets."""
    named = named_arguments(words)
    if "seed" in named:
        raise ValueError("--seed is for a single training; set the seeds of the table with --seeds 1,2,3.")
    known = {field.name for field in fields(GeometryTrainingArguments) if field.init} - {"output_dir"}
    given = {name: getattr(args, name) for name in sorted(named & known)}
    return given if options.batch_size is None else {**given, "batch_size": options.batch_size}
