"""The protocol of all classes: train and test on all classes, with few images, a long tail, or all images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from ..data import class_counts, long_tailed
from ..data.checks import class_names
from ..training import Recipe
from .results import Results
from .runs import After, Task, check_tails, describe, run_cells

AS_GIVEN: Mapping[str, Mapping[str, Any]] = {"all images": {}}


def all_classes(
    recipes: Sequence[Recipe],
    train: Dataset | Callable[[int, int], Dataset],
    test: Dataset,
    model: str | Callable[[], nn.Module],
    processor: Any,
    output_dir: str | Path,
    tails: Mapping[str, Mapping[str, Any]] = AS_GIVEN,
    seeds: Sequence[int] = (1, 2, 3),
    args: Mapping[str, Any] | None = None,
    label_column: str = "label",
    thresholds: Sequence[float] | str = "thirds",
    after: After | None = None,
) -> Results:
    """Train on all classes of a set and test on all of them, as few-shot papers do ("all to all").

    Args:
        recipes: methods to compare; one without a PEFT config is the zero-shot row.
        train: labelled images of two or more classes; or a function of seed and `n_max` (16 for a tail without
            `n_max`) that returns them.
        test: labelled images of the same classes.
        model, processor, output_dir, seeds, args, after: see [`run_cells`].
        tails: name of a setting -> arguments of [`~peft_ncgeo.data.long_tailed`]: `{"tau": 1, "n_max": 16}` is 16
            shots; `{}` takes all images as they are. Default: all images.
        label_column: `ClassLabel` column.
        thresholds: limits of many / medium / few, see [`~peft_ncgeo.evaluation.evaluate_groups`]; these columns are
            filled if the classes differ in size.

    Returns:
        [`Results`] with the columns accuracy, balanced_accuracy, many, medium and few, also written to `output_dir`.

    Raises:
        ValueError: `train` and `test` have different classes; a tail has an unknown argument; or as in [`run_cells`].
    """
    check_tails(tails)

    def task(seed: int, tail: Mapping[str, Any]) -> Task:
        chosen = train if isinstance(train, Dataset) else train(seed, tail.get("n_max") or 16)
        differing = set(class_names(chosen, label_column)) ^ set(class_names(test, label_column))
        if differing:
            raise ValueError(
                f"Class {min(differing)!r} is in train or in test, but not in both; both must have the same classes."
            )
        if tail:
            chosen = long_tailed(chosen, **tail, seed=seed, shuffle_classes=True, label_column=label_column)
        counts = class_counts(chosen, label_column)
        return Task(chosen, {"all": test}, "all" if counts.min() < counts.max() else None, thresholds)

    arguments = {**(args or {}), "label_column": label_column}
    settings = {name: partial(task, tail=tail) for name, tail in tails.items()}
    rows = run_cells(recipes, settings, model, processor, output_dir, seeds, arguments, _named, after)
    columns = ["accuracy", "balanced_accuracy", "many", "medium", "few"]
    results = Results(rows, columns, describe(seeds), {"balanced_accuracy": "balanced accuracy"})
    results.save(output_dir)
    return results


def _named(metrics: dict[str, Any]) -> dict[str, Any]:
    names = {"all": "accuracy", "all_balanced_accuracy": "balanced_accuracy"}
    return {names.get(name, name): value for name, value in metrics.items()}
