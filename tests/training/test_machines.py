"""Two machines train as one process does, and a broken connection between them is said and can be mended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peft_ncgeo.training.state.checkpoints import why_not_resumable

from ..launching import free_port, launch
from . import interruptions

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "accelerate" / "cpu_2nodes.yaml"
# A machine has its own host name, whose address is the one that it is reached at; that is root's to set.
NAMED = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"']
MAY_NAME = (
    shutil.which("unshare") and not subprocess.run([*NAMED, "127.0.0.2", "true"], capture_output=True).returncode
)


def start_machines(folder: Path, case: str) -> None:
    """Run `accelerate launch` on two machines of one process each. Once one has failed, end the other one."""
    machines, port, printed = [], str(free_port()), [folder / f"printed-{rank}" for rank in range(2)]
    for rank, address in enumerate(("127.0.0.1", "127.0.0.2")):
        command = [*NAMED, address] if MAY_NAME else []
        command += [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(CONFIG)]
        command += ["--main_process_port", port, "--machine_rank", str(rank), "--module"]
        command += ["tests.training.interruptions", case, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with printed[rank].open("wb") as file:
            machines.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))
    stop = time.monotonic() + 300
    while None in (ends := [machine.poll() for machine in machines]) and not any(ends) and time.monotonic() < stop:
        time.sleep(0.1)
    for machine in machines:
        machine.terminate()  # its processes too, unless it has ended
        machine.wait()
    assert ends == [0, 0], "\n".join(path.read_text()[-3000:] for path in printed)


def result(folder: Path) -> dict:
    return torch.load(folder / "result.pt", weights_only=False)


def is_near(folder: Path, other: Path) -> None:
    for part in ("weights", "state"):
        got, expected = result(folder)[part], result(other)[part]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3, equal_nan=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert launch(interruptions.train, "head", str(folder)) == [0]
    return folder


def test_two_machines_train_to_the_adapter_of_one_process(alone, tmp_path):
    start_machines(tmp_path, "head")
    is_near(tmp_path, alone)


def test_a_machine_that_is_killed_leaves_a_checkpoint_that_one_process_goes_on_from(alone, tmp_path):
    cut = ("head", str(tmp_path), 7, int(signal.SIGKILL), 60)
    assert launch(interruptions.train_cut_off, *cut, processes=2, end_others=False) == [1, -signal.SIGKILL]
    goes_on(tmp_path, alone)


def test_a_machine_that_falls_silent_is_given_up_after_the_timeout(alone, tmp_path):
    # process 1 stops, with its connections open, until the launch ends it
    ends = launch(interruptions.train_cut_off, "head", str(tmp_path), 7, int(signal.SIGSTOP), 3, processes=2)
    assert ends == [1, -signal.SIGKILL]
    assert "3000ms" in goes_on(tmp_path, alone)  # torch's own timeout is half an hour


def goes_on(folder: Path, alone: Path) -> str:
    """The error names the last whole checkpoint, from which one process reaches the same weights; return the error."""
    said = (folder / "error.txt").read_text()
    whole = [path.name for path in folder.glob("checkpoint-*") if not why_not_resumable(path)]
    assert "Process 0 of 2 lost another" in said
    assert "\n" not in said
    assert max(whole, key=lambda name: int(name[11:])) in said.rsplit(";", 1)[1]
    assert not (folder / "result.pt").exists()
    assert launch(interruptions.train, "head", str(folder)) == [0]
    is_near(folder, alone)
    return said


@pytest.mark.parametrize("second", ["another", "none"])
def test_machines_that_found_other_checkpoints_do_not_start(alone, tmp_path, second):
    (last,) = alone.glob("checkpoint-*")
    shutil.copytree(last, tmp_path / "0" / last.name)
    shutil.copytree(last, tmp_path / "1" / "checkpoint-4") if second == "another" else (tmp_path / "1").mkdir()
    assert launch(interruptions.resume_apart, str(tmp_path), processes=2) == [0, 0]
    for rank in range(2):
        said = (tmp_path / str(rank) / "error.txt").read_text()
        assert f"process 0: {last.name}; process 1: {'checkpoint-4' if second == 'another' else 'none'}" in said
        assert "save_on_each_node" in said


def test_no_process_has_a_checkpoint(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    assert launch(interruptions.resume_apart, str(tmp_path), processes=2) == [0, 0]
    for rank in range(2):
        assert (tmp_path / str(rank) / "error.txt").read_text().startswith("No valid checkpoint")
