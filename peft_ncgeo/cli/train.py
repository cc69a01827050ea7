"""`peft-ncgeo train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import run
from .options import Data, Model, ValidationShare


def train(
    ctx: typer.Context,
    data: Data = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Name that `peft-ncgeo recipes` lists, or a YAML file. Default: 'budget'; 'demo/budget' for the "
            "built-in model; 'images/lora' with --head, or for a model that reads no text.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder for adapter, processor, card and checkpoints.")
    ] = Path("outputs/train"),
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots", min=1, help="Number of training images of each class. Default: all; 16 of the built-in demo."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed for the choice of images and for training.")] = 42,
    num_train_epochs: Annotated[
        float | None, typer.Option("--num_train_epochs", help="Default: the recipe's.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning_rate", help="Default: the recipe's.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch_size", help="Images per step, over all processes. Default: the recipe's.", show_default=False
        ),
    ] = None,
    validation_share: ValidationShare = 0.1,
    head: Annotated[
        str | None,
        typer.Option(
            "--head",
            help="'linear' or 'cosine': train an image classifier with a new head. Default: class names are read as "
            "texts; cosine for a model that reads none.",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            help="Start of the head: 'texts', 'means' or 'random'. Default: texts; means for a model that reads none.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
) -> None:
    """Tune a model on all classes of a set of images.

    The command prints the accuracy before (zero-shot) and after, and saves the adapter with its card and processor.

    Any of Transformers' and this package's training arguments can follow by name, as in `--max_steps 100
    --eval_strategy epoch --bf16 True`; docs/cli.md has examples. On several processes:
    `accelerate launch -m peft_ncgeo.cli train ...`.
    """
    options = {
        "recipe": recipe,
        "model": model,
        "output_dir": output_dir,
        "shots": shots,
        "seed": seed,
        "num_train_epochs": num_train_epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "validation_share": validation_share,
        "head": head,
        "init": init,
    }
    run.train(run.words(data, options, ctx.args), resume)
