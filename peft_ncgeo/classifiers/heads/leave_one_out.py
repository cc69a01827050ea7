"""Choice of settings by classifying each support image with a head that has not seen it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Setting = TypeVar("Setting")
# Keys of a classifier's `metrics`: accuracy on support images that it has not seen, before and after adapting.
BEFORE, AFTER = "leave_one_out_accuracy_before", "leave_one_out_accuracy"


def describe_accuracy(metrics: Mapping[str, float]) -> str:
    """Return a phrase on the leave-one-out accuracy before and after adapting, or on why it is not known."""
    if not metrics:  # a classifier that was loaded
        return ""
    if BEFORE not in metrics:
        return "leave-one-out accuracy unknown, no class has two support images"
    before = f"leave-one-out accuracy {100 * metrics[BEFORE]:.1f} % before"
    if AFTER not in metrics:
        return f"{before}, unknown after"
    return f"{before}, {100 * metrics[AFTER]:.1f} % after"


def images_with_others(labels: Tensor) -> Tensor:
    """Return the indices of the images whose class has another image."""
    return (torch.bincount(labels)[labels] > 1).nonzero().flatten()


def left_out_images(labels: Tensor, what: str, settings: int, mend: str) -> Tensor:
    """Return the indices of the images whose class has another image; the others cannot be left out.

    Args:
        what: subject and verb of the error message, such as "alpha is".
        settings: number of settings to choose among.
        mend: argument to pass instead, for the error message.

    Raises:
        ValueError: there are several settings, but no class has two images.
    """
    several = images_with_others(labels)
    if settings > 1 and not len(several):
        raise ValueError(
            f"{what} chosen by leaving one image out, which needs a class with two images; every class here has one, "
            f"so pass {mend}."
        )
    return several


def best_setting(candidates: Iterable[tuple[Setting, Tensor]], labels: Tensor) -> tuple[Setting, dict[str, float]]:
    """Return the first setting whose logits (N, K) classify most images correctly, and its accuracy.

    Without images, return the first setting and no accuracy.
    """
    best: tuple[int, Setting] | None = None
    for setting, logits in candidates:
        right = int((logits.argmax(-1) == labels).sum())
        if best is None or right > best[0]:
            best = right, setting
    assert best is not None  # there is a candidate
    measured = {AFTER: best[0] / len(labels)} if len(labels) else {}
    return best[1], measured
