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

_PAUSE = 1.0  # seconds between two checks of cells that other processes compute


@dataclass
class Cell:
    """One cell of a table.

    Attributes:
        path: its file.
        made_of: fingerprint of everything that its metrics depend on.
        title: its name on the progress bar.
        compute: function that computes its metrics.
    """

    path: Path
    made_of: str
    title: str
    compute: Callable[[], dict[str, Any]]


def fill_cells(cells: Sequence[Cell], unit: str = "cell") -> list[dict[str, Any]]:
    """Return the metrics of all cells in order; compute and write those that have no file.

    Other processes may work in the same folder. A process locks the file `.lock` beside a cell while it computes the
    cell. Cells that another process has locked come last; then this process waits for them. Under `accelerate launch`
    the first process locks and reads for all processes of the launch.

    The operating system keeps the locks. When a process ends, for any reason, its locks are free; the `.lock` files
    remain and do no harm. On a network folder, locks work if the server supports `flock` between machines; with NFS 4,
    the locks of a machine that crashed are free when its lease ends. If a lock fails, two processes compute the same
    cell, and each writes the whole file.

    Raises:
        ValueError: a cell's file has another fingerprint, or is damaged.
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
            if not found.keys() & set(missing):  # other processes compute all the rest
                bar.set_description(f"{cells[missing[0]].title}: waiting for another process")
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
        lock.release()  # does nothing if this process does not hold it
