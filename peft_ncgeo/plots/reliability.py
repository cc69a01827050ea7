"""Figure of confidence against accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .canvas import Figure, Patch, write_figure

_AGREES, _TOO_SURE, _TOO_UNSURE = "tab:blue", "tab:red", "tab:orange"


def plot_reliability(calibration: Any, path: str | Path, title: str | None = None) -> dict[str, np.ndarray]:
    """Draw a reliability diagram: accuracy against confidence in bins, and below it the share of images in each bin.

    The blue part of a bar ends at the accuracy or the mean confidence, whichever is smaller. A red part is confidence
    above the accuracy, an orange part is accuracy above the confidence. If a temperature was fitted, a second diagram
    shows the probabilities with it.

    Args:
        calibration: a [`~peft_ncgeo.reports.Report`] or its `calibration`.
        path: image file to write.
        title: title above the figure.

    Returns:
        `before`, and `after` if a temperature was fitted: (B, 3), confidence, accuracy and number of images of each
        bin.
    """
    made = getattr(calibration, "calibration", calibration)
    panels = {"before": ("as the model gives them", made.before)}
    if made.after is not None:
        panels["after"] = (f"divided by temperature {made.temperature:.3g}", made.after)
    figure = Figure(figsize=(0.6 + 4.4 * len(panels), 5.4), layout="constrained")
    axes = figure.subplots(2, len(panels), height_ratios=[3, 1], sharex=True, squeeze=False)
    drawn = {}
    for column, (moment, (words, found)) in enumerate(panels.items()):
        bins = found.bins
        drawn[moment] = bins[["confidence", "accuracy", "images"]].to_numpy(float)
        _draw(axes[0, column], bins)
        axes[0, column].set_title(f"Logits {words}: error {100 * found.error:.1f} %", fontsize=10)
        width = bins["highest"] - bins["lowest"]
        axes[1, column].bar(bins["lowest"], bins["images"] / bins["images"].sum(), width, align="edge", color="0.6")
        axes[1, column].set(xlabel="confidence", xlim=(0, 1))
    axes[0, 0].set_ylabel("accuracy and confidence")
    axes[1, 0].set_ylabel("share of images")
    labels = {"too sure: confidence above accuracy": _TOO_SURE, "not sure enough: accuracy above it": _TOO_UNSURE}
    handles = [Patch(color=colour, label=label) for label, colour in labels.items()]
    axes[0, 0].legend(handles=handles, loc="upper left", frameon=False, fontsize=8)
    if title:
        figure.suptitle(title)
    write_figure(figure, path)
    return drawn


def _draw(axes: Any, bins: Any) -> None:
    """Draw the bars of one diagram, and the diagonal of perfect calibration."""
    full = bins[bins["images"] > 0]
    at, width = full["lowest"], full["highest"] - full["lowest"]
    low = np.minimum(full["accuracy"], full["confidence"])
    gap = full["confidence"] - full["accuracy"]
    axes.bar(at, low, width, align="edge", color=_AGREES, edgecolor="white")
    for colour, part in ((_TOO_SURE, gap.clip(lower=0)), (_TOO_UNSURE, (-gap).clip(lower=0))):
        axes.bar(at, part, width, bottom=low, align="edge", color=colour, edgecolor="white")
    axes.plot([0, 1], [0, 1], color="0.3", linestyle="--", linewidth=1)
    axes.set(ylim=(0, 1), xlim=(0, 1))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
