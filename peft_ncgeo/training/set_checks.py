"""Checks of the kinds of data sets that a training gets, before they are read."""

from __future__ import annotations

from typing import Any

from datasets import DatasetDict

from ..data.torch_sets import is_stream, is_torch_set
from ..validation import short_repr
from .arguments import GeometryTrainingArguments


def check_sets(args: GeometryTrainingArguments, train: Any, evaluation: Any, class_counts: Any) -> None:
    """Raise an error for data sets that do not fit the arguments.

    Args:
        train, evaluation: the sets, None, or a dict of sets for evaluation.
        class_counts: numbers of images from the user, or None.
    """
    if isinstance(train, DatasetDict):
        splits = ", ".join(f"train_dataset=data[{split!r}]" for split in list(train)[:3])
        raise TypeError(f"train_dataset is a DatasetDict of {len(train)} splits; pass one of them: {splits}.")
    if class_counts is not None and not is_torch_set(train):
        raise ValueError("class_counts are for a stream or a torch data set; this set can be counted: leave them out.")
    for name, dataset in (evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}).items():
        if is_stream(dataset) and args.world_size > 1:
            raise ValueError(
                f"{name} is a stream, of which several processes would count some images twice; load it without "
                "streaming=True."
            )
    if args.class_balanced_sampling and is_torch_set(train):
        raise ValueError(
            f"class_balanced_sampling draws images by their labels, which a {type(train).__name__} does not give "
            "before it is read; leave it out, or load the set as a datasets.Dataset."
        )
    if not is_stream(train):
        return
    if args.max_steps <= 0:
        raise ValueError("A stream has no length, so the number of steps must be given: max_steps=....")
    if args.num_views:
        raise ValueError(
            f"num_views={short_repr(args.num_views)} needs images with fixed numbers, which a stream does not "
            "have; leave num_views at 0."
        )
