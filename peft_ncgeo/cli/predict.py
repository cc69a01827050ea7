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
        str, typer.Argument(metavar="FOLDER", help="Folder that is searched for image files, with all folders in it.")
    ],
    output: Annotated[Path, typer.Option("--output", help="CSV file to write.")] = Path("predictions.csv"),
    class_names: ClassNames = None,
    top_k: Annotated[int, typer.Option("--top_k", min=1, help="Names for each image, the most probable first.")] = 1,
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = 0,
    num_test_views: NumTestViews = 1,
    base_model: BaseModel = None,
) -> None:
    """Name the class of every image of a folder, in a CSV file.

    A file that cannot be read becomes a row that says so in the column `error`.
    """
    run.predict(adapter, base_model, images, output, class_names, top_k, batch_size, num_workers, num_test_views)
