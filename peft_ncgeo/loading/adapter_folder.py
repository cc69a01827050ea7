"""Writing of adapter folders, such that an interruption never leaves a mixture of two adapters."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

_CARD = "README.md"  # PEFT adds to a card that exists


@contextmanager
def writing_adapter(folder: str | Path, leftovers: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder for the files of one or several adapters, and move them into `folder` at the end.

    An adapter without `adapter_config.json` cannot be loaded. This file is removed from `folder` first and written
    last. So an interruption in between leaves a folder that cannot be loaded, but never new weights beside old
    settings, names or prototypes. An interruption before that leaves `folder` unchanged.

    Args:
        leftovers: names of files that an adapter of another kind may have left. They are removed with the adapter
            that is replaced, unless the new one has a file of that name; other files stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as temporary:
        part = Path(temporary, "files")  # deeper than the subfolders that Trainer takes for adapters
        part.mkdir()
        if (folder / _CARD).is_file():
            shutil.copyfile(folder / _CARD, part / _CARD)
        yield part
        new = [path.relative_to(part) for path in part.rglob("*") if path.is_file()]
        configs = [path for path in new if path.name == CONFIG_NAME]
        outdated = [file for path in configs for file in _outdated(folder / path.parent, leftovers)]
        for path in configs:
            (folder / path).unlink(missing_ok=True)
        for file in outdated:
            file.unlink(missing_ok=True)
        for path in [*(path for path in new if path not in configs), *configs]:
            (folder / path).parent.mkdir(exist_ok=True)
            (part / path).replace(folder / path)


def _outdated(place: Path, leftovers: Iterable[str]) -> list[Path]:
    replaced = any((place / name).exists() for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
    return [place / name for name in leftovers] if replaced else []


def refuse_model_folder(folder: str | Path) -> None:
    """Raise an error if a folder holds a model: an adapter written into it would replace the model's tokenizer.

    Raises:
        ValueError: the folder holds a `config.json`.
    """
    if (Path(folder) / "config.json").exists():
        raise ValueError(f"{folder} holds a model (config.json); write the adapter into a folder of its own.")


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's weights; other files store it to show that they belong to these weights."""
    return hashlib.sha256((folder / SAFETENSORS_WEIGHTS_NAME).read_bytes()).hexdigest()
