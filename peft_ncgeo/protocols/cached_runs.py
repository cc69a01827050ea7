"""Cached runs: one small file for each, with its metrics and the fingerprint of everything that they depend on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import distributed

from ..files import file_name, read_json, write_whole
from ..validation import check_int, one_line

LARGEST = 64 * 2**20  # bytes of a file; a file of episodes has one row for each of them


def is_main_process() -> bool:
    """Return True on the process that writes files, which is the first one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def cell_path(folder: str | Path, setting: str, method: str, seed: int) -> Path:
    """Return `folder/<setting>/<method>/seed-<seed>.json`; see [`~peft_ncgeo.files.file_name`] for the names.

    Raises:
        ValueError: a name that cannot be a folder name.
    """
    names = file_name(setting, "a setting"), file_name(method, "a recipe")
    return Path(folder).joinpath(*names, f"seed-{check_int('seed', seed)}.json")


def check_distinct(paths: Sequence[Path]) -> None:
    """Raise if two cells have the same file.

    Raises:
        ValueError: two cells have the same file, which the error names.
    """
    for path, count in Counter(paths).items():
        if count > 1:
            raise ValueError(f"{count} cells would share {path}; give each cell a different setting, recipe or seed.")


def read_cell(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the metrics in a cell's file, or None if there is no file. The first process reads it for all.

    Raises:
        ValueError: the file has another fingerprint, or is damaged.
    """
    found: list[Any] = [None]
    if is_main_process() and path.exists():
        try:
            found = [_checked(read_json(path, LARGEST))]
        except (OSError, ValueError) as error:
            found = [{"error": str(damaged(path, one_line(error)))}]
    (cell,) = broadcast_object_list(found)
    if cell is None:
        return None
    if "error" in cell:
        raise ValueError(cell["error"])
    if cell["made_of"] != fingerprint:
        raise ValueError(
            f"{path} was made by another recipe, model or data set, with other arguments or by an earlier version; "
            "remove the file or change output_dir."
        )
    return cell["metrics"]


def write_cell(path: Path, fingerprint: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Write a cell's whole file on the first process, and return that process's metrics on every process."""
    if is_main_process():
        write_whole(path, json.dumps({"made_of": fingerprint, "metrics": metrics}, indent=1) + "\n")
    (shared,) = broadcast_object_list([metrics])
    return shared


def damaged(path: Path, why: str) -> ValueError:
    """Return the error for a cell whose content has changed since it was written."""
    return ValueError(f"{path} is damaged; remove it and run again ({why}).")


def _checked(cell: Any) -> dict[str, Any]:
    """Return a cell as [`write_cell`] wrote it; raise for anything else."""
    if not isinstance(cell, dict) or cell.keys() != {"made_of", "metrics"}:
        raise ValueError("it must hold a mapping with the keys 'made_of' and 'metrics'")
    if not isinstance(cell["metrics"], dict):
        raise ValueError("its 'metrics' must be a mapping from names to values")
    return cell
