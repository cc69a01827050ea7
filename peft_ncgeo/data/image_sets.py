"""Labelled images from folders, the Hub, tables and lists, as data sets of the same form."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, load_dataset, load_from_disk

from ..validation import one_line, short_repr
from .class_prompts import list_names
from .classes import replace_labels
from .image_folder import list_folder

_NUMBER = re.compile(r"[+-]?\d+")
_TABLES = {".csv": ",", ".tsv": "\t"}


def load_images(
    source: Any,
    split: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    class_names: Sequence[str] | None = None,
    labels: Sequence[str | int | None] | None = None,
) -> Dataset | DatasetDict:
    """Load images, and their classes if they have any, from a folder, table, list or data set.

    Args:
        source: a folder `<class>/<image>`, `<split>/<class>/<image>`, or of images alone; a CSV or TSV file or a
            `pandas.DataFrame` with a column of paths (those in a file are relative to its folder); a list of paths; a
            data set of the Hub, or one written by `save_to_disk`; a `Dataset` or `DatasetDict`.
        split: name of one split; None: all of them.
        image_column: column that holds images or paths. Images of a folder or a list get a column of this name.
        label_column: column that holds names of classes, or numbers; None: no labels are read.
        class_names: names of the classes in the order of their labels. They are needed if the column holds numbers 0,
            1, ..., which are never used as names. Default: the sorted names of the training split.
        labels: class of each path in a list of paths, a name or a number.

    Returns:
        A `Dataset`, or a `DatasetDict` if there are several splits and `split` is None. It has only two columns:
        images of type `datasets.Image`, read when they are used, and a `ClassLabel`, the same in all splits. Without
        labels there is no second column; a column of lists, of a multi-label set, stays as it is.

    Raises:
        TypeError, ValueError: a file, column or split is missing, a class is in another split but not in training, or
            labels are numbers without names or mixed with names. The message names the thing and says what to do.
    """
    if labels is not None and (isinstance(source, str | Path | pd.DataFrame) or not _is_list(source)):
        raise ValueError("labels belong to a list of paths; for other sources, name the column in label_column.")
    if labels is not None and label_column is None:
        raise ValueError("labels are given, but label_column=None leaves them out; leave out one of the two.")
    if label_column == image_column:
        raise ValueError(f"image_column and label_column are both {short_repr(image_column)}; name two columns.")
    parts = _read(source, image_column, label_column, labels)
    columns = _columns(parts, image_column, label_column)
    parts = {part: _with_images(rows.select_columns(columns), image_column) for part, rows in parts.items()}
    if label_column in columns and label_column is not None:
        parts = _with_classes(parts, label_column, class_names)
    elif class_names is not None:
        raise ValueError("class_names are given, but the images have no labels; leave the names out.")
    if split is not None:
        if split not in parts or (len(parts) == 1 and "" in parts):
            there = f"there are {sorted(parts)}" if "" not in parts else "this source has none; leave split out"
            raise ValueError(f"No split is named {short_repr(split)}; {there}.")
        return parts[split]
    _check_same_classes(parts, label_column)
    return next(iter(parts.values())) if len(parts) == 1 else DatasetDict(parts)


def _columns(parts: dict[str, Dataset], image_column: str, label_column: str | None) -> list[str]:
    """Return the columns to keep, which every split must have: images, and labels if they are read."""
    labelled = label_column is not None and any(label_column in rows.column_names for rows in parts.values())
    columns = [image_column, str(label_column)] if labelled else [image_column]
    for part, rows in parts.items():
        among = f"among {short_repr(rows.column_names)}{f' of the split {part!r}' if part else ''}"
        for column, argument in zip(columns, ("image_column", "label_column"), strict=False):
            if column not in rows.column_names:
                raise ValueError(f"No column {column!r} {among}; name it in {argument}.")
        if not labelled and label_column is not None and len(rows.column_names) > 1:
            raise ValueError(
                f"No column {label_column!r} {among}; name it in label_column, or pass label_column=None for images "
                "without labels."
            )
    return columns


def _read(source: Any, image_column: str, label_column: str | None, labels: Any) -> dict[str, Dataset]:
    """Return each split as it is, with a column of images or paths; a single split without a name is called ""."""
    if isinstance(source, Dataset):
        return {"": source}
    if isinstance(source, DatasetDict):
        return {str(part): rows for part, rows in source.items()}
    if isinstance(source, pd.DataFrame):
        return {"": _from_table(source, image_column, label_column, Path())}
    if isinstance(source, str | Path):
        return _read_named(source, image_column, label_column)
    if isinstance(source, IterableDataset) or not _is_list(source):
        advice = "; pass a stream to GeometryTrainer directly" if isinstance(source, IterableDataset) else ""
        raise TypeError(
            "source must be a folder, a CSV file, a data set of the Hub, a DataFrame, a list of paths, a Dataset or a "
            f"DatasetDict, got {type(source).__name__}{advice}."
        )
    paths = list(source)
    if labels is not None and len(labels) != len(paths):
        raise ValueError(f"There are {len(paths)} paths and {len(labels)} labels; give each path one label.")
    table = {image_column: paths, **({} if labels is None else {label_column or "label": list(labels)})}
    return {"": _from_table(pd.DataFrame(table, dtype=object), image_column, label_column, Path())}


def _read_named(source: str | Path, image_column: str, label_column: str | None) -> dict[str, Dataset]:
    path = Path(source).expanduser()
    if path.suffix.lower() in _TABLES and path.is_file():
        return {"": _from_table(_read_csv(path), image_column, label_column, path.parent)}
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _read(load_from_disk(str(path)), image_column, label_column, None)
        return {
            part: Dataset.from_dict(
                {image_column: paths, **({} if labels is None else {label_column or "label": labels})}
            )
            for part, (paths, labels) in list_folder(path).items()
        }
    if isinstance(source, Path) or path.exists() or path.suffix.lower() in _TABLES or source[:1] in (".", "/", "~"):
        kind = "is neither a folder nor a CSV file" if path.exists() else "does not exist"
        raise ValueError(f"{short_repr(str(source))} {kind}; pass the path of a folder of images or of a CSV file.")
    try:
        return _read(load_dataset(source), image_column, label_column, None)
    except Exception as error:  # of the network, the Hub, and each format of files
        raise ValueError(
            f"{short_repr(source)} is not a folder or CSV file here, and cannot be loaded from the Hub "
            f"({one_line(error)}); correct the name, or pass what datasets.load_dataset returns."
        ) from error


def _read_csv(path: Path) -> pd.DataFrame:
    try:  # a class may be called "NA"; Excel begins files with a mark
        return pd.read_csv(
            path, sep=_TABLES[path.suffix.lower()], dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a table ({one_line(error)}); read the file yourself and pass a DataFrame."
        ) from error


def _from_table(table: pd.DataFrame, image_column: str, label_column: str | None, folder: Path) -> Dataset:
    """Return the columns of paths and labels of a table; join relative paths to `folder`."""
    names = [str(name) for name in table.columns]
    if image_column not in names or (label_column is not None and label_column not in names and len(names) > 1):
        return Dataset.from_dict({name: [] for name in names})  # the caller says which column is missing
    paths = [_whole_path(path, folder, row) for row, path in enumerate(table[image_column].tolist())]
    _check_files(paths)
    columns: dict[str, list[Any]] = {image_column: paths}
    if label_column in names:
        columns[label_column] = _plain_labels(table[label_column].tolist(), str(label_column))
    return Dataset.from_dict(columns)


def _whole_path(path: Any, folder: Path, row: int) -> str:
    if not isinstance(path, str | Path) or not str(path).strip():
        raise ValueError(
            f"Row {row} holds {short_repr(path)} where the path of an image was expected; remove the row."
        )
    text = str(path).strip()
    return text if "://" in text else str(folder / Path(text).expanduser())


def _check_files(paths: Sequence[str]) -> None:
    missing = [(row, path) for row, path in enumerate(paths) if "://" not in path and not os.path.isfile(path)]
    if missing:
        row, path = missing[0]
        raise ValueError(
            f"Row {row}: there is no file {short_repr(path)} ({len(missing)} of {len(paths)} are missing). Paths in a "
            "CSV file are relative to its folder, others to the working folder; correct them."
        )


def _plain_labels(labels: Iterable[Any], column: str) -> list[str | None]:
    """Return labels as text, numbers too, and None for missing labels."""
    found: list[str | None] = []
    for row, label in enumerate(labels):
        if label is None or label is pd.NA or label != label or (isinstance(label, str) and not label.strip()):
            found.append(None)
        elif isinstance(label, str):
            found.append(label.strip())
        elif isinstance(label, bool) or not hasattr(label, "__int__") or int(label) != label:
            raise ValueError(
                f"Row {row} of column {column!r} holds {short_repr(label)}; expected a class's name or number."
            )
        else:
            found.append(str(int(label)))
    return found


def _with_images(rows: Dataset, column: str) -> Dataset:
    """Return the set with the column as type `Image`; the column may hold paths."""
    feature = rows.features[column]
    if isinstance(feature, Image):
        return rows if feature.decode else rows.cast_column(column, Image())
    if getattr(feature, "dtype", "") not in ("string", "large_string"):
        raise ValueError(f"Column {column!r} is {short_repr(feature)}; expected images or paths of images.")
    _check_files(rows.with_format(None)[column][:])
    return rows.cast_column(column, Image())


def _with_classes(parts: dict[str, Dataset], column: str, given: Sequence[str] | None) -> dict[str, Dataset]:
    """Return the splits with the same `ClassLabel` for all."""
    features = [rows.features[column] for rows in parts.values()]
    if any(isinstance(feature, list) or hasattr(feature, "feature") for feature in features):
        return parts
    if all(isinstance(feature, ClassLabel) for feature in features):
        names = features[0].names
        if any(feature.names != names for feature in features):
            raise ValueError(
                f"The splits have different classes in column {column!r}; give all the same ones in one order with "
                "dataset.align_labels_with_mapping."
            )
        if given is not None and list_names(given) != names:
            raise ValueError(
                f"class_names={short_repr(list(given))} are not those of column {column!r}, {short_repr(names)}; "
                "leave them out, and change names with rename_classes."
            )
        return parts
    labels = {part: _plain_labels(rows.with_format(None)[column][:], column) for part, rows in parts.items()}
    told = sorted({label for values in labels.values() for label in values if label is not None})
    numbers = [label for label in told if _NUMBER.fullmatch(label)]
    names = None if given is None else list_names(given)
    as_names = not numbers or (names is not None and set(told) <= set(names))
    if not told:
        raise ValueError(f"Column {column!r} holds no labels; pass label_column=None for images without labels.")
    if not as_names and len(numbers) < len(told):
        name = next(label for label in told if label not in numbers)
        raise ValueError(
            f"Column {column!r} holds the number {numbers[0]} and the name {short_repr(name)}; give all classes "
            "names, or list all that occur in class_names."
        )
    if not as_names and names is None:
        low, high = min(map(int, numbers)), max(map(int, numbers))
        raise ValueError(
            f"Column {column!r} holds numbers, {low} to {high}; name the classes, in the order of the numbers 0, 1, "
            "...: class_names=[...]."
        )
    if names is None:
        first = labels.get("train", [label for values in labels.values() for label in values])
        names = list_names(sorted({label for label in first if label is not None}))
    number = {name: i for i, name in enumerate(names)} if as_names else {str(i): i for i in range(-1, len(names))}
    done = {}
    for part, rows in parts.items():
        keys = [label if label is None or as_names else str(int(label)) for label in labels[part]]
        strange = [(i, key) for i, key in enumerate(keys) if key is not None and key not in number]
        if strange:
            i, key = strange[0]
            where = f" of the split {part!r}" if part else ""
            what = f"{'Class' if as_names else 'Number'} {short_repr(key)} of row {i}{where}"
            known = "those of training" if given is None else "class_names"
            raise ValueError(
                f"{what} is not among {known}, {short_repr(names)} ({len(strange)} such rows); correct it, or name "
                "all classes in class_names."
            )
        numbered = [None if key is None else number[key] for key in keys]
        done[part] = replace_labels(rows, numbered, names, column)
    return done


def _check_same_classes(parts: dict[str, Dataset], column: str | None) -> None:
    """Raise an error if another split has a class that the training split does not have."""
    train = parts.get("train")
    if column is None or train is None or not isinstance(train.features.get(column), ClassLabel):
        return
    names = train.features[column].names
    trained = set(train.with_format(None).unique(column))
    for part, rows in parts.items():
        strange = sorted(set(rows.with_format(None).unique(column)) - trained - {None, -1}, key=lambda label: label)
        if strange:
            raise ValueError(
                f"Class {short_repr(names[strange[0]])} is in the split {part!r}, but not in 'train' ({len(strange)} "
                f"such classes); add images of it to 'train', or load the splits one by one (split={part!r})."
            )


def _is_list(source: Any) -> bool:
    return isinstance(source, Iterable) and not isinstance(source, str | bytes | dict)
