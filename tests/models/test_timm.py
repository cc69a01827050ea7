"""timm's models in a process that finds timm, which `make test` fetches. The cases are in `timm_*cases.py`."""

from __future__ import annotations

import pytest

from .fetch_timm import FAILURE, FOLDER, run

if not FOLDER.exists():
    why = FAILURE.read_text().strip() if FAILURE.exists() else "it has not been fetched"
    pytest.skip(f"timm: {why}; run `python tests/models/fetch_timm.py`.", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("timm")]


@pytest.fixture(scope="module")
def timm() -> None:
    found = run("import timm, torchvision")
    if found.returncode:  # it was fetched for another torch
        pytest.skip(f"timm cannot be imported: {found.stderr.strip().splitlines()[-1]}")


@pytest.mark.parametrize("name", ["timm_cases", "timm_block_cases"])
def test_cases(name):
    found = run(
        "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))",
        "-p",
        "no:cacheprovider",
        f"tests/models/{name}.py",
    )
    assert found.returncode == 0, found.stdout[-10000:] + found.stderr[-2000:]
