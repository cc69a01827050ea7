"""Choice of settings by classifying each support image with a head that has not seen it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor

Setting = TypeVar("Setting")


def left_out_images(labels: Tensor, what: str, settings: int, mend: str) -> Tensor:
    """Return the numbers of the images whose class has another image; the others cannot be left out.

    Args:
        what: the setting, for the error message.
        settings: number of settings to choose among.
        mend: what to do instead, for the error message.

    Raises:
        ValueError: there are several settings, but no class has two images.
    """
    several = (torch.bincount(labels)[labels] > 1).nonzero().flatten()
    if settings > 1 and not len(several):
        raise ValueError(
            f"{what} chosen by leaving one image out, which needs a class with two images; every class here has one, "
            f"so pass {mend}."
        )
    return several


def best_setting(candidates: Iterable[tuple[Setting, Tensor]], labels: Tensor) -> tuple[Setting, dict[str, float]]:
    """Return the setting whose logits (N, K) classify most images, and its accuracy; of ties the first.

    Without images it is the first setting, and there is no accuracy.
    """
    best: tuple[int, Setting] | None = None
    for setting, logits in candidates:
        right = int((logits.argmax(-1) == labels).sum())
        if best is None or right > best[0]:
            best = right, setting
    assert best is not None  # there is a candidate
    measured = {"leave_one_out_accuracy": best[0] / len(labels)} if len(labels) else {}
    return best[1], measured
