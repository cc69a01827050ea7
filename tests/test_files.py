"""Two runs that write one output folder."""

from __future__ import annotations

import json
import multiprocessing
import resource
import time

import pytest

from peft_ncgeo.files import write_whole
from peft_ncgeo.protocols import EpisodeResults, Results
from peft_ncgeo.protocols.cached_runs import read_cell, write_cell


def write_all(folder, name, other):
    """Write and read every kind of file, while another process does the same."""
    (folder / name).touch()
    while not (folder / other).exists():  # both at once
        time.sleep(0.01)
    rows = [{"setting": "s", "method": "m" * 500, "seed": i, "H": float(name)} for i in range(60)]
    episodes = [{"domain": "d", "method": name, "episode": i, "accuracy": 1.0} for i in range(60)]
    for _ in range(150):
        write_cell(folder / "cell" / "seed-1.json", "same", {"rows": rows})
        found = read_cell(folder / "cell" / "seed-1.json", "same")["rows"]
        assert len(found) == 60
        assert len({row["H"] for row in found}) == 1
        Results(rows, ["H"]).save(folder / "table")
        EpisodeResults(episodes, ["d"], [name]).save(folder / "episodes")
        assert len({row["method"] for row in EpisodeResults.load(folder / "episodes" / "results.json").rows}) == 1


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_two_processes_leave_whole_files(tmp_path):
    start = multiprocessing.get_context("fork").Process  # imports nothing once more
    writers = [start(target=write_all, args=(tmp_path, *pair)) for pair in ("12", "21")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    table = json.loads((tmp_path / "table" / "results.json").read_text())
    assert len({row["H"] for row in table["rows"]}) == 1
    assert len((tmp_path / "table" / "results.csv").read_text().splitlines()) == 61
    assert not list(tmp_path.rglob("*.part"))


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    write_whole(tmp_path / "new" / "file.json", "before")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "new" / "file.json", "half of it \ud800")
    assert [(path.name, path.read_text()) for path in (tmp_path / "new").iterdir()] == [("file.json", "before")]


def write_where_nothing_fits(folder):
    """Write every kind of file larger than this process may."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    rows = [{"setting": "s", "method": "m", "seed": i, "H": 2.0} for i in range(60)]
    for write in (
        lambda: write_cell(folder / "cell.json", "new", {"rows": rows}),
        lambda: Results(rows, ["H"]).save(folder / "table"),
        lambda: EpisodeResults([{"domain": "d", "method": "m", "episode": 0}] * 60, ["d"], ["m"]).save(folder / "few"),
    ):
        with pytest.raises(OSError, match="File too large"):
            write()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_full_disk_leaves_the_files_before(tmp_path):
    rows = [{"setting": "s", "method": "m", "seed": 1, "H": 1.0}]
    write_cell(tmp_path / "cell.json", "old", {"H": 1.0})
    Results(rows, ["H"]).save(tmp_path / "table")
    EpisodeResults([{"domain": "d", "method": "m", "episode": 0}], ["d"], ["m"]).save(tmp_path / "few")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert len(before) == 5
    writer = multiprocessing.get_context("fork").Process(target=write_where_nothing_fits, args=(tmp_path,))
    writer.start()
    writer.join(60)
    assert writer.exitcode == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_a_table_that_cannot_be_made_leaves_all_files_before(tmp_path):
    rows = [{"setting": "s", "method": "m", "seed": seed, "H": 1.0} for seed in (1, 2)]
    Results(rows, ["H"]).save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        Results([*rows, {**rows[0], "H": "text"}], ["H"]).save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
