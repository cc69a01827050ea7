"""Figures of results; needs matplotlib (`pip install peft_ncgeo[plot]`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from ..geometry.alignment import alignment, centred_means
from ..protocols import EpisodeResults, Results
from ..protocols.few_shot import SHIFTS

try:  # here and not at the first figure, which comes after the training that it shows
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Patch
    from matplotlib.text import Text
except ImportError as error:
    raise ImportError(f"Figures need matplotlib ({error}); install it with `pip install peft_ncgeo[plot]`.") from error

MARKERS = "osD^v<>PX*"
NAMED = 30  # up to so many classes have their names in a figure


def plot_relation(
    results: Results, x: str, y: str, path: str | Path, x_label: str | None = None, y_label: str | None = None
) -> dict[str, float]:
    """One point a run: metric `x` against metric `y`, coloured by method, a marker for each setting.

    Args:
        results: of a protocol; runs that lack either metric are left out.
        x, y: metrics.
        path: image file to write.
        x_label, y_label: of the axes. Default: the metrics' names.

    Returns:
        `pearson` and `spearman` correlation over the runs, `pearson_within` after each setting's mean is taken off
        both, and `runs`, their number. They stand in the title too.

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

    figure = Figure(figsize=(8, 5), layout="constrained")  # no pyplot: no window system, no global state
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
    _write(figure, path)
    return {**numbers, "runs": float(len(rows))}


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
    """A line a group: the mean of metric `y` at each `x`, in a band of one standard deviation to either side.

    Args:
        rows: one a run, as those of [`Results`]; rows that lack x or y are left out. Rows of one group and x count as
            seeds of one run: pass those of one setting.
        x, y: keys of numbers.
        path: image file to write.
        group: key of what tells the lines apart.
        x_label, y_label: of the axes. Default: the keys.
        log_x: logarithmic in x from the smallest positive one on, linear below, so that 0 has a place.

    Returns:
        For each group (n, 3): x in increasing order, mean, standard deviation (that of a sample; 0 for one run).

    Raises:
        ValueError: no row has both x and y.
    """
    runs = [(str(row[group]), row[x], row[y]) for row in rows if row.get(x) is not None and row.get(y) is not None]
    if not runs:
        raise ValueError(f"No row has both {x} and {y}.")
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
    axes.legend(handles=lines, frameon=False, fontsize=8)  # all of them, also those whose names start with "_"
    _write(figure, path)
    return drawn


def plot_gaps(results: EpisodeResults, path: str | Path, title: str | None = None) -> dict[str, np.ndarray]:
    """The gap between images and prototypes before and after adaptation, and the loss as that gap is shifted.

    On the left, for every domain, the mean gap of support sets before adaptation and after it by each method, with
    95 % intervals. On the right, the contrast loss of query images against their gap, a point for each of `SHIFTS`,
    the one as adapted (no shift) larger: means within a domain, then over domains. All of it is of the episodes that
    all methods ran. Where a domain has no such episode with a sweep, the right panel and its numbers are left out.

    Args:
        results: of [`~peft_ncgeo.protocols.few_shot`].
        path: image file to write.
        title: above the figure.

    Returns:
        What is drawn, for D domains, M methods and T shifts: `before` (D, 2) and `after` (D, M, 2), mean and half of
        the interval, which is nan for a single episode; `gaps` and `losses` (M, T).

    Raises:
        ValueError: there are no rows, none of one domain and method, or a sweep is not over `SHIFTS`.

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
    names = [f"{_short(domain)} (seen)" if domain in results.seen else _short(domain) for domain in domains]
    figure = _gap_figure(numbers, names, methods, title)
    _write(figure, path, bbox_inches="tight", pad_inches=0.1)
    return numbers


def _mean_sweeps(results: EpisodeResults) -> tuple[np.ndarray, np.ndarray] | None:
    """Gaps and losses (M, T), means over domains of those over common episodes; None if a domain has none."""
    means = []
    for domain in results.domains:
        swept: dict[str, dict[int, Any]] = {method: {} for method in results.methods}
        for row in results.rows:
            if row["domain"] == domain and row["method"] in swept and row.get("sweep_gaps") is not None:
                sweep = row["sweep_gaps"], row["sweep_losses"]
                for values in sweep:
                    if len(values) != len(SHIFTS):
                        raise ValueError(f"A sweep of {domain!r} has {len(values)} numbers for {len(SHIFTS)} shifts.")
                swept[row["method"]][row["episode"]] = sweep
        common = sorted(set.intersection(*(set(episodes) for episodes in swept.values())))
        if not common:
            return None
        means.append([np.mean([episodes[i] for i in common], axis=0) for episodes in swept.values()])
    gaps, losses = np.mean(means, axis=0).transpose(1, 0, 2)
    return gaps, losses


def _gap_figure(numbers: dict[str, np.ndarray], names: list[str], methods: list[str], title: str | None) -> Figure:
    """The figure of [`plot_gaps`]; in a group of bars the one before adaptation comes first."""
    bars = np.concatenate([numbers["before"][:, None], numbers["after"]], axis=1)  # (D, 1 + M, 2)
    groups, size = bars.shape[:2]
    both = "losses" in numbers
    left = min(max(3.0, 0.16 * groups * (size + 1) + 0.6), 14.0)
    widths = [left, 4.6] if both else [left + 1]
    figure = Figure(figsize=(sum(widths) + 0.8, 4.6), layout="constrained")
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]

    grey: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.45", "linewidth": 1.2}
    colours = _colours(len(methods))
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


def _short(name: str) -> str:
    """The name, or its beginning."""
    return name if len(name) <= 22 else f"{name[:21]}…"


def _write(figure: Figure, path: str | Path, **options: Any) -> None:
    """Write a figure with all texts as they are: in names, dollars are dollars and begin no mathematics."""
    scales = (axes.xaxis for axes in figure.axes if axes.get_xscale() != "linear")  # which write their powers with it
    powers = {text for axis in scales for text in axis.get_ticklabels(which="both")}
    for text in set(figure.findobj(Text)) - powers:
        text.set_parse_math(False)
        text.set_usetex(False)
    figure.savefig(path, dpi=110, **options)


def _colours(count: int) -> np.ndarray:
    return colormaps["tab10"](range(count)) if count <= 10 else colormaps["turbo"](np.linspace(0.03, 0.97, count))


def plot_alignment(
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    path: str | Path,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
) -> dict[str, np.ndarray]:
    """Directions of class means and classifier weights at two moments, and their cosines.

    Above, for each moment, the unit vectors of centred class means mu_c and weights w_c, projected on one plane common
    to both moments: that of the first two right singular vectors of all of them stacked, each with its largest
    coordinate positive. Where d differs between the moments, each has a plane of its own. The share of the moment's
    squared length that the plane holds is in the title, the unit circle gives the scale. Below, `cos(w_c, mu_c')`.

    Args:
        before, after: `(means, weights)`, both (K, d) with d >= 2; rows of means wholly nan are classes without
            samples. The means of a moment are centred over the classes that have samples at that moment.
        path: image file to write.
        class_names: of the K classes, shown for at most 30 classes. Default: their indices.
        title: above the figure.

    Returns:
        What is drawn, of the K' classes for which mu_c and w_c exist and are not 0 at both moments, in order:
        `means_before`, `weights_before`, `means_after`, `weights_after`, the projections (K', 2); `cosines_before`,
        `cosines_after` (K', K'), a row for each weight and a column for each mean.

    Raises:
        ValueError: shapes or the number of names differ, weights are not finite, a row of means is neither finite nor
            wholly nan, or K' < 2.
    """
    moments = {"before": before, "after": after}
    shapes = [tuple(tensor.shape) for pair in moments.values() for tensor in pair]
    alike = shapes[0] == shapes[1] and shapes[2] == shapes[3] and shapes[0][0] == shapes[2][0]
    if not alike or any(len(shape) != 2 or shape[1] < 2 for shape in shapes):
        raise ValueError(
            f"Means and weights must have one shape (K, d), d >= 2, before and one after, K the same; got {shapes}."
        )
    count = shapes[0][0]
    if class_names is not None and len(class_names) != count:
        raise ValueError(f"class_names has {len(class_names)} names for {count} classes.")
    drawn = np.ones(count, dtype=bool)
    for moment, (means, weights) in moments.items():
        if not weights.isfinite().all():
            raise ValueError(f"The weights {moment} are not finite.")
        drawn &= alignment(weights.detach(), means.detach()).isfinite().cpu().numpy()
    kept = np.flatnonzero(drawn).tolist()
    if len(kept) < 2:
        raise ValueError(f"{len(kept)} classes have a mean and a weight, not 0, at both moments; at least 2 must.")

    units = {}
    for moment, (means, weights) in moments.items():
        for part, rows in (("means", centred_means(means)), ("weights", weights)):
            vectors = rows.detach().cpu().double().numpy()[kept]
            vectors = vectors / np.abs(vectors).max(1, keepdims=True)  # squares of tiny numbers would be 0
            units[f"{part}_{moment}"] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    one_space = shapes[0] == shapes[2]
    numbers: dict[str, np.ndarray] = {}
    for moment in moments:
        stacked = [vectors for key, vectors in units.items() if one_space or key.endswith(moment)]
        plane = np.linalg.svd(np.concatenate(stacked), full_matrices=False)[2][:2]
        plane = plane * np.sign(plane[range(2), np.abs(plane).argmax(1)])[:, None]
        numbers |= {f"{part}_{moment}": units[f"{part}_{moment}"] @ plane.T for part in ("means", "weights")}
    for moment in moments:
        numbers[f"cosines_{moment}"] = (units[f"weights_{moment}"] @ units[f"means_{moment}"].T).clip(-1, 1)
    names = [str(i) if class_names is None else str(class_names[i]) for i in kept]
    _write(_alignment_figure(numbers, names, title), path, bbox_inches="tight", pad_inches=0.15)
    return numbers


def _alignment_figure(numbers: dict[str, np.ndarray], names: list[str], title: str | None) -> Figure:
    """The figure of [`plot_alignment`]; lines are those of the means, class by class, then of the weights."""
    count = len(names)
    named = count <= NAMED
    names = [_short(name) for name in names]
    colours = _colours(count)
    thin = 1.0 if count <= 10 else 0.75 if named else 0.4
    styles: dict[str, dict[str, Any]] = {
        "means": {"marker": "o", "linestyle": "-", "linewidth": 3.2 * thin, "markersize": 8 * thin, "alpha": 0.5},
        "weights": {"marker": "D", "linestyle": (0, (3, 1.5)), "linewidth": 1.6 * thin, "markersize": 5.5 * thin},
    }
    styles["weights"]["markerfacecolor"] = "white"
    size = 8 if count <= 12 else 6.5
    figure = Figure(figsize=(9, 9))  # squares fill it; labels stick out, the tight box of savefig takes them in
    squares = {"left": 0.0, "right": 1.0, "bottom": 0.0, "top": 0.93, "wspace": 0.06, "hspace": 0.12}
    panels = figure.subplots(2, 2, gridspec_kw=squares)
    for column, moment in enumerate(("before", "after")):
        axes = panels[0, column]
        axes.add_patch(Circle((0, 0), 1, fill=False, color="0.7", linewidth=0.8))
        squared = 0.0
        for part, style in styles.items():
            squared += float((numbers[f"{part}_{moment}"] ** 2).sum())
            for (x, y), colour in zip(numbers[f"{part}_{moment}"], colours, strict=True):
                axes.plot([0, x], [0, y], color=colour, markevery=[1], **style)
        axes.set(xlim=(-1.06, 1.06), ylim=(-1.06, 1.06), aspect="equal", xticks=[], yticks=[])
        axes.set_title(f"{moment}: {squared / (2 * count):.0%} of squared length in the plane", fontsize=11)

        axes, cosines = panels[1, column], numbers[f"cosines_{moment}"]
        image = axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"{moment}: mean of the diagonal {cosines.diagonal().mean():.3f}", fontsize=11)
        axes.set(xlabel="class mean", ylabel="" if column else "weight", xticks=[], yticks=[])
        if named:
            axes.set_xticks(range(count), names, rotation=90, fontsize=size)
            axes.set_yticks(range(count), [""] * count if column else names, fontsize=size)
    handles = [Line2D([], [], color="black", label=label, **styles[label]) for label in styles]
    if named:
        handles += [Line2D([], [], color=c, linewidth=4, label=n) for c, n in zip(colours, names, strict=True)]
    legend = {"bbox_to_anchor": (1.01, 1), "loc": "upper left", "borderaxespad": 0, "frameon": False}
    panels[0, 1].legend(handles=handles, fontsize=size, labelspacing=0.25, handlelength=3, **legend)
    figure.colorbar(image, cax=panels[1, 1].inset_axes([1.04, 0, 0.04, 1]), label="cosine")
    if title:
        figure.suptitle(title, y=0.985)
    return figure
