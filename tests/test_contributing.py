"""CONTRIBUTING.md: its example loss and family are whole by what the page says to insert, and its paths exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
EDIT = re.compile(
    r"`([\w/.]+)`,\s(?:a new file|below (`+)(.+?)\2(?!`))(.*?)^```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE
)
# Those of the loss and the family alone, and some that every loss goes through.
TESTS = (
    *("tests/toys/checks.py", "tests/losses", "tests/properties/test_losses_values.py"),
    *("tests/hub/test_references.py", "tests/test_house.py"),
)
CHOSEN = "checks or ImageDrift or loss_is_listed or loss_stands or names_that_exist or one_subject"


def insert(path: Path, anchor: str, text: str) -> None:
    """Insert text below the first line that begins with the anchor."""
    lines = path.read_text().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines, 1) if line.startswith(anchor))
    path.write_text("".join([*lines[:place], text, *lines[place:]]))


def follow(page: str, root: Path) -> list[str]:
    """Make the page's edits in a copy of the repository; return the files."""
    edited = []
    for name, _, anchor, words, code in EDIT.findall(page):
        if not anchor:
            (root / name).write_text(code)
        else:
            insert(root / name, anchor.strip() if anchor.endswith(" ") else anchor, code)
        if "in `__all__`" in words:
            insert(root / name, "__all__ =", f'    "{code.split()[-1]}",\n')
        edited.append(name)
    return edited


@pytest.mark.slow
def test_the_example_is_whole(tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "demo_assets", "old_files", "test_contributing.py")
    for name in ("peft_ncgeo", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert {"peft_ncgeo/losses/image_drift.py", "peft_ncgeo/models/families.py"} < set(follow(PAGE, tmp_path))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}  # it is a copy
    environment["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--hypothesis-profile", "fast"]
    done = subprocess.run(
        [*command, *TESTS, "-k", CHOSEN], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_files_that_the_page_names_exist():
    made = {name for name, _, anchor, _, _ in EDIT.findall(PAGE) if not anchor}
    named = set(re.findall(r"`((?:peft_ncgeo|tests|docs|examples|benchmarks)/[\w/.]*)`", PAGE))
    assert len(named) > 20
    assert {name for name in named - made if not (ROOT / name).exists() and "NAME" not in name} == set()


def test_parts_that_the_page_names_exist():
    """Lists such as `TUNERS`, each in a file that stands near."""
    for part, name in re.findall(r"`([A-Z_]{5,})`\sof\s`([\w/.]+)`", PAGE):
        assert re.search(rf"^{part}\b", (ROOT / name).read_text(), flags=re.MULTILINE), (part, name)
