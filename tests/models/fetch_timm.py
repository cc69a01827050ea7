"""Fetch timm, and torchvision, which it imports, into a folder of their own: the package needs neither.

`make test` runs this file; `test_timm.py` and `make models` use what it fetched, in processes of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "timm"
FAILURE = ROOT / "build" / "timm.failed"  # why the last attempt came to nothing, in one line
PACKAGES = ("timm>=1.0.20,<2", "torchvision==0.28.*")  # of one minor release with the torch of constraints.txt

# torchvision's wheel may be for another accelerator than torch's: what it registers in C++ is missing then, and its
# Python part, which is all that timm needs, looks for the schemas of two operators.
SHIM = """
import torch
schemas = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def environment() -> dict[str, str]:
    """Return the variables of a process that finds timm, this checkout, and what it must run first."""
    paths = [str(FOLDER), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process in which timm can be imported."""
    command = [sys.executable, "-c", SHIM + code, *arguments]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)


def fetch() -> None:
    """Download through pip, without what the packages depend on, and keep them as a whole or not at all."""
    FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as scratch:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries", "1", "--timeout", "30"]
        result = subprocess.run([*command, "--target", f"{scratch}/timm", *PACKAGES], capture_output=True, text=True)
        if result.returncode:
            lines = [line.strip() for line in result.stderr.splitlines() if line.startswith("ERROR")]
            raise ValueError(f"pip install {' '.join(PACKAGES)}: {lines[-1] if lines else 'failed'}")
        shutil.move(f"{scratch}/timm", FOLDER)
    found = run("import timm, torchvision")
    if found.returncode:
        shutil.rmtree(FOLDER)
        raise ValueError(f"timm cannot be imported: {found.stderr.strip().splitlines()[-1]}")


if __name__ == "__main__" and not FOLDER.exists():
    FAILURE.unlink(missing_ok=True)
    try:
        fetch()
    except (OSError, ValueError) as error:
        FAILURE.write_text(f"{error}\n")
        sys.exit(f"timm could not be fetched: {error}")
