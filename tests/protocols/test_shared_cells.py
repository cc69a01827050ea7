"""Cells that several processes fill together: each is computed once, and a killed process holds up nobody."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from peft_ncgeo.protocols import Task, run_cells
from peft_ncgeo.protocols.shared_cells import Cell, fill_cells
from peft_ncgeo.training import Recipe

from ..conftest import tiny_clip, tiny_images, tiny_processor
from ..launching import context, launch

COUNT = 4


def wait_for(*paths: Path) -> None:
    for _ in range(600):
        if all(path.exists() for path in paths):
            return
        time.sleep(0.05)
    raise TimeoutError(f"none of {paths} came")


def cell_file(folder: Path, number: int) -> Path:
    return folder / "cells" / f"{number}.json"


def compute(folder: Path, number: int) -> dict[str, Any]:
    """The first cell is held until the others are there, so another process must compute them."""
    with (folder / "computed").open("a") as file:
        file.write(f"{number} {os.getpid()}\n")
    if number == 0:
        wait_for(*(cell_file(folder, other) for other in range(1, COUNT)))
    return {"square": number**2}


def fill(folder: Path, compute=compute) -> None:
    cells = [Cell(cell_file(folder, i), "same", str(i), partial(compute, folder, i)) for i in range(COUNT)]
    (folder / f"rows-{os.getpid()}").write_text(json.dumps(fill_cells(cells)))


def killed_at_the_second(folder: Path, number: int) -> dict[str, Any]:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"square": number**2}


def held_for_ever(folder: Path, number: int) -> dict[str, Any]:
    (folder / "held").touch()
    wait_for(folder / "never")
    return {}


def computed(folder: Path, number: int) -> dict[str, Any]:
    return {"square": number**2}


def started(function, *args) -> Any:
    child = context.Process(target=function, args=args)
    child.start()
    return child


def test_two_processes_compute_each_cell_once(tmp_path):
    children = [started(fill, tmp_path) for _ in range(2)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    done = [line.split() for line in (tmp_path / "computed").read_text().splitlines()]
    assert sorted(number for number, _ in done) == ["0", "1", "2", "3"]
    assert len({process for _, process in done}) == 2
    rows = [json.loads(path.read_text()) for path in tmp_path.glob("rows-*")]
    assert rows == [[{"square": i**2} for i in range(COUNT)]] * 2


def test_a_killed_process_holds_up_nobody(tmp_path):
    assert launch(fill, tmp_path, killed_at_the_second) == [-signal.SIGKILL]
    assert [path.name for path in sorted((tmp_path / "cells").glob("*.json"))] == ["0.json"]
    fill(tmp_path, computed)
    cell_file(tmp_path, 0).unlink()
    holder = started(fill, tmp_path, held_for_ever)
    wait_for(tmp_path / "held")
    waiting = started(fill, tmp_path, computed)  # while another process holds the only missing cell
    wait_for(cell_file(tmp_path, 0).with_suffix(".lock"))
    holder.kill()
    waiting.join()
    assert waiting.exitcode == 0
    assert json.loads((tmp_path / f"rows-{waiting.pid}").read_text()) == [{"square": i**2} for i in range(COUNT)]


RECIPES = [
    Recipe("zero-shot"),
    Recipe.from_dict("coop", {"peft": {"NPTConfig.coop": {"num_text_tokens": 4}}, "args": {"max_steps": 1}}),
]


def table(folder: Path) -> list[dict[str, Any]]:
    settings = {name: lambda seed: Task(tiny_images(10, seed=seed), {"test": tiny_images(10)}) for name in ("a", "b")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rows = run_cells(RECIPES, settings, tiny_clip, tiny_processor(), folder, (1, 2))
    (folder / f"rows-{os.getpid()}").write_text(json.dumps(rows))
    return rows


@pytest.mark.slow
def test_two_processes_return_the_rows_of_one(tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    alone.mkdir()
    children = [started(table, together) for _ in range(2)]
    expected = table(alone)
    for child in children:
        child.join()
    rows = [json.loads(path.read_text()) for path in together.glob("rows-*")]
    assert len(rows) == 2
    assert rows[0] == rows[1]
    for ours, theirs in zip(rows[0], expected, strict=True):
        changing = ("seconds", "cpu_seconds")
        assert {k: v for k, v in ours.items() if k not in changing} == pytest.approx(
            {k: v for k, v in theirs.items() if k not in changing}
        )
