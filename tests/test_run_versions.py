"""The runs with other versions: what is counted, and the table of them."""

from __future__ import annotations

import json
import platform
import runpy
import sys
from pathlib import Path

import pytest
import transformers

from .run_versions import run_tests

ROOT = Path(__file__).parents[1]
OUTCOMES = """
import pytest
@pytest.fixture
def broken():
    raise ValueError
def test_passes(): ...
def test_passes_too(): ...
def test_fails(): assert 0
def test_is_an_error(broken): ...
@pytest.mark.skip
def test_is_skipped(): ...
"""


def test_outcomes_are_counted(tmp_path):
    file = tmp_path / "test_outcomes.py"
    file.write_text(OUTCOMES)
    result = run_tests(Path(sys.prefix), [str(file)])
    assert (result["passed"], result["skipped"]) == (2, 1)
    assert [name.rpartition(".")[2] for name in result["failed"]] == ["test_fails", "test_is_an_error"]
    assert result["versions"]["python"] == platform.python_version()
    assert result["versions"]["transformers"] == transformers.__version__
    file.write_text("import nothing_of_that_name")
    assert len(run_tests(Path(sys.prefix), [str(file)])["failed"]) == 1
    with pytest.raises(SystemExit, match="did not get as far"):
        run_tests(Path(sys.prefix), ["--no-such-option"])


def test_the_oldest_versions_come_first_in_the_table(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as Python does for a script
    script = runpy.run_path(str(ROOT / "examples" / "update_readme.py"))
    readme = "before\n<!-- versions table -->\n<!-- end of versions table -->\nafter\n"
    assert script["write_versions"](tmp_path, "no marks, and nothing to write") == "no marks, and nothing to write"
    for python, tests in (("3.13.0", ["tests"]), ("3.9.2", ["tests/tuners", "tests/losses"])):
        result = {"versions": {"python": python, "torch": "2.6.0"}, "tests": tests, "passed": 7, "skipped": 1}
        (tmp_path / f"{python}.json").write_text(json.dumps({**result, "failed": ["a", "b"]}))
    assert script["write_versions"](tmp_path, readme).splitlines()[1:-1] == [
        "<!-- versions table -->",
        "| python | torch | tests | passed | failed | skipped |",
        "|---|---|---|---|---|---|",
        "| 3.9.2 | 2.6.0 | `tuners`, `losses` | 7 | 2 | 1 |",
        "| 3.13.0 | 2.6.0 | all | 7 | 2 | 1 |",
        "<!-- end of versions table -->",
    ]
