"""Image files of a folder: `<class>/<image>`, or the same in folders train, validation and test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..validation import short_repr

_SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
_METADATA = ImageFolder.METADATA_FILENAMES
_SUFFIXES = frozenset(ImageFolder.EXTENSIONS)


def list_folder(folder: Path) -> dict[str, tuple[list[str], list[str] | None]]:
    """Return the image files of each split, sorted, and the names of their folders; None if there are no classes.

    Folders directly in `folder` are splits if their whole name is train, validation (val, valid, dev) or test. All
    other folders are classes, also one that is called "bullet train". Hidden files and folders are left out.

    Returns:
        split -> (paths, class of each). If no folder is a split, there is one split, "train".

    Raises:
        ValueError: splits and classes are side by side, images are at several depths, or a class has no images.
    """
    inside = _folders(folder)
    splits = [path for path in inside if path.name.lower() in _SPLITS]
    if not splits:
        return {"train": _list_split(folder)}
    strange = [path.name for path in inside if path not in splits] + [path.name for path in _images(folder)]
    if strange:
        raise ValueError(
            f"Folder {folder} holds {short_repr(strange[0])} beside the split {short_repr(splits[0].name)}; put the "
            "classes into the folders of the splits, or rename a class that is named like a split."
        )
    found: dict[str, tuple[list[str], list[str] | None]] = {}
    for path in splits:
        split = _SPLITS[path.name.lower()]
        if split in found:
            raise ValueError(f"Folder {folder} has two folders of the split {split!r}; put their images together.")
        found[split] = _list_split(path)
    order = list(dict.fromkeys(_SPLITS.values()))
    return {split: found[split] for split in order if split in found}


def _list_split(folder: Path) -> tuple[list[str], list[str] | None]:
    classes, direct = _folders(folder), list(_images(folder))
    for name in _METADATA:
        if (folder / name).is_file():
            raise ValueError(
                f"Folder {folder} holds {name}, which describes its images; pass that file with "
                "image_column='file_name' if it is a CSV, else what load_dataset('imagefolder', data_dir=...) returns."
            )
    if direct and classes:
        raise ValueError(
            f"Folder {folder} holds images, such as {short_repr(direct[0].name)}, beside folders, such as "
            f"{short_repr(classes[0].name)}; give each class a folder of its own, or leave folders out."
        )
    if not direct and not classes:
        raise ValueError(f"Folder {folder} holds no images; known endings are {_some_suffixes()}.")
    if direct:
        return [str(path) for path in direct], None
    paths: list[str] = []
    labels: list[str] = []
    for of_class in classes:
        found, deeper = list(_images(of_class)), _folders(of_class)
        if deeper:
            raise ValueError(
                f"Folder {of_class} of one class holds the folder {short_repr(deeper[0].name)}; put the images "
                "directly into the folders of the classes."
            )
        if not found:
            raise ValueError(
                f"Folder {of_class} holds no images; add some with a known ending ({_some_suffixes()}), or remove it."
            )
        paths += map(str, found)
        labels += [of_class.name] * len(found)
    return paths, labels


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _images(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file():
            yield path


def _some_suffixes() -> str:
    return "{}, ...".format(", ".join(s for s in (".jpg", ".jpeg", ".png", ".webp", ".tif") if s in _SUFFIXES))
