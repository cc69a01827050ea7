"""Figure of a confusion matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .canvas import NAMED, Figure, short_name, write_figure

_PAIRS = 15  # most confused pairs listed beside a matrix without names


def plot_confusion(confusion: Any, path: str | Path, title: str | None = None) -> np.ndarray:
    """Draw a confusion matrix: colours show shares of the true class, and cells show numbers of images.

    With more than 30 classes, names and numbers are left out, and the most confused pairs are listed beside the
    matrix.

    Args:
        confusion: a [`~peft_ncgeo.reports.Report`], or its `confusion`: a DataFrame (K, K), true classes as rows.
        path: image file to write.
        title: title above the figure.

    Returns:
        The drawn shares (K, K); the row of a class without images is nan.

    Raises:
        ValueError: the table is not square.
    """
    matrix: pd.DataFrame = getattr(confusion, "confusion", confusion)
    counts = matrix.to_numpy()
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not len(counts):
        raise ValueError(f"A confusion matrix must be (K, K), got {counts.shape}; pass report.confusion.")
    with np.errstate(invalid="ignore"):
        shares = counts / counts.sum(1, keepdims=True)
    names, classes = [short_name(str(name)) for name in matrix.index], len(counts)
    named = classes <= NAMED
    longest = max(map(len, names)) if named else 0
    size = min(max(3.2, 0.42 * classes), 12.0) if named else 7.0
    margin = 0.075 * longest + 0.6
    figure = Figure(figsize=(size + margin + (0.9 if named else 5.6), size + margin + 0.3), layout="constrained")
    if named:
        axes = figure.add_subplot()
    else:
        axes, beside = figure.subplots(1, 2, width_ratios=[size, 5.0])
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest" if named else "antialiased")
    figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.02, label="share of the true class")
    axes.set(xlabel="predicted class", ylabel="true class")
    if named:
        axes.set_xticks(range(classes), names, rotation=90, fontsize=8)
        axes.set_yticks(range(classes), names, fontsize=8)
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7, color=colour)
    else:
        axes.set(title=f"{classes:,} classes, in the order of their labels")
        _list_pairs(beside, counts, names)
    if title:
        figure.suptitle(title)
    write_figure(figure, path, bbox_inches="tight", pad_inches=0.1)
    return shares


def _list_pairs(axes: Any, counts: np.ndarray, names: list[str]) -> None:
    """Write the most confused pairs, with their numbers of images."""
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    pairs = [(int(k), *divmod(int(k), len(counts))) for k in order if wrong.flat[k]]
    lines = [f"{wrong.flat[k]:>5,}  {names[true]} → {names[predicted]}" for k, true, predicted in pairs]
    axes.axis("off")
    axes.set_title("Most confused: true → predicted", loc="left", fontsize=10)
    text = "\n".join(lines) or "None: every image is classified correctly."
    axes.text(0, 0.98, text, ha="left", va="top", fontsize=9, linespacing=1.7, transform=axes.transAxes)
