"""Data sets described by a small YAML file: origin, columns, and class names for prompts."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, load_dataset

from ..files import read_text, read_yaml
from ..models.templates import check_template
from ..validation import check_int, one_line, short_repr
from .class_prompts import is_number
from .classes import select_classes
from .image_folder import list_folder
from .long_tails import imbalance

_WORDS = ("first_synonym", "split_camel_case")


@dataclass(frozen=True)
class DatasetSource:
    """Description of a labelled image set of the Hub, as in the files of `examples/datasets`.

    Args:
        path, name, revision: arguments of `datasets.load_dataset`.
        train_split, test_split: names of the splits; None if the set has no such split.
        image_column, label_column: names of the columns.
        template: text around a class name, for zero-shot CLIP.
        class_names: name in the data -> name in the prompt (None removes the class); or "first_synonym", the part
            before the first comma (the second part, if two classes have the same first one), or "split_camel_case", a
            space before each capital; or a file that ends in .txt, with a line "<name in the data> <name in the
            prompt>" for each class, in the order of the labels. This order decides if the data have numbers from 0
            on, or other names that are not sorted; other sorted names are an error.
        num_classes: number of classes of the prepared set.
        shots: training images per class; None for test sets and tails.
        imbalance_factor, n_max: settings of the published tail, see [`long_tailed`].
    """

    path: str
    num_classes: int
    name: str | None = None
    revision: str | None = None
    train_split: str | None = "train"
    test_split: str | None = "test"
    image_column: str = "image"
    label_column: str = "label"
    template: str = "a photo of a {}."
    class_names: dict[str, str | None] | str | None = None
    shots: int | None = 16
    imbalance_factor: float | None = None
    n_max: int | None = None

    @classmethod
    def read(cls, path: str | Path) -> DatasetSource:
        """Read the description from a YAML file.

        Raises:
            ValueError: the file cannot be read or has a wrong key or value.
        """
        content = read_yaml(path, "Data set")
        if not isinstance(content, dict):
            raise ValueError(f"Data set {path} must hold keys such as path and num_classes.")
        unknown = set(content) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"Data set {path} has the unknown key {short_repr(sorted(unknown, key=str)[0])}.")
        missing = {"path", "num_classes"} - set(content)
        if missing:
            raise ValueError(f"Data set {path} lacks {', '.join(sorted(missing))}.")
        if _is_file(content.get("class_names")):  # beside the description
            content["class_names"] = str(Path(path).parent / content["class_names"])
        try:
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Data set {path}: {error}") from error

    def __post_init__(self) -> None:
        for name in ("path", "image_column", "label_column"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}={short_repr(getattr(self, name))} must be a name.")
        for name in ("name", "revision", "train_split", "test_split"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={short_repr(getattr(self, name))} must be a name, or null.")
        if self.image_column == self.label_column:
            raise ValueError(
                f"image_column and label_column are both {short_repr(self.image_column)}; name two columns."
            )
        check_int("num_classes", self.num_classes, least=1)
        for name in ("shots", "n_max"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least=1)
        if self.imbalance_factor is not None:
            imbalance("imbalance_factor", self.imbalance_factor)
        check_template(self.template)
        fixes = self.class_names
        pairs = fixes.items() if isinstance(fixes, dict) else ()
        if not (fixes is None or isinstance(fixes, dict) or fixes in _WORDS or _is_file(fixes)):
            raise ValueError(
                f"class_names={short_repr(fixes)} must be a mapping, {_WORDS[0]}, {_WORDS[1]} or a file names.txt."
            )
        for old, new in pairs:
            if not isinstance(old, str) or not isinstance(new, str | None):
                raise ValueError(
                    f"class_names has {short_repr(old)}: {short_repr(new)}, which must be strings; quote numbers."
                )

    def load(self, part: str, folder: str | Path | None = None) -> Dataset:
        """Load the "train" or "test" part with the columns `image` and `label`, with the prompts' class names.

        Args:
            part: "train" or "test".
            folder: a local copy to load instead of the Hub's: an image folder `train/<class>/`, `test/<class>/`, with
                class names as in the description or on the Hub.

        Raises:
            ValueError: the set has no such part, or its classes differ from the description.
        """
        if part not in ("train", "test"):
            raise ValueError(f"part={short_repr(part)} must be 'train' or 'test'.")
        split = self.train_split if part == "train" else self.test_split
        if split is None:
            raise ValueError(f"{self.path} has no split to {part} on.")
        if folder is None:
            return self.prepare(load_dataset(self.path, self.name, split=split, revision=self.revision))
        dataset = _read_part(Path(folder), part)
        fixes = self.class_names
        if isinstance(fixes, dict):  # a copy may already have the prompts' names, and lack removed classes
            fixes = {old: new for old, new in fixes.items() if old in dataset.features["label"].names}
        return replace(self, image_column="image", label_column="label", class_names=fixes).prepare(dataset)

    def prepare(self, dataset: Dataset) -> Dataset:
        """Convert columns and class names to the form that [`DatasetSource.load`] returns.

        Raises:
            TypeError: `dataset` is not a `datasets.Dataset`.
            ValueError: a column is missing or is not of images or classes, or the classes differ from the description.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(f"Expected a datasets.Dataset, got {type(dataset).__name__}.")
        for column in (self.image_column, self.label_column):
            if column not in dataset.column_names:
                raise ValueError(f"{self.path} has no column {column!r} among {short_repr(dataset.column_names)}.")
        dataset = dataset.select_columns([self.image_column, self.label_column])
        try:
            dataset = dataset.rename_columns({self.image_column: "image", self.label_column: "label"})
            if not isinstance(dataset.features["image"], Image) or not dataset.features["image"].decode:
                dataset = dataset.cast_column("image", Image())
            told = isinstance(dataset.features["label"], ClassLabel)
            if not told:
                dataset = dataset.class_encode_column("label")
        except Exception as error:  # pyarrow's, for columns of other types
            columns = f"{self.image_column!r} and {self.label_column!r}"
            raise ValueError(
                f"{self.path}: columns {columns} are not images and classes ({one_line(error)})."
            ) from error
        labels = dataset.features["label"].names
        names = self.prompt_names(labels)
        nameless = [label for label, name in zip(labels, names, strict=True) if label == name and is_number(label)]
        if nameless and not told:
            raise ValueError(
                f"{self.path} gives class {nameless[0]} no name; give names to the classes in class_names."
            )
        kept = [i for i, name in enumerate(names) if name is not None]
        if len(kept) != self.num_classes:
            raise ValueError(f"{self.path} has {len(kept)} classes, but the description says {self.num_classes}.")
        if len(kept) < len(names):
            dataset = select_classes(dataset, [labels[i] for i in kept])
        chosen = [name for name in names if name is not None]
        wordnet = [name for name in chosen if re.fullmatch(r"n\d{8}", name)]
        if wordnet:
            raise ValueError(f"{self.path} calls a class {wordnet[0]}, a WordNet number; give names to its classes.")
        twice = [name for name, count in Counter(chosen).items() if count > 1]
        if twice:
            raise ValueError(
                f"{self.path} would have two classes named {short_repr(twice[0])}; give them different names."
            )
        return dataset.cast_column("label", ClassLabel(names=chosen))

    def prompt_names(self, names: list[str]) -> list[str | None]:
        """Return the name of each class in the prompt, or None for a class to remove.

        Raises:
            ValueError: `class_names` names a class that the data do not have, or lists other classes.
        """
        if self.class_names == "split_camel_case":
            return [re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name) for name in names]
        if self.class_names == "first_synonym":
            return list(_first_synonyms(names))
        if isinstance(self.class_names, str):
            return list(_listed(self.class_names, names))
        fixes: dict[str, Any] = self.class_names or {}
        known = set(names)
        strange = [name for name in fixes if name not in known]
        if strange:
            raise ValueError(f"{self.path} has no class {short_repr(strange[0])} to rename.")
        return [fixes.get(name, name) for name in names]


def _read_part(folder: Path, part: str) -> Dataset:
    """Return a part of an image folder, whose classes are the folders of all parts, sorted."""
    parts = list_folder(folder)
    paths, labels = parts.get(part, ([], None))
    if labels is None:
        raise ValueError(
            f"Folder {folder} must hold {part}/<class>/<image>, but its parts are {sorted(parts)}, and {part!r} is "
            "missing or has no folders of classes; add them."
        )
    label = ClassLabel(names=sorted({name for _, names in parts.values() for name in names or ()}))
    rows = {"image": paths, "label": label.str2int(labels)}
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": label}))


def _first_synonyms(names: list[str]) -> list[str]:
    """Return the part before the first comma of each name, or the second part if the first is not unique."""
    synonyms = [[part.strip() for part in name.split(",")] for name in names]
    count = Counter(parts[0].lower() for parts in synonyms)
    return [parts[1] if count[parts[0].lower()] > 1 and len(parts) > 1 else parts[0] for parts in synonyms]


def _is_file(class_names: object) -> bool:
    return isinstance(class_names, str) and class_names.endswith(".txt")


def _listed(path: str, names: list[str]) -> list[str]:
    """Return the names in the prompt from a file with a line `<name in the data> <name in the prompt>` per class."""
    try:
        lines = [line.split(maxsplit=1) for line in read_text(path).splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"Class names {path} cannot be read ({one_line(error)}).") from error
    listed = {line[0]: line[1] for line in lines if len(line) == 2}
    if len(listed) < len(lines):
        raise ValueError(f"Class names {path} must have one line '<name in the data> <name in the prompt>' per class.")
    words = list(listed.values())
    if set(names) <= set(listed):
        return [listed[name] for name in names]
    if set(names) <= set(words):  # a copy that has the prompts' names
        return names
    if sorted(names) == sorted(map(str, range(len(words)))):
        return [words[int(name)] for name in names]
    if len(names) == len(words) and names != sorted(names):  # sorted names are in an order of their own
        return words
    strange = next(name for name in names if name not in listed)
    raise ValueError(
        f"Class names {path} do not list class {short_repr(strange)}; name it as the file's first words do."
    )
