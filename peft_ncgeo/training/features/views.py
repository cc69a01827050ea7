"""Features of training images that do not change between epochs, computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ...data.images import LabelledImages
from ...models.image_encoder import image_inputs
from ..gathering import gather_batch, world_size


class FixedViews(Dataset[dict[str, Any]]):
    """Data set of every `step`-th view of the images, starting with view `first`."""

    def __init__(self, images: LabelledImages, first: int, step: int) -> None:
        self.images, self.numbers = images, range(first, images.views, step)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.images.fixed_view(self.numbers[i])


class ViewFeatures:
    """Features of every view of the training images, kept on the host: (V, d).

    Views are encoded in a fixed order and in batches of a fixed size, so that a resumed run has exactly the same
    features, bit for bit. Several processes share the work.

    Args:
        images: training images with `views` > 0.
        collate: function that makes `pixel_values` from samples.
        encode: function from `pixel_values` (B, C, H, W), and the other tensors that the model needs, to features
            (B, d).
        device: device of the encoder.
        batch_size: number of images per pass.
        workers: number of processes that read and collate images, as `dataloader_num_workers`.
        quiet: True: show no progress bar.
    """

    def __init__(
        self,
        images: LabelledImages,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        encode: Callable[..., Tensor],
        device: torch.device,
        batch_size: int,
        workers: int = 0,
        quiet: bool = False,
    ) -> None:
        rank, processes = (torch.distributed.get_rank(), world_size()) if world_size() > 1 else (0, 1)
        loader = DataLoader(FixedViews(images, rank, processes), batch_size, num_workers=workers, collate_fn=collate)
        # a process without views encodes view 0, only to know the width d
        batches = loader if len(loader) else [collate([images.fixed_view(0)])]
        own = torch.cat(
            [
                encode(**image_inputs(batch, device))
                for batch in tqdm(batches, "Embedding training images once", disable=quiet or rank > 0)
            ]
        )
        if processes > 1:
            sizes = [len(FixedViews(images, i, processes)) for i in range(processes)]
            shares = gather_batch(own, sizes).split(sizes)
            own = own.new_empty(images.views, own.shape[1])
            for i, share in enumerate(shares):
                own[i::processes] = share
        self.features = own.float().cpu()

    def of(self, views: list[int], device: torch.device) -> Tensor:
        """Return the features (B, d) of these views."""
        return self.features[views].to(device, non_blocking=True)


def never_changes(model: nn.Module, out: dict[str, Tensor]) -> bool:
    """Return True if every pass in training mode, with gradients enabled, gives the same image features."""
    return not out["image_features"].requires_grad and not is_random(model)


def is_random(model: nn.Module) -> bool:
    """Return True if a pass in training mode uses random numbers."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return dropout or any(getattr(config, "attention_dropout", 0) for config in configs)
