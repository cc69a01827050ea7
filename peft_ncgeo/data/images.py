"""Images of a `datasets` set in the form that models take, with stateless augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ..models.image_encoder import image_inputs
from ..validation import one_line
from .crops import crop_inputs
from .multi_label import MultiHotReader, is_multi_label, multi_hot
from .sampling import label_array
from .white_level import column_white_level, lacks_white_level, white_level


def crop_flip(
    image: Image.Image, rng: np.random.Generator, size: tuple[int, int], smallest: float = 0.08
) -> Image.Image:
    """Crop a random share of the area (aspect ratio 3/4 to 4/3), resize the crop, and mirror half of the images.

    Args:
        image: image in RGB.
        rng: source of all randomness.
        size: (width, height) of the result in pixels.
        smallest: smallest share of the area; the largest is 1.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(smallest, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    image = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def to_rgb(image: Image.Image, white: int | None = None) -> Image.Image:
    """Convert an image to RGB, turned upright by its EXIF data.

    Args:
        white: white level of an image of integers, 255 or 65535. Default: found from its numbers, see
            [`~peft_ncgeo.data.white_level.white_level`]. Pillow alone would make every number above 255 white.

    Raises:
        TypeError: `image` is not a PIL image.
        ValueError: the image has no pixels, cannot be decoded, or has numbers of an unknown range.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"An image must be a PIL image, got {type(image).__name__}.")
    if not all(image.size):
        raise ValueError(f"An image of {image.width} x {image.height} has no pixels; leave it out.")
    try:
        image = _upright(image)
        if not lacks_white_level(image):
            return image.convert("RGB")
        numbers = np.asarray(image)
    except Exception as error:  # each of Pillow's decoders raises other errors
        raise ValueError(f"An image cannot be read; its file may be damaged: {one_line(error)}") from error
    white = white_level(numbers) if white is None else white
    return Image.fromarray((numbers // (white // 255)).astype(np.uint8)).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image upright by its EXIF data and remove that entry, as `datasets` and pipelines do."""
    image.load()  # Pillow turns TIFF images itself
    with suppress(Exception):  # damaged EXIF data have no orientation
        if image.getexif().get(ExifTags.Base.Orientation) is not None:
            return ImageOps.exif_transpose(image)
    return image


FILLER = -100  # label of a row that only fills up a batch
TEACHER = "teacher_"  # prefix of the names of a teacher's inputs, if its pixels differ from the model's


def counted_rows(labels: Tensor) -> Tensor:
    """Return a mask (B,) of the real rows, without those that only fill up a batch, from labels (B,) or (B, K)."""
    return (labels if labels.dim() == 1 else labels[:, 0]) != FILLER


Augmentation = Callable[[Image.Image, np.random.Generator], Image.Image]


class LabelledImages(torch.utils.data.Dataset[dict[str, Any]]):
    """RGB images and labels of a `datasets` set; each view depends only on (seed, epoch, index).

    Therefore all processes, all workers and a resumed run get the same views. A sampler that draws an image several
    times in an epoch uses the key (index, draw), which gives each draw a view of its own. The key None gives a sample
    that only fills up a batch: the first image, with a label of -100.

    Labels of a multi-label column are rows (K,) of 0 and 1.

    Args:
        dataset: a `datasets.Dataset`, or an object with such rows.
        label_column: column of the labels; None: no labels are read, and each label is -1.
        augment: augmentation of an image; None: the image itself is the only view.
        num_views: number of fixed views of an image, which epochs use in turn; 0: a new view in every epoch.
        crop: function that makes several test views of an image, which a sample holds as `crops` in place of `image`.
    """

    def __init__(
        self,
        dataset: Any,
        image_column: str,
        label_column: str | None,
        augment: Augmentation | None = None,
        seed: int = 0,
        num_views: int = 0,
        crop: Callable[[Image.Image], list[Image.Image]] | None = None,
    ) -> None:
        self.given = dataset
        # it may be random; rows of torch's sets have passed through one
        self.transformed = not isinstance(dataset, Dataset) or dataset.format["type"] == "custom"
        # a "torch" or "numpy" format would return arrays; the user's own transform stays
        self.dataset = dataset if self.transformed else dataset.with_format(None)
        self.image_column, self.label_column = image_column, label_column
        lists = label_column is not None and is_multi_label(dataset, label_column)
        self._read_labels = MultiHotReader(dataset, str(label_column)) if lists else None
        self.augment, self.seed, self.crop = augment, seed, crop
        self.num_views = num_views if augment else 1
        self._white = None if self.transformed else column_white_level(dataset, image_column)
        # shared memory: persistent workers see the next epoch's number
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._shows = torch.ones((), dtype=torch.bool).share_memory_()
        self._teaches = torch.zeros((), dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def show(self, images: bool) -> None:
        """Set whether samples hold images; without images they hold only labels and view numbers."""
        self._shows.fill_(images)

    def show_teacher(self, images: bool) -> None:
        """Set whether samples also ask for the pixels of a teacher, see [`ImageCollator`]."""
        self._teaches.fill_(images)

    @property
    def views(self) -> int:
        """Number of fixed views of all images together; 0 if no view is used twice."""
        return 0 if self.transformed else len(self.dataset) * self.num_views

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int] | None) -> dict[str, Any]:
        if key is None:
            first = self[0]
            return {**first, "label": FILLER if self._read_labels is None else np.full_like(first["label"], FILLER)}
        index, draw = key if isinstance(key, tuple) else (key, 0)
        if not self.num_views:
            return self._sample(index, (int(self._epoch), index, *([draw] if draw else [])))
        view = self.num_views * index + (int(self._epoch) + draw) % self.num_views
        if self._shows:
            return self.fixed_view(view)
        label = self.labels[index]
        return {"label": int(label) if self._read_labels is None else label, "view": view}

    def fixed_view(self, view: int) -> dict[str, Any]:
        """Return the sample of a view number; it is the same in all epochs."""
        index, turn = divmod(view, self.num_views)
        return {**self._sample(index, (turn, index)), "view": view}

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels (N,), or (N, K) of a multi-label column, read without decoding an image."""
        if self.label_column is None:
            return np.full(len(self.dataset), -1)
        if self._read_labels is not None:
            return multi_hot(self.dataset, self.label_column)
        return label_array(self.dataset, self.label_column)

    def _sample(self, index: int, drawn_from: tuple[int, ...]) -> dict[str, Any]:
        try:
            sample = self.dataset[index]
            image, label = sample[self.image_column], -1 if self.label_column is None else sample[self.label_column]
            label = label if self._read_labels is None else self._read_labels(label)
            image = to_rgb(image, self._white)
        except Exception as error:
            raise ValueError(
                f"Sample {index} gives no image in column {self.image_column!r} or no label: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
        shown = show_image(image, self.augment, (self.seed, *drawn_from), self.crop)
        return {**shown, "label": label, **({TEACHER: True} if self._teaches else {})}


def show_image(
    image: Image.Image,
    augment: Augmentation | None,
    drawn_from: Sequence[int],
    crop: Callable[[Image.Image], list[Image.Image]] | None,
) -> dict[str, Any]:
    """Return the view that the seed numbers `drawn_from` determine as `image`, or the test views as `crops`."""
    if augment is not None:
        image = augment(image, np.random.default_rng(drawn_from))
    return {"image": image} if crop is None else {"crops": crop(image)}


class ImageCollator:
    """Collator of [`LabelledImages`] samples into `pixel_values` (B, C, H, W), `labels` and a list `views`.

    Labels are (B,), or (B, K) of a multi-label column.

    Other tensors that a model needs are added, see [`~peft_ncgeo.models.image_encoder.image_inputs`]. Samples without
    images give no `pixel_values`, and samples without fixed views give no `views`. Samples of V crops each give
    `pixel_values` (B, V, C, H, W).

    Args:
        image_processor: image processor of the model.
        teacher_processor: image processor of a teacher, for samples that ask for its pixels: these get the same names
            as the model's, with `teacher_` in front.
    """

    def __init__(self, image_processor: Any, teacher_processor: Any = None) -> None:
        self.image_processor, self.teacher_processor = image_processor, teacher_processor

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        labels = np.array([sample["label"] for sample in samples], dtype=np.int64)
        batch: dict[str, Any] = {"labels": torch.from_numpy(labels)}
        if "image" in samples[0]:
            images = [sample["image"] for sample in samples]
            batch |= image_inputs(self.image_processor(images=images, return_tensors="pt"))
            if self.teacher_processor is not None and TEACHER in samples[0]:
                others = image_inputs(self.teacher_processor(images=images, return_tensors="pt"))
                batch |= {TEACHER + name: value for name, value in others.items()}
        if "crops" in samples[0]:
            batch |= crop_inputs(self.image_processor, [sample["crops"] for sample in samples])
        if "view" in samples[0]:
            batch["views"] = [sample["view"] for sample in samples]  # on the host, like their features
        return batch
