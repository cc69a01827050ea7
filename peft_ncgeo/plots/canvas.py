"""Matplotlib, and functions that several figures use; they need `pip install peft_ncgeo[plot]`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

try:  # fails at import, not after a long training at the first figure
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Patch
    from matplotlib.text import Text
except ImportError as error:
    raise ImportError(f"Figures need matplotlib ({error}); install it with `pip install peft_ncgeo[plot]`.") from error

__all__ = ["MARKERS", "NAMED", "Circle", "Figure", "Line2D", "Patch", "Text", "colormaps"]

MARKERS = "osD^v<>PX*"


NAMED = 30  # largest number of classes whose names are shown in a figure


def short_name(name: str) -> str:
    """Return the name, or its first characters if it is long."""
    return name if len(name) <= 22 else f"{name[:21]}…"


def write_figure(figure: Figure, path: str | Path, **options: Any) -> None:
    """Write a figure with plain texts: a dollar sign in a name is a dollar sign, not the start of a formula."""
    # logarithmic axes write powers with dollars
    scales = (axes.xaxis for axes in figure.axes if axes.get_xscale() != "linear")
    powers = {text for axis in scales for text in axis.get_ticklabels(which="both")}
    for text in set(figure.findobj(Text)) - powers:
        text.set_parse_math(False)
        text.set_usetex(False)
    figure.savefig(path, dpi=110, **options)


def spread_colours(count: int) -> np.ndarray:
    return colormaps["tab10"](range(count)) if count <= 10 else colormaps["turbo"](np.linspace(0.03, 0.97, count))
