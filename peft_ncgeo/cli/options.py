"""Options that several commands share, and their help texts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

# further words are training arguments, which `run.arguments` reads
WITH_TRAINING_ARGUMENTS: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}

Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub id of an adapter or a few-shot head.")]
Images = Annotated[str, typer.Argument(metavar="IMAGES", help="Folder of images, or Hub data set.")]
Data = Annotated[
    str | None,
    typer.Argument(
        metavar="FOLDER_OR_HUB_SET",
        help="Folder <class>/*.jpg, or train/<class>/, validation/<class>/, test/<class>/; or a data set of the Hub. "
        "Without it, the built-in demo.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Folder or Hub id, such as openai/clip-vit-base-patch16, or 'demo' for the built-in mini-CLIP. Needed "
        "with images of your own.",
        show_default=False,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base_model", help="Base model of the adapter. Default: the one that it names.", show_default=False
    ),
]
ClassNames = Annotated[
    str | None,
    typer.Option(
        "--class_names",
        help="Names with commas between them, or a file with a name on each line. Default: the classes of the "
        "training.",
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="Images in a pass.")]
NumWorkers = Annotated[int, typer.Option("--num_workers", min=0, help="Number of processes that read images.")]
NumTestViews = Annotated[
    int, typer.Option("--num_test_views", help="Number of crops of an image whose scores are averaged: 1 or 5.")
]
ValidationShare = Annotated[
    float,
    typer.Option(
        "--validation_share",
        help="Share of each class that is held out if the images have no part 'validation' (in compare: neither "
        "'validation' nor 'test').",
    ),
]
