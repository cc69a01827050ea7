"""The protocol of long tails: train on a tail, test on classes with many, medium and few training images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from ..data import long_tailed
from ..training import Recipe
from .results import Results
from .runs import After, Task, describe, run_cells


def long_tail(
    recipes: Sequence[Recipe],
    train: Dataset,
    test: Dataset,
    model: str | Callable[[], nn.Module],
    processor: Any,
    output_dir: str | Path,
    imbalance_factors: Sequence[float] = (10, 50, 100, 200),
    n_max: int | None = None,
    shuffle_classes: bool = False,
    seeds: Sequence[int] = (1, 2, 3),
    args: Mapping[str, Any] | None = None,
    label_column: str = "label",
    thresholds: Sequence[float] | str = (20, 100),
    after: After | None = None,
) -> Results:
    """Train on exponential tails of a labelled set, and test on balanced images of all its classes.

    Args:
        recipes: methods to compare; one without a PEFT config is evaluated without training.
        train: labelled images, at least `n_max` of the largest class.
        test: labelled images of the same classes.
        model, processor, output_dir, seeds, args, after: see [`run_cells`].
        imbalance_factors: one setting for each.
        n_max, shuffle_classes: see [`~peft_ncgeo.data.long_tailed`]. The published tails follow the
            labels' order: the first class is the largest.
        label_column: `ClassLabel` column.
        thresholds: limits of many / medium / few, see [`~peft_ncgeo.evaluation.evaluate_groups`]; "thirds" suits sets
            with few images in each class.

    Returns:
        [`Results`] with the columns all, many, medium, few and the realised imbalance factor, also written to
        `output_dir`.

    Raises:
        ValueError: a class of `train` has too few images for its tail, `test` has a class that was not trained, or as
            in [`run_cells`].
    """

    def setting(factor: float) -> Callable[[int], Task]:
        def task(seed: int) -> Task:
            chosen = long_tailed(
                train,
                imbalance_factor=factor,
                n_max=n_max,
                seed=seed,
                shuffle_classes=shuffle_classes,
                label_column=label_column,
            )
            return Task(chosen, {"all": test}, "all", thresholds)

        return task

    arguments = {**(args or {}), "label_column": label_column}
    settings = {f"IF {factor:g}": setting(factor) for factor in imbalance_factors}
    rows = run_cells(recipes, settings, model, processor, output_dir, seeds, arguments, after=after)
    columns = ["all", "many", "medium", "few", "realised_imbalance_factor"]
    results = Results(rows, columns, describe(seeds), {"realised_imbalance_factor": "imbalance factor"})
    results.save(output_dir)
    return results
