"""The protocols of transfer: train on one data set, test on others without further training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from ..data import few_shot
from ..data.checks import class_names
from ..training import Recipe
from .results import Results
from .runs import Task, describe, run_cells


def cross_dataset(
    recipes: Sequence[Recipe],
    train: Dataset,
    targets: Mapping[str, Dataset],
    model: str | Callable[[], nn.Module],
    processor: Any,
    output_dir: str | Path,
    source: Dataset | None = None,
    shots: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
    args: Mapping[str, Any] | None = None,
    label_column: str = "label",
) -> Results:
    """Train on `shots` images of every class of one set, and test on other sets over their own class names.

    Args:
        recipes: methods to compare; one without a PEFT config is the zero-shot row.
        train: labelled images of the source.
        targets: name -> labelled test set.
        model, processor, output_dir, seeds, args: see [`run_cells`].
        source: test images of the source's own classes, which get a column of their own.
        shots: number of training images of each class, drawn by the seed.
        label_column: `ClassLabel` column of every set.

    Returns:
        [`Results`] with a column for each set and `average`, the mean over the targets; also written to `output_dir`.

    Raises:
        ValueError: no targets, or one named "source" or "average".
    """
    if not targets or {"source", "average"} & set(targets):
        raise ValueError(f"targets must be one or more sets, none named 'source' or 'average', got {list(targets)}.")
    test = {**({} if source is None else {"source": source}), **targets}

    def task(seed: int) -> Task:
        return Task(few_shot(train, shots, seed, label_column), test)

    arguments = {**(args or {}), "label_column": label_column}
    finish = partial(_with_average, targets=list(targets))
    rows = run_cells(recipes, {f"{shots} shots": task}, model, processor, output_dir, seeds, arguments, finish)
    results = Results(rows, [*test, "average"], describe(seeds))
    results.save(output_dir)
    return results


def domain_generalisation(
    recipes: Sequence[Recipe], train: Dataset, targets: Mapping[str, Dataset], *rest: Any, **options: Any
) -> Results:
    """Run [`cross_dataset`] on targets that show classes of the source in other domains (sketches, renditions).

    A target may have only some of the source's classes (ImageNet-A, ImageNet-R); it is classified over these.

    Args:
        recipes, train, targets, rest, options: see [`cross_dataset`].

    Raises:
        ValueError: a target has a class that the source does not have, which the error names.
    """
    label_column = options.get("label_column", "label")
    known = set(class_names(train, label_column))
    for name, dataset in targets.items():
        strange = [c for c in class_names(dataset, label_column) if c not in known]
        if strange:
            raise ValueError(
                f"Target {name!r} has the class {strange[0]!r}, which the source does not have; use cross_dataset for "
                "sets of other classes."
            )
    return cross_dataset(recipes, train, targets, *rest, **options)


def _with_average(metrics: dict[str, Any], targets: list[str]) -> dict[str, Any]:
    values = [metrics[name] for name in targets]
    return {**metrics, "average": None if None in values else statistics.fmean(values)}
