"""Description of a model."""

from __future__ import annotations

import typer

from ...models.description import describe as describe_model
from .models import empty_model


def describe(model: str) -> None:
    """Print towers, feature, head, and the methods that fit."""
    typer.echo(describe_model(empty_model(model)))
