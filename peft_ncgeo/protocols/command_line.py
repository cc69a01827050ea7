"""Command-line arguments that all protocols share."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoModel, AutoProcessor

from ..data import DatasetSource, load_demo
from ..training import Recipe


def protocol_parser(description: str, output_dir: str, recipes: Sequence[Path]) -> argparse.ArgumentParser:
    """Return a parser with the arguments that every protocol takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="folder of cached runs and tables")
    parser.add_argument(
        "--recipes", type=Path, nargs="+", default=list(recipes), help="YAML files; each recipe is a row of the table"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="each recipe has a run from each seed")
    parser.add_argument("--model_name_or_path", help="a dual encoder, such as CLIP or SigLIP; default: the demo's")
    parser.add_argument("--data_dir", type=Path, help="local copy of the data set: train/<class>/, test/<class>/")
    parser.add_argument(
        "--num_train_epochs", type=float, help="replaces every recipe's epochs or steps, for short trials"
    )
    return parser


def read_source(parser: argparse.ArgumentParser, args: argparse.Namespace, path: Path) -> DatasetSource:
    """Return the data set of a YAML file; stop if the command line names no model, since the demo's does not fit."""
    if args.model_name_or_path is None:
        parser.error(
            f"{path} needs --model_name_or_path, and --recipes for that model: the defaults fit the demo alone."
        )
    return DatasetSource.read(path)


def read_recipes(args: argparse.Namespace, template: str | None = None) -> list[Recipe]:
    """Return the zero-shot recipe, with the data set's own `template`, and the recipes of the command line."""
    # as in the papers, which use a data set's own template only for untuned CLIP
    return [Recipe("zero-shot", args={"template": template} if template else {}), *map(Recipe.read, args.recipes)]


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Return the training arguments given on the command line."""
    return {} if args.num_train_epochs is None else {"num_train_epochs": args.num_train_epochs}


def model_and_processor(args: argparse.Namespace) -> tuple[Callable[[], nn.Module], Any]:
    """Return a function that makes a new model, and the processor; turn off what Transformers prints at each load."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*all of them get prompts")  # the demo's towers have 3 and 4 layers
    warnings.filterwarnings("ignore", message=".*passed 100: the budget")  # normal at the start
    if args.model_name_or_path is None:
        return (lambda: load_demo().model), load_demo().processor
    name = args.model_name_or_path
    return (lambda: AutoModel.from_pretrained(name)), AutoProcessor.from_pretrained(name)
