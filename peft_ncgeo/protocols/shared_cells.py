"""Cells of a table that several processes compute together, each cell once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from .cached_runs import is_main_process, read_cell, write_cell

_PAUSE = 1.0  # seconds between two looks at cells of other processes


@dataclass
class Cell:
    """One cell of a table.

    Attributes:
        path: its file.
        made_of: fingerprint of everything that it is made of.
        title: its name on the progress bar.
        compute: makes its metrics.
    """

    path: Path
    made_of: str
    title: str
    compute: Callable[[], dict[str, Any]]


def fill_cells(cells: Sequence[Cell], unit: str = "cell") -> list[dict[str, Any]]:
    """Return the metrics of all cells in order; compute and write those that have no file.

    Other processes may fill the same folder. A cell is computed under a lock on the file `.lock` beside it; one that
    another process has locked is left until the end, and then waited for. Under `accelerate launch` the first process
    locks and reads for all of a launch.

    The locks are the operating system's: a process that ends, in whatever way, holds none, and the files stay without
    effect. On a network folder they hold as far as its server keeps `flock` for all machines; NFS 4 frees those of a
    machine that died when its lease ends. Should one fail, a cell is computed twice and written whole twice.

    Raises:
        ValueError: a cell that was made of something else, or is damaged.
    """
    found: dict[int, dict[str, Any]] = {}
    with tqdm(total=len(cells), unit=unit, disable=not is_main_process()) as bar:
        while missing := [i for i in range(len(cells)) if i not in found]:
            for i in missing:
                bar.set_description(cells[i].title)
                metrics = _read_or_compute(cells[i])
                if metrics is not None:
                    found[i] = metrics
                    bar.update()
            if not found.keys() & set(missing):  # others hold all that is left
                bar.set_description(f"{cells[missing[0]].title}: another process has it")
                time.sleep(_PAUSE)
    return [found[i] for i in range(len(cells))]


def _read_or_compute(cell: Cell) -> dict[str, Any] | None:
    """Return the cell's metrics, or None while another process computes them."""
    metrics = read_cell(cell.path, cell.made_of)
    if metrics is not None:
        return metrics
    with _locked(cell.path.with_suffix(".lock")) as locked:
        if locked:
            metrics = read_cell(cell.path, cell.made_of)  # another may have written it meanwhile
            return write_cell(cell.path, cell.made_of, cell.compute()) if metrics is None else metrics
    return None


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Lock a file for all processes of a launch; yield False if another launch has locked it."""
    lock, free = FileLock(path), [True]
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            free = [False]
    (locked,) = broadcast_object_list(free)
    try:
        yield locked
    finally:
        lock.release()  # does nothing where it is not held
