"""Batches of a stream of images as inputs of an image tower, made by the worker processes of a data loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..validation import check_int
from .crops import check_crops, check_num_test_views, view_inputs
from .image_stream import ImageStream, Sample


@dataclass(frozen=True)
class ImageBatch:
    """Images of a batch.

    Attributes:
        samples: paths, labels and errors of the images, without the images.
        views: inputs (B, ...) of each test view of the B images that could be read; empty if there are none.
    """

    samples: list[Sample]
    views: list[dict[str, Tensor]]


def load_batches(
    stream: ImageStream, image_processor: Any, batch_size: int = 64, num_test_views: int = 1, num_workers: int = 0
) -> Iterator[ImageBatch]:
    """Check the arguments, and return the batches, with a progress bar after a second.

    At most two batches of images for each worker process are in memory.

    Args:
        num_workers: processes that open and process images; 0: this process does it.

    Raises:
        TypeError, ValueError: an argument does not fit, or the processor cannot process crops as they are.
    """
    batch_size = check_int("batch_size", batch_size, least=1)
    num_workers = check_int("num_workers", num_workers, least=0)
    if check_num_test_views(num_test_views) > 1:
        check_crops(image_processor)
    loader: DataLoader[Sample] = DataLoader(
        _Reader(stream),
        batch_sampler=_chunks(stream.keys, batch_size),
        num_workers=num_workers,
        collate_fn=_Collator(image_processor, num_test_views),
        generator=torch.Generator(),  # the global one stays as it is
    )
    return _with_bar(loader, stream.size)


def _with_bar(loader: Iterable[ImageBatch], size: int | None) -> Iterator[ImageBatch]:
    with tqdm(desc="Classifying", total=size, unit="image", delay=1) as bar:
        for batch in loader:
            yield batch
            bar.update(len(batch.samples))


def _chunks(keys: Iterable[Any], size: int) -> Iterator[list[Any]]:
    keys = iter(keys)
    while chunk := list(islice(keys, size)):
        yield chunk


class _Reader(torch.utils.data.Dataset[Sample]):
    """Samples of a stream by their keys; the stream itself stays in the process that made it."""

    def __init__(self, stream: ImageStream) -> None:
        self._read = stream.read

    def __getitem__(self, key: Any) -> Sample:
        return self._read(key)


class _Collator:
    def __init__(self, image_processor: Any, num_test_views: int) -> None:
        self._processor, self._views = image_processor, num_test_views

    def __call__(self, samples: list[Sample]) -> ImageBatch:
        images = [sample.image for sample in samples if sample.image is not None]
        views = view_inputs(self._processor, images, self._views) if images else []
        return ImageBatch([sample._replace(image=None) for sample in samples], views)
