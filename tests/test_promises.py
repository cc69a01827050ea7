"""README's table of promises: read from a run's report, and not without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .promises import PROMISES, Case, bad_input, counted, find, interruptions, peft_suite, processes, read_tests, table

ROOT = Path(__file__).parents[1]
RUN = """
import pytest

def test_passes(record_property):
    record_property("cases", 3)
    record_property("cases", 4)

class TestOther:
    def test_fails(self):
        assert 0

    @pytest.mark.skip
    def test_skipped(self): ...

    def test_listed(self):
        pytest.xfail("a reason")

@pytest.fixture
def broken():
    raise ValueError

@pytest.mark.parametrize("value", ["a-b"])
def test_error(broken, value): ...
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> list[Case]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "part").mkdir()
    (folder / "part" / "__init__.py").touch()
    (folder / "part" / "test_some.py").write_text(RUN)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=report.xml", "part"]
    subprocess.run(command, cwd=folder, capture_output=True)
    return read_tests(folder / "report.xml")


def test_a_report_is_read(report):
    assert {test.file for test in report} == {"part/test_some.py"}
    assert {test.name: test.outcome for test in report} == {
        "test_passes": "passed",
        "TestOther::test_fails": "failure",
        "TestOther::test_skipped": "skipped",
        "TestOther::test_listed": "not applicable",
        "test_error[a-b]": "error",
    }
    assert report[0].notes == {"cases": [3, 4]}
    assert counted(report) == "1 tests"
    assert bad_input(report) == "7 made-up cases"
    assert peft_suite(report) == "1 pass, 1 cannot apply, each with its reason"


def test_a_promise_without_tests_or_with_one_that_failed_is_no_promise(report):
    with pytest.raises(ValueError, match="failed: part/test_some.py::TestOther::test_fails, .*test_error"):
        find(report, ("part/test_some.py",))
    with pytest.raises(ValueError, match="part/test_so: no tests"):
        find(report, ("part/test_so",))
    assert find(report[:1], ("part",)) == report[:1]


def test_figures():
    name = "test_several_processes_equal_one[{}-{}]"
    several = [Case("", name.format("OT, memory", n), "passed", {"difference": [1e-7, n * 1e-6]}) for n in (2, 3)]
    assert processes(several) == "1 trainings; gradients differ by 3e-06 of their largest entry at most"
    killed = [Case("", "", "passed", {"kills": [25], "half written": [n]}) for n in (2, 3)]
    assert interruptions(killed) == "50 kills, 5 of them with a checkpoint half written; equal to the last bit"


def test_every_promise_has_its_row():
    places = [place for promise in PROMISES for place in promise.held_by]
    assert all((ROOT / place).exists() for place in places)
    notes = {"difference": [0.0], "kills": [1], "half written": [0], "cases": [5]}
    tests = [Case(place, "test_several_processes_equal_one[a-2]", "passed", notes) for place in places]
    rows = table(tests, 97.25, 1.081).splitlines()
    assert len(rows) == 2 + len(PROMISES) + 2
    assert rows[-2].endswith(f"| {len(tests)} tests, 97.2 % of lines and branches |")
    assert rows[-1].endswith("| 1.08 of their import time |")
    assert table(tests, 97.25, 1.081) != table(tests, 98.0, 1.081)
