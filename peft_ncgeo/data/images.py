"""Images of a `datasets` set as the model takes them, augmented by a rule that needs no state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import ExifTags, Image, ImageOps

from ..validation import one_line
from .sampling import label_array
from .white_level import column_white_level, lacks_white_level, white_level


def crop_flip(image: Image.Image, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A random crop of 8 to 100 % of the area (aspect ratio 3/4 to 4/3), resized, mirrored half of the time.

    Args:
        image: RGB.
        rng: source of all randomness.
        size: (width, height) in pixels of what comes back.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
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
    """Any image upright, as its EXIF data say, in RGB.

    Args:
        white: of an image of whole numbers, 255 or 65535. Default: what its own numbers tell, see
            [`~peft_ncgeo.data.white_level.white_level`]. Pillow alone would turn every number above 255 white.

    Raises:
        TypeError: no PIL image.
        ValueError: it has no pixels, cannot be decoded, or has numbers of no known range.
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
    except Exception as error:  # each of Pillow's decoders has errors of its own
        raise ValueError(f"An image cannot be read, its file may be damaged: {one_line(error)}") from error
    white = white_level(numbers) if white is None else white
    return Image.fromarray((numbers // (white // 255)).astype(np.uint8)).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF data say, which then say so no more, as `datasets` and pipelines have it."""
    image.load()  # TIFF files turn their images themselves
    with suppress(Exception):  # damaged EXIF data tell no orientation
        if image.getexif().get(ExifTags.Base.Orientation) is not None:
            return ImageOps.exif_transpose(image)
    return image


def rgb_images(images: Sequence[Image.Image], first: int = 0) -> list[Image.Image]:
    """[`to_rgb`] of each; an error names the image by its number, counted from `first`."""
    found = []
    for i, image in enumerate(images, first):
        try:
            found.append(to_rgb(image))
        except (TypeError, ValueError) as error:
            raise type(error)(f"Image {i}: {error}") from error
    return found


def list_images(images: Any, kinds: str = "PIL images") -> list[Image.Image]:
    """One PIL image or several as a list.

    Args:
        kinds: what the caller takes, for the error.

    Raises:
        TypeError: something else.
    """
    if not isinstance(images, Iterable) or isinstance(images, str | bytes | Mapping):
        images = [images]
    images = list(images)
    for image in images:
        if not isinstance(image, Image.Image):
            hint = "; open files with PIL.Image.open" if isinstance(image, str | Path) else ""
            raise TypeError(f"images must be {kinds}, got {type(image).__name__}{hint}.")
    return images


Augmentation = Callable[[Image.Image, np.random.Generator], Image.Image]


class LabelledImages(torch.utils.data.Dataset[dict[str, Any]]):
    """RGB images and labels of a `datasets` set, each view drawn from (seed, epoch, index) alone.

    So every process, every worker and a resumed run see the same views. A sampler that draws an image several times
    in an epoch asks for (index, draw), which gives each draw a view of its own. None asks for a sample that only fills
    a batch up: the first image, with a label of -100.

    Args:
        augment: None shows an image as it is, its one view.
        num_views: how many views an image has, which epochs take in turn; 0: another one in every epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_column: str,
        label_column: str,
        augment: Augmentation | None = None,
        seed: int = 0,
        num_views: int = 0,
    ) -> None:
        # a "torch" or "numpy" format would hand out arrays; the user's own transform stays
        self.given = dataset
        self.dataset = dataset if dataset.format["type"] == "custom" else dataset.with_format(None)
        self.image_column, self.label_column = image_column, label_column
        self.augment, self.seed = augment, seed
        self.num_views = num_views if augment else 1
        self._white = column_white_level(dataset, image_column)
        # shared memory: workers that outlive an epoch see the next one's number
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._shows = torch.ones((), dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def show(self, images: bool) -> None:
        """Whether samples hold images, or labels and the numbers of views alone."""
        self._shows.fill_(images)

    @property
    def views(self) -> int:
        """How many views there are of all images together; 0 where no view comes again."""
        own_transform = self.dataset.format["type"] == "custom"  # which may draw by chance
        return 0 if own_transform else len(self.dataset) * self.num_views

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int] | None) -> dict[str, Any]:
        if key is None:
            return {**self[0], "label": -100}
        index, draw = key if isinstance(key, tuple) else (key, 0)
        if not self.num_views:
            return self._sample(index, (int(self._epoch), index, *([draw] if draw else [])))
        view = self.num_views * index + (int(self._epoch) + draw) % self.num_views
        return self.fixed_view(view) if self._shows else {"label": int(self.labels[index]), "view": view}

    def fixed_view(self, view: int) -> dict[str, Any]:
        """The sample with this number under "view", in whatever epoch it is shown."""
        index, turn = divmod(view, self.num_views)
        return {**self._sample(index, (turn, index)), "view": view}

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,), read without decoding an image."""
        return label_array(self.dataset, self.label_column)

    def _sample(self, index: int, drawn_from: tuple[int, ...]) -> dict[str, Any]:
        try:
            sample = self.dataset[index]
            image, label = sample[self.image_column], sample[self.label_column]
            image = to_rgb(image, self._white)
        except Exception as error:
            raise ValueError(
                f"Sample {index} gives no image in column {self.image_column!r} or no label: "
                f"{type(error).__name__}: {one_line(error)}"
            ) from error
        if self.augment is not None:
            image = self.augment(image, np.random.default_rng((self.seed, *drawn_from)))
        return {"image": image, "label": label}


class ImageCollator:
    """Turns samples of [`LabelledImages`] into `pixel_values` (B, C, H, W), `labels` (B,) and a list `views`.

    Pixels are left out of samples without images, and `views` of those without a fixed view.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"labels": torch.tensor([sample["label"] for sample in samples], dtype=torch.int64)}
        if "image" in samples[0]:
            images = [sample["image"] for sample in samples]
            batch["pixel_values"] = self.image_processor(images=images, return_tensors="pt")["pixel_values"]
        if "view" in samples[0]:
            batch["views"] = [sample["view"] for sample in samples]  # on the host, where their features are kept
        return batch
