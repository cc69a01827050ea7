"""The protocol from base to new classes, balanced or with a long tail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from ..data import base_new_split, long_tailed
from ..metrics.accuracy import harmonic_mean
from ..training import Recipe
from .results import Results
from .runs import Task, check_tails, describe, run_cells

BALANCED: Mapping[str, Mapping[str, Any]] = {"16 shots": {"tau": 1.0}}


def base_to_new(
    recipes: Sequence[Recipe],
    train: Dataset | Callable[[int, int], Dataset],
    test: Dataset | Mapping[str, Dataset],
    model: str | Callable[[], nn.Module],
    processor: Any,
    output_dir: str | Path,
    tails: Mapping[str, Mapping[str, Any]] = BALANCED,
    seeds: Sequence[int] = (1, 2, 3),
    args: Mapping[str, Any] | None = None,
    label_column: str = "label",
    thresholds: Sequence[float] | str = "thirds",
) -> Results:
    """Train on half of the classes, then test each half over its own names: base, new and their harmonic mean H.

    Args:
        recipes: methods to compare; one without a PEFT config is the zero-shot row.
        train: a labelled set with all classes, of which the first `ceil(K/2)` are base; or a function of seed and
            `n_max` (16 for a tail without `n_max`) that returns images of the base classes.
        test: a labelled set with all classes, or a dict with "base", "new" and any further sets, each classified over
            its own names. Further pairs, such as "base_other" and "new_other" for images of another artist, have a
            harmonic mean "H_other" of their own.
        model, processor, output_dir, seeds, args: see [`run_cells`].
        tails: name of a setting -> arguments of [`~peft_ncgeo.data.long_tailed`]; the seed draws which class gets
            which count. Default: 16 shots of each base class.
        label_column: `ClassLabel` column.
        thresholds: limits of many / medium / few base classes, see [`~peft_ncgeo.evaluation.evaluate_groups`]; these
            columns are filled if the classes differ in size.

    Returns:
        [`Results`] with the columns base, new, H, many, medium, few, the further pairs with their H and the further
        sets, also written to `output_dir`.

    Raises:
        ValueError: `test` lacks "base" or "new", or has a set named like another column; a set to be halved has fewer
            than four classes; a tail has an unknown argument; or as in [`run_cells`].
    """
    halves = dict(base_new_split(test, label_column)) if isinstance(test, Dataset) else dict(test)
    for half in ("base", "new"):
        if half not in halves:
            raise ValueError(f"test must hold a set named {half!r}; it has {sorted(halves)}.")
    suffixes = ["", *(n[4:] for n in halves if n.startswith("base_") and f"new{n[4:]}" in halves)]
    means = {f"H{suffix}": (f"base{suffix}", f"new{suffix}") for suffix in suffixes}
    groups = ["many", "medium", "few"]
    if taken := halves.keys() & {*means, *groups}:
        raise ValueError(f"test has a set named {min(taken)!r}, which is the name of another column; rename the set.")
    base = base_new_split(train, label_column)["base"] if isinstance(train, Dataset) else None

    def task(seed: int, tail: Mapping[str, Any]) -> Task:
        images = train(seed, tail.get("n_max") or 16) if base is None else base
        chosen = long_tailed(images, **tail, seed=seed, shuffle_classes=True, label_column=label_column)
        flat = tail.get("tau") == 1 or tail.get("imbalance_factor") == 1
        return Task(chosen, halves, None if flat else "base", thresholds)

    check_tails(tails)
    arguments = {**(args or {}), "label_column": label_column}
    settings = {name: partial(task, tail=tail) for name, tail in tails.items()}
    finish = partial(_with_harmonic_means, means=means)
    rows = run_cells(recipes, settings, model, processor, output_dir, seeds, arguments, finish)
    pairs = [column for mean, pair in means.items() if mean != "H" for column in (*pair, mean)]
    further = [name for name in halves if name not in ("base", "new", *pairs)]
    results = Results(rows, ["base", "new", "H", *groups, *pairs, *further], describe(seeds))
    results.save(output_dir)
    return results


def _with_harmonic_means(metrics: dict[str, Any], means: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    pairs = {name: (metrics[base], metrics[new]) for name, (base, new) in means.items()}
    return metrics | {name: None if None in pair else harmonic_mean(*pair) for name, pair in pairs.items()}
