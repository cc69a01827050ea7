"""Table of predictions, filled batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..data.image_batches import ImageBatch
from ..data.image_stream import Sample

_NOT_FINITE = "The logits are not finite; the image, or the weights of the model or its adapter, are damaged."


class PredictionTable:
    """Rows of images with their k most probable names.

    Args:
        names: K names, to which the indices of predictions point.
        k: number of predictions for an image.
        labelled: True if samples have labels.
    """

    def __init__(self, names: Sequence[Any], k: int, labelled: bool) -> None:
        self._names, self._k, self._labelled = np.empty(len(names) + 1, dtype=object), k, labelled
        self._names[:-1] = names  # the last one stays None, the name of an image that cannot be read
        self._samples: list[Sample] = []
        self._found: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, batch: ImageBatch, found: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """Add a batch, with the values, indices and probabilities (B, k) for its B images that could be read."""
        self._samples += batch.samples
        self._found += [] if found is None else [found]

    def frame(self) -> pd.DataFrame:
        """Return the table.

        Raises:
            ValueError: there are no rows.
        """
        if not self._samples:
            raise ValueError("There are no images; pass at least one.")
        errors = [None if sample.error is None else str(sample.error) for sample in self._samples]
        read = np.flatnonzero([error is None for error in errors])
        numbers = np.full((len(errors), self._k), -1)
        probabilities = np.full((len(errors), self._k), np.nan, dtype=np.float32)
        if self._found:
            values, best, sure = (torch.cat(part).cpu().numpy() for part in zip(*self._found, strict=True))
            finite = np.isfinite(values).all(1)
            numbers[read[finite]], probabilities[read[finite]] = best[finite], sure[finite]
            for row in read[~finite]:
                errors[row] = _NOT_FINITE
        paths = [sample.path for sample in self._samples]
        known = None not in paths
        columns: dict[str, Any] = {"path": _objects(paths)} if known else {"row": np.arange(len(paths))}
        if self._labelled:
            columns["label"] = _objects([sample.label for sample in self._samples])
        for place in range(self._k):
            suffix = f"_{place + 1}" if place else ""
            columns[f"name{suffix}"] = _objects(self._names[numbers[:, place]])
            columns[f"probability{suffix}"] = probabilities[:, place]
        return pd.DataFrame({**columns, "error": _objects(errors)})


def _objects(values: Any) -> Any:
    """Return a column that keeps values as they are; pandas would turn integers with None among them into floats."""
    return pd.Series(values, dtype=object)
