"""Two metrics of a protocol's runs against each other: correlations and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from ..protocols import Results
from .canvas import MARKERS, Figure, colormaps, write_figure


def correlations(results: Results, x: str, y: str) -> dict[str, float]:
    """Return how two metrics of a protocol's runs go together.

    Args:
        results: results of a protocol; runs without one of the metrics are left out.
        x, y: names of metrics.

    Returns:
        `pearson` and `spearman` correlation over the runs, `pearson_within` (after subtracting each setting's mean
        from both metrics), and `runs`, the number of runs.

    Raises:
        ValueError: fewer than three runs have both metrics.
    """
    rows, values = _runs(results, x, y)
    centred = values.copy()
    for setting in {row["setting"] for row in rows}:
        members = [i for i, row in enumerate(rows) if row["setting"] == setting]
        centred[members] -= centred[members].mean(0)
    return {
        "pearson": float(pearsonr(*values.T).statistic),
        "spearman": float(spearmanr(*values.T).statistic),
        "pearson_within": float(pearsonr(*centred.T).statistic),
        "runs": float(len(rows)),
    }


def _runs(results: Results, x: str, y: str) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return the rows that have both metrics, and their values (N, 2)."""
    rows = [row for row in results.rows if row.get(x) is not None and row.get(y) is not None]
    if len(rows) < 3:
        raise ValueError(f"{len(rows)} runs have both {x} and {y}; a relation needs at least 3.")
    return rows, np.array([[row[x], row[y]] for row in rows], dtype=np.float64)


def plot_relation(
    results: Results, x: str, y: str, path: str | Path, x_label: str | None = None, y_label: str | None = None
) -> dict[str, float]:
    """Draw one point for each run, metric `y` against metric `x`, with colours for methods and markers for settings.

    Args:
        results: results of a protocol; runs without one of the metrics are left out.
        x, y: names of metrics.
        path: image file to write.
        x_label, y_label: labels of the axes. Default: the metrics' names.

    Returns:
        The numbers of [`correlations`]. The title shows them too.

    Raises:
        ValueError: fewer than three runs have both metrics.
    """
    numbers, (rows, values) = correlations(results, x, y), _runs(results, x, y)
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(8, 5), layout="constrained")  # without pyplot: no window, no global state
    axes = figure.add_subplot()
    colours = dict(zip(methods, colormaps["tab20"](np.linspace(0, 1, max(2, len(methods)))), strict=False))
    for setting, marker in zip(settings, MARKERS * len(settings), strict=False):
        for method in methods:
            chosen = [v for v, r in zip(values, rows, strict=True) if (r["setting"], r["method"]) == (setting, method)]
            if chosen:
                xs, ys = np.array(chosen).T
                axes.scatter(xs, ys, color=colours[method], marker=marker, s=28, alpha=0.8)
    entries = [axes.scatter([], [], color=colours[m], marker="o", label=m) for m in methods]
    entries += [
        axes.scatter([], [], color="0.4", marker=marker, label=s)
        for s, marker in zip(settings, MARKERS * len(settings), strict=False)
    ]
    axes.legend(handles=entries, bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False, fontsize=8)
    axes.set_xlabel(x_label or x)
    axes.set_ylabel(y_label or y)
    axes.set_title(
        f"{len(rows)} runs: Pearson {numbers['pearson']:.2f}, Spearman {numbers['spearman']:.2f}, "
        f"within settings {numbers['pearson_within']:.2f}",
        fontsize=10,
    )
    write_figure(figure, path)
    return numbers
