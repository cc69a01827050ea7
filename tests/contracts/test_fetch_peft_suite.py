"""What is fetched of PEFT's source distribution, and what is told where it cannot be."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from . import fetch_peft_suite
from .fetch_peft_suite import VERSION, unpack

ROOT = f"peft-{VERSION}"


def archive(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member in members:
            member.size = 4 if member.isfile() else 0
            tar.addfile(member, io.BytesIO(b"pass"))
    return path


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_the_files_under_tests_alone_are_unpacked(tmp_path):
    names = [f"{ROOT}/tests/test_config.py", f"{ROOT}/setup.py", "../outside.py"]
    packed = archive(tmp_path / "a.tar.gz", *map(tarfile.TarInfo, names), link(f"{ROOT}/tests/link.py", "/etc"))
    unpack(packed, tmp_path / "in" / "here")
    assert [path.name for path in tmp_path.rglob("*.py")] == ["test_config.py"]


def test_a_file_that_would_land_elsewhere_is_refused(tmp_path):
    packed = archive(tmp_path / "a.tar.gz", tarfile.TarInfo(f"{ROOT}/tests/../../../outside.py"))
    with pytest.raises(tarfile.TarError):
        unpack(packed, tmp_path / "in" / "here")
    assert not list(tmp_path.rglob("*.py"))


def test_an_archive_without_tests_is_told(tmp_path):
    packed = archive(tmp_path / "a.tar.gz", tarfile.TarInfo(f"{ROOT}/setup.py"))
    with pytest.raises(ValueError, match=f"a.tar.gz holds no {ROOT}/tests/"):
        unpack(packed, tmp_path)


def test_a_download_that_fails_is_one_line_and_kept_for_the_tests_to_tell(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    script = tmp_path / "tests" / "contracts" / "fetch_peft_suite.py"
    script.parent.mkdir(parents=True)
    script.write_text(Path(fetch_peft_suite.__file__).read_text())
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 1
    kept = (tmp_path / "build" / "peft-suite" / f"{ROOT}.failed").read_text()
    assert result.stderr == f"PEFT's own tests could not be fetched: {kept}"
    assert kept.startswith(f"pip download peft=={VERSION}: ")
    assert kept.count("\n") == 1
