"""Streams and torch data sets, whose samples have to be read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset
from PIL import Image
from torch.utils.data import Subset, get_worker_info

from ..validation import check_int, one_line, short_repr
from .class_prompts import list_names
from .images import TEACHER, Augmentation, LabelledImages, show_image, to_rgb
from .long_tails import class_counts

Crop = Callable[[Image.Image], list[Image.Image]]


def is_stream(dataset: Any) -> bool:
    """Return True for a set that can only be read from its beginning, without numbered rows."""
    return isinstance(dataset, datasets.IterableDataset | torch.utils.data.IterableDataset)


def is_torch_set(dataset: Any) -> bool:
    """Return True for a stream, or for a torch data set with numbered rows."""
    return is_stream(dataset) or (isinstance(dataset, torch.utils.data.Dataset) and not isinstance(dataset, Dataset))


def known_names(dataset: Any, label_column: str) -> list[str]:
    """Return the class names of a stream's `ClassLabel` column, or of the attribute `classes` of torchvision's sets.

    The set may be a `torch.utils.data.Subset`, as `random_split` returns it. An empty list means that no names are
    known.
    """
    feature = (getattr(dataset, "features", None) or {}).get(label_column)
    if isinstance(feature, ClassLabel):
        return list_names(feature.names)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return list_names(getattr(dataset, "classes", ()))


def torch_set_names(
    dataset: Any, label_column: str, given: Sequence[str] | None, others: Sequence[str] = ()
) -> list[str]:
    """Return the class names of a stream or a torch data set.

    Args:
        given: names from the user; they must be those of the set if it has names.
        others: names for a set without names of its own.

    Raises:
        ValueError: no names are known, `given` differs from the set's names, or there are fewer than two.
    """
    known, kind = known_names(dataset, label_column), type(dataset).__name__
    if given is not None and known and list_names(given) != known:
        raise ValueError(
            f"class_names={short_repr(list(given))} are not those of the {kind}, {short_repr(known)}; leave them out."
        )
    names = known or (list(others) if given is None else list_names(given))
    if not names:
        raise ValueError(
            f"The class names of the {kind} are not known; pass class_names=[...], in the order of the labels."
        )
    if len(names) < 2:
        raise ValueError(f"The {kind} has {len(names)} class; classification needs at least two.")
    return names


def count_classes(dataset: Any, label_column: str, given: Sequence[int] | None, names: Sequence[str]) -> np.ndarray:
    """Return the number of training images of each class, (K,), counted if that needs no pass over the images.

    Args:
        given: numbers from the user, for a stream or a torch data set.

    Raises:
        ValueError: the numbers are not known, or are not one positive number for each class.
    """
    if not is_torch_set(dataset):
        return class_counts(dataset, label_column)
    if given is None:
        raise ValueError(
            f"A loss reads how many images each class has, which a {type(dataset).__name__} does not say; pass "
            "class_counts=[...], in the order of the class names."
        )
    counts = [check_int("class_counts", value, least=1) for value in given]
    if len(counts) != len(names):
        raise ValueError(f"class_counts has {len(counts)} numbers for {len(names)} classes; give one for each class.")
    return np.array(counts, dtype=np.int64)


class TorchRows:
    """Rows of a torch data set in the form of a `datasets` set: a dict of a PIL image and the number of a class.

    Args:
        dataset: torch data set whose samples are `(image, label)`, or dicts of the two columns.
        label_column: column of the labels; None: no label is read.
        names: K class names; a label is a number below K, or one of the names.
    """

    def __init__(self, dataset: Any, image_column: str, label_column: str | None, names: Sequence[str]) -> None:
        self.dataset, self.image_column, self.label_column = dataset, image_column, label_column
        self.number = {name: i for i, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(self.dataset[index])

    def read(self, sample: Any) -> dict[str, Any]:
        """Return the columns of a sample.

        Raises:
            TypeError, ValueError: the sample has another form, no PIL image, or no label of a known class.
        """
        if isinstance(sample, tuple | list) and len(sample) == 2:
            sample = {self.image_column: sample[0], self.label_column: sample[1]}
        columns = [self.image_column] if self.label_column is None else [self.image_column, self.label_column]
        if not isinstance(sample, Mapping) or any(column not in sample for column in columns):
            found = sorted(sample) if isinstance(sample, Mapping) else type(sample).__name__
            raise ValueError(f"expected a dict with {columns}, or a pair of them, got {short_repr(found)}")
        image = sample[self.image_column]
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"the image is a {type(image).__name__}, not a PIL image; leave out transforms such as ToTensor"
            )
        if self.label_column is None:
            return {self.image_column: image}
        return {self.image_column: image, self.label_column: self._label(sample[self.label_column])}

    def _label(self, label: Any) -> int:
        label = self.number.get(label) if isinstance(label, str) else label
        plain = label.item() if hasattr(label, "item") else label
        if not isinstance(plain, int) or not 0 <= plain < len(self.number):
            raise ValueError(
                f"the label {short_repr(label)} is not one of the {len(self.number)} classes; leave the "
                "sample out, or name all classes"
            )
        return plain


class LabelledStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """RGB images and labels of a stream, in its order; training reads the stream again and again without end.

    Therefore each batch is full, on any number of processes, and a resumed run, which skips the samples that it has
    seen, continues exactly. Each pass has another order if the stream shuffles, and other views: a view depends on the
    seed, the number of the pass, the position in the stream and the worker that reads it.

    Args:
        stream: `datasets.IterableDataset`, whose shards are divided among the workers; or torch's.
        rows: reader of its samples.
        endless: True for training.
        augment, seed, crop: see [`LabelledImages`].
        teaches: True if samples also ask for the pixels of a teacher.
    """

    def __init__(
        self,
        stream: Any,
        rows: TorchRows,
        endless: bool,
        augment: Augmentation | None = None,
        seed: int = 0,
        crop: Crop | None = None,
        teaches: bool = False,
    ) -> None:
        self.given, self.rows, self.endless = stream, rows, endless
        self.augment, self.seed, self.crop, self.teaches = augment, seed, crop, teaches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        of_worker = [worker.id] if worker is not None and worker.id else []
        for turn in count() if self.endless else (0,):
            if hasattr(self.given, "set_epoch"):
                self.given.set_epoch(turn)
            place = -1
            for place, sample in enumerate(self.given):
                yield self._sample(place, sample, (turn, place, *of_worker))
            if place < 0:
                if of_worker:  # there are fewer shards than workers
                    return
                raise ValueError("The stream gives no samples; pass one with images.")

    def _sample(self, place: int, sample: Any, drawn_from: tuple[int, ...]) -> dict[str, Any]:
        rows = self.rows
        try:
            read = rows.read(sample)
            image = to_rgb(read[rows.image_column])
        except Exception as error:
            raise ValueError(f"Sample {place} of the stream: {type(error).__name__}: {one_line(error)}.") from error
        label = -1 if rows.label_column is None else read[rows.label_column]
        shown = show_image(image, self.augment, (self.seed, *drawn_from), self.crop)
        return {**shown, "label": label, **({TEACHER: True} if self.teaches else {})}


def labelled_images(
    dataset: Any,
    image_column: str,
    label_column: str | None,
    names: Sequence[str],
    is_training: bool,
    augment: Augmentation | None = None,
    seed: int = 0,
    num_views: int = 0,
    crop: Crop | None = None,
) -> LabelledImages | LabelledStream:
    """Return the images of any set in the form that the trainer reads; see [`LabelledImages`] for the arguments."""
    known = known_names(dataset, str(label_column)) if is_torch_set(dataset) else []
    rows = TorchRows(dataset, image_column, label_column, known or names)
    if is_stream(dataset):
        return LabelledStream(dataset, rows, is_training, augment, seed, crop, teaches=is_training)
    given = rows if is_torch_set(dataset) else dataset
    images = LabelledImages(given, image_column, label_column, augment, seed, num_views, crop)
    images.show_teacher(is_training)
    return images
