"""Mixing of a micro-batch over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.images import TEACHER
from ...data.mixing import Mixing
from ...geometry.checks import check_labels
from ...models.image_encoder import image_inputs
from ..gathering import gather_batch, process_index


class MixedBatch:
    """Images of a micro-batch, each mixed with another image of the micro-batch of all processes.

    The random draws depend only on the seed, the optimiser step and the number of the micro-batch in this step, so all
    processes draw the same, and so does a resumed training.

    Args:
        mixing: mixup or CutMix; None leaves the batch unchanged.
        inputs: this process's batch; rows that only fill it up are at its end.
        sizes: result of [`batch_sizes`].
        key: seed and step; the number of the micro-batch is among the inputs.

    Attributes:
        inputs: the batch with mixed pixels, and with mixed pixels of a teacher if it has its own.

    Raises:
        ValueError: the model needs other inputs than pixels, so two images cannot be mixed.
    """

    def __init__(
        self, mixing: Mixing | None, inputs: dict[str, Any], sizes: Sequence[int], key: tuple[int, ...]
    ) -> None:
        self.inputs = dict(inputs)
        self.order: Tensor | None = None
        if mixing is None:
            return
        rng = np.random.default_rng(
            (*key, inputs.get("micro_batch", 0), 1, 1)
        )  # longer than the keys of views, so draws differ
        self.order = torch.from_numpy(rng.permutation(sum(sizes)))
        drawn, shares = mixing.draw(rng), []
        start, own = sum(sizes[: process_index()]), sizes[process_index()]
        partners = self.order[start : start + own]
        for prefix in ("", TEACHER):
            if f"{prefix}pixel_values" not in inputs:
                continue
            others = image_inputs(inputs, prefix=prefix)
            pixels = others.pop("pixel_values")
            if others or pixels.dim() != 4:
                raise ValueError(
                    f"{type(mixing).__name__} mixes only pixels (B, C, H, W), but this model's inputs are "
                    f"{', '.join(['pixels', *others])} of shape {tuple(pixels.shape)}; leave the mixing out."
                )
            everyone = gather_batch(pixels, list(sizes))
            mixed, share = mixing.mix(pixels[:own], everyone[partners.to(pixels.device)], drawn)
            self.inputs[f"{prefix}pixel_values"] = torch.cat([mixed, pixels[own:]])
            shares.append(share)
        self.share = shares[0]

    def mix_labels(self, fields: dict[str, Any], num_classes: int) -> None:
        """Replace the labels (B,) of all processes by `targets` (B, K), the shares of classes in the mixed images."""
        if self.order is None or "labels" not in fields:
            return
        labels = fields.pop("labels")
        check_labels(labels, num_classes)
        own = torch.nn.functional.one_hot(labels.clamp(0, num_classes - 1), num_classes).float()
        fields["targets"] = self.share * own + (1 - self.share) * own[self.order.to(labels.device)]
