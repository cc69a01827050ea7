"""Figure of class means and classifier before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..geometry.alignment import alignment, centred_means
from .canvas import NAMED, Circle, Figure, Line2D, short_name, spread_colours, write_figure


def plot_alignment(
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    path: str | Path,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
) -> dict[str, np.ndarray]:
    """Draw the directions of class means and classifier weights at two moments, and their cosines.

    The upper row shows, for each moment, the unit vectors of centred class means mu_c and weights w_c, projected on
    one plane for both moments: the plane of the first two right singular vectors of all these vectors, each with its
    largest coordinate positive. If d differs between the moments, each has a plane of its own. The title gives the
    share of the vectors' squared length that lies in the plane; the unit circle shows the scale. The lower row shows
    `cos(w_c, mu_c')`.

    Args:
        before, after: `(means, weights)`, both (K, d) with d >= 2; a row of means that is all nan is a class without
            samples. The means of a moment are centred over the classes that have samples at that moment.
        path: image file to write.
        class_names: names of the K classes, shown for at most 30 classes. Default: their indices.
        title: title above the figure.

    Returns:
        The drawn numbers for the K' classes for which mu_c and w_c exist and are not 0 at both moments, in order: the
        projections `means_before`, `weights_before`, `means_after` and `weights_after` (K', 2); and `cosines_before`
        and `cosines_after` (K', K'), with a row for each weight and a column for each mean.

    Raises:
        ValueError: shapes or the number of names differ, weights are not finite, a row of means is neither finite nor
            all nan, or K' < 2.
    """
    moments = {"before": before, "after": after}
    shapes = [tuple(tensor.shape) for pair in moments.values() for tensor in pair]
    alike = shapes[0] == shapes[1] and shapes[2] == shapes[3] and shapes[0][0] == shapes[2][0]
    if not alike or any(len(shape) != 2 or shape[1] < 2 for shape in shapes):
        raise ValueError(
            f"Means and weights must have one shape (K, d), d >= 2, before and one after, with the same K; "
            f"got {shapes}."
        )
    count = shapes[0][0]
    if class_names is not None and len(class_names) != count:
        raise ValueError(f"class_names has {len(class_names)} names for {count} classes; pass one for each.")
    drawn = np.ones(count, dtype=bool)
    for moment, (means, weights) in moments.items():
        if not weights.isfinite().all():
            raise ValueError(f"The weights {moment} are not finite; pass finite numbers.")
        drawn &= alignment(weights.detach(), means.detach()).isfinite().cpu().numpy()
    kept = np.flatnonzero(drawn).tolist()
    if len(kept) < 2:
        raise ValueError(
            f"{len(kept)} classes have a mean and a weight other than 0 at both moments; at least 2 are needed."
        )

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
    write_figure(_alignment_figure(numbers, names, title), path, bbox_inches="tight", pad_inches=0.15)
    return numbers


def _alignment_figure(numbers: dict[str, np.ndarray], names: list[str], title: str | None) -> Figure:
    """Return the figure of [`plot_alignment`]; its lines are the means, class by class, then the weights."""
    count = len(names)
    named = count <= NAMED
    names = [short_name(name) for name in names]
    colours = spread_colours(count)
    thin = 1.0 if count <= 10 else 0.75 if named else 0.4
    styles: dict[str, dict[str, Any]] = {
        "means": {"marker": "o", "linestyle": "-", "linewidth": 3.2 * thin, "markersize": 8 * thin, "alpha": 0.5},
        "weights": {"marker": "D", "linestyle": (0, (3, 1.5)), "linewidth": 1.6 * thin, "markersize": 5.5 * thin},
    }
    styles["weights"]["markerfacecolor"] = "white"
    size = 8 if count <= 12 else 6.5
    figure = Figure(figsize=(9, 9))  # square panels fill it; savefig's tight box includes the labels outside
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
