"""The user's own metrics: they may ask for the class names of the evaluated set, and their names get a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from ..validation import short_repr

NAMES = "class_names"  # the parameter that gets them
Metrics = Callable[..., dict[str, float]]


def with_class_names(compute_metrics: Metrics, class_names: Callable[[], Sequence[str]]) -> Metrics:
    """Return a function that calls `compute_metrics`, with the class names if it has a parameter `class_names`.

    Raises:
        TypeError: the function cannot be called with a prediction alone, or with `class_names` or `compute_result`.
    """
    try:
        signature = inspect.signature(compute_metrics)
    except (TypeError, ValueError):  # of a builtin, or no function
        return compute_metrics
    known = [name for name in (NAMES, "compute_result") if name in signature.parameters]
    try:
        signature.bind(object(), **dict.fromkeys(known))
    except TypeError as error:
        raise TypeError(
            f"compute_metrics={short_repr(compute_metrics)} must take an EvalPrediction, and beside it only "
            f"class_names (and compute_result under batch_eval_metrics): {error}."
        ) from error
    if NAMES not in known:
        return compute_metrics

    @wraps(compute_metrics)
    def named(prediction: Any, **others: Any) -> dict[str, float]:
        return compute_metrics(prediction, **others, class_names=list(class_names()))

    return named


def without_prefix(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return the metrics that are numbers, by their names without `prefix` and its underscore."""
    return {
        name.removeprefix(f"{prefix}_"): value
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
