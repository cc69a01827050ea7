"""`peft-ncgeo evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import run
from .options import Adapter, BaseModel, BatchSize, Images, NumTestViews


def evaluate(
    adapter: Adapter,
    images: Images,
    split: Annotated[str, typer.Option("--split", help="Part of the images, if they have parts.")] = "test",
    class_names: Annotated[
        str | None,
        typer.Option(
            "--class_names",
            help="Names of the classes, in the order of their labels, with commas between them, or a file with a "
            "name on each line. The names in the data may be in any order. Default: the names in the data.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for the report's tables and figures.", show_default=False)
    ] = None,
    batch_size: BatchSize = 64,
    num_test_views: NumTestViews = 1,
    label_column: Annotated[str, typer.Option("--label_column", help="Column of the labels.")] = "label",
    base_model: BaseModel = None,
) -> None:
    """Report how well an adapter classifies labelled images.

    The report has accuracy, precision, recall and F1 of each class, confusions and calibration.
    """
    run.evaluate(adapter, base_model, images, split, class_names, output, batch_size, num_test_views, label_column)
