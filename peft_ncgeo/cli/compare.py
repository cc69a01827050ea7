"""`peft-ncgeo compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import run
from .options import Data, Model, ValidationShare


def compare(
    ctx: typer.Context,
    data: Data = None,
    recipes: Annotated[
        str | None,
        typer.Option(
            "--recipes",
            help="Names or YAML files with commas between them. Default: prompt_ot,budget,lora_budget; for the "
            "built-in model, those of the demo.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    all_classes: Annotated[
        bool,
        typer.Option(
            "--all_classes",
            help="Train and test on all names. Without it, train on half of them; the other half is new at test time.",
        ),
    ] = False,
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots",
            min=1,
            help="Training images of each class. Default: 16; all with --all_classes and images of your own.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", help="Seeds with commas between them; each recipe is trained once for each seed.")
    ] = "1,2,3",
    output_dir: Annotated[
        Path, typer.Option("--output_dir", help="Folder for results and tables; a stopped comparison goes on from it.")
    ] = Path("outputs/compare"),
    validation_share: ValidationShare = 0.1,
) -> None:
    """Compare recipes and zero-shot on one set of images, in a table.

    With --all_classes, the table has accuracy, balanced accuracy, and the accuracy of classes with many, medium and
    few images. Without it, the table compares base and new classes: recipes train on the first half of the names, and
    the other half is new at test time.

    Training arguments that follow by name, as in `--num_train_epochs 5`, hold for every recipe. Images without a part
    `test` are tested on their part `validation`, or on images held out of `train`.
    """
    options = {
        "recipes": recipes,
        "model": model,
        "all_classes": all_classes,
        "shots": shots,
        "seeds": seeds,
        "output_dir": output_dir,
        "validation_share": validation_share,
    }
    run.compare(run.words(data, options, ctx.args))
