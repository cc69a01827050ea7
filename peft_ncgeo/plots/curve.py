"""Figure of a metric against a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .canvas import MARKERS, Figure, write_figure


def plot_curve(
    rows: Sequence[Mapping[str, Any]],
    x: str,
    y: str,
    path: str | Path,
    group: str = "method",
    x_label: str | None = None,
    y_label: str | None = None,
    log_x: bool = False,
) -> dict[str, np.ndarray]:
    """Draw one line for each group: the mean of metric `y` at each `x`, with a band of one standard deviation.

    Args:
        rows: one row for each run, such as those of [`Results`]; rows without x or y are left out. Rows with the same
            group and x are treated as seeds of one run: pass the rows of one setting.
        x, y: keys of numbers in the rows.
        path: image file to write.
        group: key of the rows; each of its values has a line.
        x_label, y_label: labels of the axes. Default: the keys.
        log_x: True: the x axis is logarithmic above the smallest positive x, and linear below it, so that it can
            show 0.

    Returns:
        An array (n, 3) for each group: x in increasing order, mean, and sample standard deviation (0 for one run).

    Raises:
        ValueError: no row has both x and y.
    """
    runs = [(str(row[group]), row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    if not runs:
        raise ValueError(f"No row has both {x} and {y}; rows have {sorted({key for row in rows for key in row})}.")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label or x, ylabel=y_label or y)
    drawn, lines = {}, []
    for i, name in enumerate(dict.fromkeys(run[0] for run in runs)):
        seeds: dict[float, list[float]] = {}
        for _, place, value in sorted(run for run in runs if run[0] == name):
            seeds.setdefault(place, []).append(value)
        drawn[name] = np.array([(a, np.mean(b), np.std(b, ddof=1) if b[1:] else 0.0) for a, b in seeds.items()])
        at, mean, deviation = drawn[name].T
        lines += axes.plot(at, mean, marker=MARKERS[(i + i // 10) % 10], markersize=5, label=name)
        axes.fill_between(at, mean - deviation, mean + deviation, alpha=0.18, linewidth=0)
    if log_x:
        places = np.unique([float(run[1]) for run in runs])
        axes.set_xscale("symlog", linthresh=min(places[places > 0], default=1.0))
        if len(places) <= 12:
            axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.grid(alpha=0.3)
    axes.legend(
        handles=lines, frameon=False, fontsize=8
    )  # with handles, the legend also shows names that start with "_"
    write_figure(figure, path)
    return drawn
