"""Figure of a metric over the settings of a protocol, a line for each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.isotonic import isotonic_regression

from ..protocols import Results
from ..validation import short_repr
from .canvas import MARKERS, Figure, spread_colours, write_figure


def plot_settings(
    results: Results,
    column: str,
    path: str | Path,
    settings: Sequence[Sequence[str]],
    highlighted: Sequence[str] = (),
    y_label: str | None = None,
    name_others: bool = True,
) -> dict[str, np.ndarray]:
    """Draw the mean of a metric in each setting, one line for each method, with names at the right end.

    Args:
        results: results of a protocol; methods without the metric are left out.
        column: name of the metric.
        path: image file to write.
        settings: names of settings from left to right, in groups; no line joins two groups.
        highlighted: methods drawn in colour, the first in a band of one standard deviation; all others are grey.
        y_label: label of the axis. Default: the metric's name.
        name_others: write the names of the grey lines too; if not, only how many there are. More than about 25 names
            do not fit.

    Returns:
        For each method (n, 2): mean and standard deviation in each setting, NaN where it has no run.

    Raises:
        ValueError: settings are not in groups, no run has a finite value of the metric in one of them, or a method to
            highlight has no value of it.
    """
    if isinstance(settings, str) or any(isinstance(group, str) for group in settings) or not any(settings):
        raise ValueError(f"settings={short_repr(settings)} must be lists of names; write [['first', 'second']].")
    names = [setting for group in settings for setting in group]
    drawn = {}
    for method in dict.fromkeys(row["method"] for row in results.rows):
        has = [bool(results.values(setting, method, column)) for setting in names]
        found = zip(names, has, strict=True)
        values = np.array([results.summary(s, method, column) if h else (np.nan,) * 2 for s, h in found])
        if np.isfinite(values[:, :1]).any():
            drawn[method] = values
    for i, name in enumerate(names):
        if not any(np.isfinite(values[i, 0]) for values in drawn.values()):
            raise ValueError(f"No run has {column} as a finite number in {name!r}; results hold {results.settings}.")
    if missing := set(highlighted) - set(drawn):
        raise ValueError(
            f"{min(missing)!r} is to be highlighted but has no {column}; methods with it are {list(drawn)}."
        )

    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.add_subplot(ylabel=y_label or column)
    ends = np.cumsum([len(group) for group in settings])
    colours = dict(zip(highlighted, spread_colours(len(highlighted)), strict=True))
    for i, (method, values) in enumerate(drawn.items()):
        shown = method in colours
        style = {"color": colours.get(method, "0.75"), "zorder": 3 if shown else 2, "linewidth": 2 if shown else 1}
        for end, group in zip(ends, settings, strict=True):
            places = np.arange(end - len(group), end)
            mean, deviation = values[places].T
            axes.plot(places, mean, marker=MARKERS[i % 10] if shown else ".", markersize=5, **style)
            if method in highlighted[:1]:
                axes.fill_between(places, mean - deviation, mean + deviation, color=colours[method], alpha=0.15, lw=0)
    axes.set_xticks(range(len(names)), names)
    axes.grid(alpha=0.3)
    axes.set_xlim(-0.3, len(names) - 0.7)
    last = {
        method: values[np.isfinite(values[:, 0])][-1, 0]
        for method, values in drawn.items()
        if name_others or method in colours
    }
    if others := len(drawn) - len(last):
        axes.set_title(f"grey: {others} other methods", loc="right", fontsize=8, color="0.45")
    low, high = axes.get_ylim()
    for method, place in zip(last, _apart(list(last.values()), 0.034 * (high - low)), strict=True):
        axes.annotate(
            method,
            (1.01, (place - low) / (high - low)),
            xycoords="axes fraction",
            va="center",
            fontsize=8,
            color=colours.get(method, "0.45"),
            weight="bold" if method in colours else "normal",
        )
    write_figure(figure, path, bbox_inches="tight")  # the layout leaves names at the right too little space
    return drawn


def _apart(places: Sequence[float], least: float) -> np.ndarray:
    """Return the nearest places (least squares) in the same order, with at least this distance between them."""
    order = np.argsort(places, kind="stable")
    ranks = np.arange(len(places)) * least
    moved = np.empty(len(places))
    moved[order] = isotonic_regression(np.asarray(places)[order] - ranks) + ranks
    return moved
