"""Fetch PEFT's own tests, which its wheel does not hold, from the source distribution of the installed version.

`make test` and `make peft-suite` run this file; `test_peft_suite.py` runs what it fetched. Nothing of it is kept in
the repository.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

VERSION = version("peft")
FOLDER = Path(__file__).parents[2] / "build" / "peft-suite"
TESTS = FOLDER / f"peft-{VERSION}" / "tests"
FAILURE = FOLDER / f"peft-{VERSION}.failed"  # why the last attempt came to nothing, in one line


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the files under `tests` alone; one that would land elsewhere, a link or a device is refused."""
    root = f"peft-{VERSION}/tests/"
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.startswith(root) and member.isfile()]
        if not members:
            raise ValueError(f"{archive.name} holds no {root}")
        tar.extractall(folder, members=members, filter="data")


def fetch() -> None:
    """Download through pip, which knows the index, the proxies and the hashes, and unpack as a whole or not at all."""
    with tempfile.TemporaryDirectory() as scratch:
        # The one package as source; what builds its metadata may come as wheels.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
        command += ["--retries", "1", "--timeout", "30", "--dest", scratch, f"peft=={VERSION}"]
        result = subprocess.run(command, capture_output=True, text=True)
        archives = sorted(Path(scratch).glob("peft-*.tar.gz"))
        if result.returncode or not archives:
            lines = [line.strip() for line in result.stderr.splitlines() if line.startswith("ERROR")]
            raise ValueError(f"pip download peft=={VERSION}: {lines[-1] if lines else 'no source distribution'}")
        unpack(archives[0], Path(scratch))
        TESTS.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(scratch) / f"peft-{VERSION}" / "tests", TESTS)


if __name__ == "__main__" and not TESTS.exists():
    FOLDER.mkdir(parents=True, exist_ok=True)
    FAILURE.unlink(missing_ok=True)
    try:
        fetch()
    except (OSError, ValueError, tarfile.TarError) as error:
        FAILURE.write_text(f"{error}\n")
        sys.exit(f"PEFT's own tests could not be fetched: {error}")
