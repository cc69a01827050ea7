"""`peft-ncgeo predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import run
from .options import Adapter, BaseModel, BatchSize, ClassNames, NumTestViews, NumWorkers


def predict(
    adapter: Adapter,
    images: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Folder that is searched for image files, also in its subfolders.")
    ],
    output: Annotated[Path, typer.Option("--output", help="CSV file to write.")] = Path("predictions.csv"),
    class_names: ClassNames = None,
    top_k: Annotated[
        int, typer.Option("--top_k", min=1, help="Number of names for each image, the most probable first.")
    ] = 1,
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = 0,
    num_test_views: NumTestViews = 1,
    base_model: BaseModel = None,
) -> None:
    """Write the class of every image of a folder into a CSV file.

    A file that cannot be read gets a row with the reason in the column `error`.
    """
    run.predict(adapter, base_model, images, output, class_names, top_k, batch_size, num_workers, num_test_views)
