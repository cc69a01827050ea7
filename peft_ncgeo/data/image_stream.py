"""Streams of images to classify, each opened when it is needed: folders, files, data sets and generators."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import ClassLabel
from PIL import Image

from ..validation import OF_THE_MACHINE, one_line, short_repr
from .reading import is_one_image, list_images, read_image, unreadable
from .white_level import column_white_level

_LABELS = "label"  # column of the class labels that data sets have
_ONLY_NAMED = {"BUFR", "GRIB", "HDF5", "MPEG"}  # formats that Pillow knows by name and cannot read


class Sample(NamedTuple):
    """Image of a stream, or the reason why it cannot be read.

    Attributes:
        path: file that was read; None for an image from memory.
        label: name of the image's class if the data set has labels, else None.
        image: the image in RGB; None if it cannot be read.
        error: reason why it cannot be read, else None.
    """

    path: str | None = None
    label: str | None = None
    image: Image.Image | None = None
    error: TypeError | ValueError | None = None


@dataclass(frozen=True)
class ImageStream:
    """Images in a fixed order.

    Attributes:
        keys: one for each image, cheap to make; it may be possible to iterate over them only once.
        read: function that returns the sample of a key, in any process. A sample holds the error of its image; only
            errors of the machine, such as a lack of memory, are raised.
        size: number of images; None if it is not known.
        labelled: True if the samples have labels.
    """

    keys: Iterable[Any]
    read: Callable[[Any], Sample]
    size: int | None = None
    labelled: bool = False


def stream_images(images: Any) -> ImageStream:
    """Return one or several images as a stream; take an image from a generator only when it is needed.

    Raises:
        TypeError: an image of a list is of a kind that [`~peft_ncgeo.data.reading.read_image`] does not take.
    """
    images = list_images(images) if is_one_image(images) or isinstance(images, list | tuple) else images
    size = len(images) if hasattr(images, "__len__") else None
    cells = _Cells()
    return ImageStream(cells.keys((image, None) for image in images), cells, size)


def stream_data(data: Any, image_column: str = "image") -> ImageStream:
    """Return the images of a folder or a data set, or images that [`stream_images`] takes, as a stream.

    Args:
        data: folder, which is searched recursively, in the order of the paths; one image file; `datasets.Dataset` or
            `datasets.IterableDataset`; or images.
        image_column: column of a data set.

    Raises:
        FileNotFoundError: the folder does not exist.
        TypeError, ValueError: a folder has no images, a file is of another kind, or a data set has no such column.
    """
    if isinstance(data, str | os.PathLike):
        return stream_images(image_files(data))
    if isinstance(data, datasets.Dataset):
        return _stream_dataset(data, image_column)
    if isinstance(data, datasets.IterableDataset):
        return _stream_rows(data, image_column)
    if isinstance(data, Mapping):
        raise TypeError(f"Expected a folder, a data set or images, got {type(data).__name__}; pass one of its splits.")
    return stream_images(data)


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the sorted paths of all image files in a folder and its subfolders; for an image file, its own path.

    Hidden entries, whose names start with ".", and files with endings that Pillow does not read are left out; a
    warning gives their number.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: there is no image file.
        OSError: a folder cannot be listed.
    """
    readable, found, hidden, others = _endings(), [], 0, []
    if not os.path.exists(folder):
        raise FileNotFoundError(f"There is no folder {short_repr(os.fspath(folder))}; check the path.")
    if os.path.isfile(folder):
        folder = Path(folder)
        if folder.suffix.lower() not in readable:
            raise ValueError(f"{folder} is neither a folder nor an image file; pass a folder, or a list of paths.")
        return [folder]
    for place, names in _folders(folder):
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                hidden += 1
            elif path.suffix.lower() in readable:
                found.append(path)
            else:
                others.append(path)
    such_as = f", such as {short_repr(str(min(others)))}" if others else ""
    left_out = f"{len(others)} of other kinds{such_as}, {hidden} hidden"
    if not found:
        raise ValueError(f"Folder {short_repr(os.fspath(folder))} holds no image files ({left_out}).")
    if others or hidden:
        warnings.warn(f"Files of {short_repr(os.fspath(folder))} that were left out: {left_out}.", stacklevel=2)
    return sorted(found)


def _folders(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder with the names of its files and hidden folders; follow links, but not in a circle."""

    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for place, inside, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        hidden = [name for name in inside if name.startswith(".")]
        inside[:] = [] if real in seen else sorted(set(inside) - set(hidden))
        if real not in seen:
            yield place, files + hidden
        seen.add(real)


def _endings() -> set[str]:
    """Return the endings of files in the formats that Pillow reads here."""
    known = Image.registered_extensions()
    return {ending for ending, format in known.items() if format in Image.OPEN and format not in _ONLY_NAMED}


def _stream_dataset(dataset: datasets.Dataset, image_column: str) -> ImageStream:
    labels = _label_names(dataset)
    cells = _Cells(None, labels)
    if dataset.format["type"] != "custom":  # else the user's own transform makes the images
        feature, white = _image_feature(dataset, image_column), column_white_level(dataset, image_column)
        dataset = _closed(dataset.with_format(None), image_column, feature, bool(labels))
        cells = _Cells(feature, labels, white)
    return ImageStream(range(len(dataset)), _Rows(dataset, image_column, cells), len(dataset), bool(labels))


def _stream_rows(dataset: datasets.IterableDataset, image_column: str) -> ImageStream:
    labels = _label_names(dataset)
    feature: datasets.Image | None = datasets.Image()
    dataset = dataset.with_format(None)
    if dataset.features is not None:
        feature = _image_feature(dataset, image_column)
        dataset = _closed(dataset, image_column, feature, bool(labels))

    def rows() -> Iterator[tuple[Any, Any]]:
        for row in dataset:
            if image_column not in row:
                raise ValueError(_no_column(image_column, row))
            yield row[image_column], row.get(_LABELS)

    cells = _Cells(feature, labels)
    return ImageStream(cells.keys(rows()), cells, labelled=bool(labels))


def _label_names(dataset: Any) -> tuple[str, ...]:
    feature = (dataset.features or {}).get(_LABELS)
    return tuple(feature.names) if isinstance(feature, ClassLabel) else ()


def _image_feature(dataset: Any, image_column: str) -> datasets.Image | None:
    """Return the feature that opens the cells of an image column, or None for a column of paths.

    Raises:
        ValueError: there is no such column, or it holds neither images nor paths.
    """
    if image_column not in dataset.features:
        raise ValueError(_no_column(image_column, dataset.features))
    feature = dataset.features[image_column]
    if isinstance(feature, datasets.Image):
        return datasets.Image(mode=feature.mode)
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        return None
    raise ValueError(
        f'Column {image_column!r} holds neither images nor paths; convert it with dataset.cast_column("{image_column}"'
        ", datasets.Image())."
    )


def _no_column(image_column: str, columns: Iterable[str]) -> str:
    return f"No image column {short_repr(image_column)} among {short_repr(list(columns))}; name it in image_column."


def _closed(dataset: Any, image_column: str, feature: datasets.Image | None, labelled: bool) -> Any:
    """Return a data set with these columns only, which does not open the images."""
    dataset = dataset.select_columns([image_column, *([_LABELS] if labelled else [])])
    return dataset if feature is None else dataset.cast_column(image_column, datasets.Image(decode=False))


@dataclass(frozen=True)
class _Cells:
    """Reader of pairs of a cell and its label; samples stay as they are.

    Args:
        feature: feature of an image column that opens cells of bytes and paths; None: a cell is an image or a path.
        labels: class names of the data set.
        white: white level of the column, if it is known.
    """

    feature: datasets.Image | None = None
    labels: tuple[str, ...] = ()
    white: int | None = None

    def __call__(self, key: Sample | tuple[Any, Any]) -> Sample:
        if isinstance(key, Sample):
            return key
        cell, number = key
        is_label = isinstance(number, int) and 0 <= number < len(self.labels)
        sample = Sample(_path(cell), self.labels[number] if is_label else None)
        try:
            return sample._replace(image=read_image(self._opened(cell), self.white))
        except (TypeError, ValueError) as error:
            return sample._replace(error=error)

    def _opened(self, cell: Any) -> Any:
        if self.feature is None or not isinstance(cell, Mapping):
            return cell
        try:
            return self.feature.decode_example(dict(cell))
        except Exception as error:
            raise unreadable(error) from error

    def keys(self, cells: Iterable[tuple[Any, Any]]) -> Iterator[Any]:
        """Yield pairs for files, and samples for images in memory, which are read here.

        So only paths, bytes and RGB images are sent from process to process.
        """
        for pair in cells:
            yield self(pair) if isinstance(pair[0], Image.Image | np.ndarray) else pair


@dataclass(frozen=True)
class _Rows:
    """Reader of a data set's rows by their numbers."""

    dataset: datasets.Dataset
    image_column: str
    cells: _Cells

    def __call__(self, number: int) -> Sample:
        try:
            row = self.dataset[number]
            pair = row[self.image_column], row.get(_LABELS)
        except OF_THE_MACHINE:
            raise
        except Exception as error:  # a transform may raise any
            told = f"{type(error).__name__}: {one_line(error)}"
            return Sample(error=ValueError(f"The row gives no image in column {self.image_column!r}: {told}"))
        return self.cells(pair)


def _path(cell: Any) -> str | None:
    """Return the path of the file that a cell is read from, or None."""
    if isinstance(cell, Mapping):
        return None if cell.get("bytes") is not None else cell.get("path")
    return os.fspath(cell) if isinstance(cell, str | os.PathLike) else None
