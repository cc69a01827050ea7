"""The command-line app with all commands."""

from __future__ import annotations

import warnings
from typing import Any

import typer

from .compare import compare
from .demo import demo
from .describe import describe
from .errors import OneLineErrors
from .evaluate import evaluate
from .options import WITH_TRAINING_ARGUMENTS
from .predict import predict
from .recipes import recipes
from .train import train

app = typer.Typer(
    name="peft-ncgeo",
    cls=OneLineErrors,
    help="Tune CLIP and other image models with few parameters, and use the tuned models. `COMMAND --help` says more.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command(context_settings=WITH_TRAINING_ARGUMENTS)(train)
app.command()(predict)
app.command()(evaluate)
app.command(context_settings=WITH_TRAINING_ARGUMENTS)(compare)
app.command()(recipes)
app.command()(describe)
app.command()(demo)


def main() -> None:
    """Run the command line; print warnings as plain lines and leave out those for developers of libraries."""
    warnings.showwarning = _show
    app()


def _show(message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
    if issubclass(category, UserWarning):
        typer.echo(f"Warning: {message}", err=True)
