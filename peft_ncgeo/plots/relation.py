"""Figure of two metrics of a protocol's runs against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.stats import pearsonr, spearmanr

from ..protocols import Results
from .canvas import MARKERS, Figure, colormaps, write_figure


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
        `pearson` and `spearman` correlation over the runs, `pearson_within` (after subtracting each setting's mean
        from both metrics), and `runs`, the number of runs. The title shows them too.

    Raises:
        ValueError: fewer than three runs have both metrics.
    """
    rows = [row for row in results.rows if row.get(x) is not None and row.get(y) is not None]
    if len(rows) < 3:
        raise ValueError(f"{len(rows)} runs have both {x} and {y}; a relation needs at least 3.")
    values = np.array([[row[x], row[y]] for row in rows], dtype=np.float64)
    centred = values.copy()
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for setting in settings:
        members = [i for i, row in enumerate(rows) if row["setting"] == setting]
        centred[members] -= centred[members].mean(0)
    numbers = {
        "pearson": float(pearsonr(*values.T).statistic),
        "spearman": float(spearmanr(*values.T).statistic),
        "pearson_within": float(pearsonr(*centred.T).statistic),
    }

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
    return {**numbers, "runs": float(len(rows))}
