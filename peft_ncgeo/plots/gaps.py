"""Figure of the gap between prototypes and images, from a table of episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..few_shot.evaluate import SHIFTS
from ..protocols import EpisodeResults
from .canvas import MARKERS, Figure, Line2D, Patch, short_name, spread_colours, write_figure


def plot_gaps(results: EpisodeResults, path: str | Path, title: str | None = None) -> dict[str, np.ndarray]:
    """Draw the gap between images and prototypes before and after adaptation, and the loss as that gap is shifted.

    The left panel shows, for every domain, the mean gap of support sets before adaptation and after adaptation by each
    method, with 95 % intervals. The right panel shows the contrastive loss of query images against their gap, with one
    point for each of `SHIFTS`; the point without a shift is larger. Means are taken within a domain, then over
    domains. Only episodes that all methods were run on count. If a domain has no such episode with a sweep, the right
    panel and its numbers are left out.

    Args:
        results: results of [`~peft_ncgeo.protocols.few_shot`].
        path: image file to write.
        title: title above the figure.

    Returns:
        The drawn numbers, for D domains, M methods and T shifts: `before` (D, 2) and `after` (D, M, 2) with the mean
        and half of the interval, which is nan for a single episode; `gaps` and `losses` (M, T).

    Raises:
        ValueError: there are no rows, a domain and method have no row, or a sweep is not over `SHIFTS`.

    Reference: H. Tian et al., Mind the Gap Between Prototypes and Images in Cross-domain Finetuning, NeurIPS 2024,
    arXiv 2410.12474.
    """
    if not results.rows:
        raise ValueError("There are no episodes to draw.")
    results = results.on_common_episodes()
    domains, methods = results.domains, results.methods
    befores = [results.mean(domain, methods[0], "gap_before") for domain in domains]
    afters = [[results.mean(d, method, "gap_after") for method in methods] for d in domains]
    numbers = {"before": np.array(befores), "after": np.array(afters)}
    sweeps = _mean_sweeps(results)
    if sweeps is not None:
        numbers["gaps"], numbers["losses"] = sweeps
    names = [f"{short_name(domain)} (seen)" if domain in results.seen else short_name(domain) for domain in domains]
    figure = _gap_figure(numbers, names, methods, title)
    write_figure(figure, path, bbox_inches="tight", pad_inches=0.1)
    return numbers


def _mean_sweeps(results: EpisodeResults) -> tuple[np.ndarray, np.ndarray] | None:
    """Return gaps and losses (M, T), averaged over common episodes, then over domains; None if a domain has none."""
    means = []
    for domain in results.domains:
        swept: dict[str, dict[int, Any]] = {method: {} for method in results.methods}
        for row in results.rows:
            if row["domain"] == domain and row["method"] in swept and row.get("sweep_gaps") is not None:
                sweep = row["sweep_gaps"], row["sweep_losses"]
                for values in sweep:
                    if len(values) != len(SHIFTS):
                        raise ValueError(
                            f"A sweep of {domain!r} has {len(values)} numbers for {len(SHIFTS)} shifts; run it again."
                        )
                swept[row["method"]][row["episode"]] = sweep
        common = sorted(set.intersection(*(set(episodes) for episodes in swept.values())))
        if not common:
            return None
        means.append([np.mean([episodes[i] for i in common], axis=0) for episodes in swept.values()])
    gaps, losses = np.mean(means, axis=0).transpose(1, 0, 2)
    return gaps, losses


def _gap_figure(numbers: dict[str, np.ndarray], names: list[str], methods: list[str], title: str | None) -> Figure:
    """Return the figure of [`plot_gaps`]; in each group of bars, the first is before adaptation."""
    bars = np.concatenate([numbers["before"][:, None], numbers["after"]], axis=1)  # (D, 1 + M, 2)
    groups, size = bars.shape[:2]
    both = "losses" in numbers
    left = min(max(3.0, 0.16 * groups * (size + 1) + 0.6), 14.0)
    widths = [left, 4.6] if both else [left + 1]
    figure = Figure(figsize=(sum(widths) + 0.8, 4.6), layout="constrained")
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]

    grey: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.45", "linewidth": 1.2}
    colours = spread_colours(len(methods))
    width, places = 1 / (size + 1), np.arange(groups)
    axes = panels[0]
    for i, style in enumerate([grey, *({"color": colour} for colour in colours)]):
        mean, half = bars[:, i].T
        error = {"elinewidth": 1, "ecolor": "0.2"}
        axes.bar(
            places + (i - (size - 1) / 2) * width, mean, 0.88 * width, yerr=half, capsize=2, error_kw=error, **style
        )
    axes.set(ylabel="gap of support images and prototypes", xlim=(-0.6, groups - 0.4))
    slanted = max(map(len, names)) * 0.085 > left / groups
    axes.set_xticks(places, names, fontsize=9, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    if slanted:
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)

    handles: list[Any] = [Patch(label="before adaptation", **grey)]
    if not both:
        handles += [Patch(color=colour, label=name) for colour, name in zip(colours, methods, strict=True)]
    else:
        axes, here = panels[1], SHIFTS.index(0.0)
        large: dict[str, Any] = {"markersize": 10, "markeredgecolor": "black", "linestyle": "none"}
        for i, (name, colour) in enumerate(zip(methods, colours, strict=True)):
            line: dict[str, Any] = {"color": colour, "marker": MARKERS[(i + i // 10) % 10]}
            gaps, losses = numbers["gaps"][i], numbers["losses"][i]
            handles += axes.plot(gaps, losses, markersize=4, label=name, **line)
            axes.plot(gaps[here], losses[here], zorder=3, **line, **large)
        handles.append(Line2D([], [], color="white", marker="o", label="as adapted, not shifted", **large))
        axes.set(xlabel="gap of query images and prototypes", ylabel="contrast loss of query images")
        axes.grid(alpha=0.3)
    lengths, room = [len(handle.get_label()) + 8 for handle in handles], 14 * figure.get_figwidth()
    fitting = (n for n in range(len(lengths), 0, -1) if sum(map(max, np.array_split(lengths, n))) <= room)
    columns = next(fitting, 1)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    if title:
        figure.suptitle(title)
    return figure
