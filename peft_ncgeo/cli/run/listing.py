"""List of the recipes."""

from __future__ import annotations

import typer

from ...training.recipe_files import describe_recipe, recipe_names


def recipes() -> None:
    """Print a line for each recipe: its name, and a sentence with method, paper and model."""
    names = recipe_names()
    width = max(map(len, names)) + 2
    for name in names:
        typer.echo(f"{name:{width}}{describe_recipe(name)}")
