"""Predictions for a folder of images."""

from __future__ import annotations

from pathlib import Path

import typer

from .classifiers import load_classifier, read_names


def predict(
    adapter: str,
    base_model: str | None,
    images: str,
    output: Path,
    class_names: str | None,
    top_k: int,
    batch_size: int,
    num_workers: int,
    num_test_views: int,
) -> None:
    """Write a CSV file with a row for each image, and print the number of images of each name."""
    names = read_names(class_names)
    found = load_classifier(adapter, base_model).predict_dataset(
        images, names, batch_size, num_workers, top_k, num_test_views=num_test_views
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(output, index=False)
    unread = int((found["error"].fillna("") != "").sum())
    for name, count in found["name"].value_counts().head(10).items():
        typer.echo(f"{count:8,}  {name}")
    typer.echo(f"{len(found):,} images in {output}; {unread:,} of them could not be read.")
