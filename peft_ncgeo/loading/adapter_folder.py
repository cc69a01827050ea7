"""The folder of an adapter: others read it as a whole, or they refuse it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

_CARD = "README.md"  # PEFT writes into the one that is there


@contextmanager
def writing_adapter(folder: str | Path, leftovers: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a folder to write the files of one or several adapters into, which then take their places in `folder`.

    An adapter is read by nobody without its `adapter_config.json`. This file is taken out of `folder` first and put
    back last, so a stop in between leaves a folder that is refused, and never new weights beside old settings, names
    or prototypes. A stop before leaves `folder` as it was.

    Args:
        leftovers: names of files that an adapter of another kind may have left. They go with the adapter that is
            replaced, where the new one has none of that name; other files stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as temporary:
        part = Path(temporary, "files")  # Trainer reads folders with adapters in them, a level up, as adapters
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
    """Refuse to write an adapter into a model's folder: its tokenizer would be replaced, and the model read with it.

    Raises:
        ValueError: the folder holds a `config.json`.
    """
    if (Path(folder) / "config.json").exists():
        raise ValueError(f"{folder} holds a model (config.json); write the adapter into a folder of its own.")


def weights_digest(folder: Path) -> str:
    """SHA-256 of an adapter's weights, by which files that belong to them know them again."""
    return hashlib.sha256((folder / SAFETENSORS_WEIGHTS_NAME).read_bytes()).hexdigest()
