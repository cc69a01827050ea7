"""A training that is killed, or whose disk is full, goes on to the weights it would have had."""

from __future__ import annotations

import random
import re
import shutil
import signal
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import TrainerState

from peft_ncgeo.hub import save_adapter
from peft_ncgeo.training.state.checkpoints import last_resumable, why_not_resumable

from ...conftest import tiny_images
from ...launching import launch
from .. import interruptions
from ..interruptions import CASES, STEPS
from ..runs import trainer

pytestmark = pytest.mark.slow


def train(*args) -> int:
    return launch(interruptions.train, *args)[0]


def result(folder: Path) -> dict:
    return torch.load(folder / "result.pt", weights_only=False)


def is_equal(got: dict, expected: dict) -> None:
    """To the last bit; of what was logged, the part since the last restart."""
    for part in ("weights", "state"):
        torch.testing.assert_close(got[part], expected[part], atol=0, rtol=0, equal_nan=True)
    assert (got["step"], got["best"]) == (expected["step"], expected["best"])
    assert got["log"][-1] == expected["log"][-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a training that nothing interrupts, by case."""
    folders = {case: tmp_path_factory.mktemp("whole") / case for case in CASES}
    for case, folder in folders.items():
        assert train(case, str(folder)) == 0
    return folders


@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again(tmp_path, whole, case, kills, record_property):
    chance, step, killed, half_written = random.Random(f"{case} {kills}"), 0, 0, 0
    while killed < kills:
        at = chance.randint(step, step + max(1, (STEPS - 1 - step) // (kills - killed)))
        at_end = chance.random() < 0.5
        exit_code = train(case, str(tmp_path), at, chance.uniform(0, 0.05 if at_end else 0.15), at_end)
        if exit_code:
            assert exit_code == -signal.SIGKILL
            killed += 1
            folders = {int(folder.name[11:]): why_not_resumable(folder) for folder in tmp_path.glob("checkpoint-*")}
            half_written += any(folders.values())
            step = max([0, *(number for number, problem in folders.items() if not problem)])
        if exit_code == 0 or (step > STEPS - 4 and train(case, str(tmp_path)) == 0):  # begin anew
            is_equal(result(tmp_path), result(whole[case]))
            shutil.rmtree(tmp_path)
            step = 0
    assert train(case, str(tmp_path)) == 0
    is_equal(result(tmp_path), result(whole[case]))
    record_property("kills", kills)
    record_property("half written", half_written)
    assert half_written or kills < 25


@pytest.mark.parametrize("case", CASES)
def test_a_training_that_has_ended_takes_no_further_step(tmp_path, whole, case):
    """As one that was killed after its last checkpoint, before it could tell the result."""
    folder = shutil.copytree(whole[case], tmp_path / case)
    (folder / "result.pt").unlink()
    assert train(case, str(folder)) == 0
    is_equal(result(folder), result(whole[case]))


def test_one_of_two_processes_is_killed(tmp_path, whole):
    def train_both(case: str, folder: Path, kill_at: int) -> list[int]:
        return launch(interruptions.train, case, str(folder), kill_at, 0.03, False, 1, processes=2)

    assert train_both("prompts", tmp_path / "whole", -1) == [0, 0]
    # in the second epoch, where the order of the images is another
    assert train_both("prompts", tmp_path / "killed", 7)[1] == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.pt").exists()
    assert train_both("prompts", tmp_path / "killed", -1) == [0, 0]
    is_equal(result(tmp_path / "killed"), result(tmp_path / "whole"))

    assert train_both("head", tmp_path / "head", 7)[1] == -signal.SIGKILL
    assert train("head", str(tmp_path / "head")) == 0  # one process takes over
    for part in ("weights", "state"):
        got, expected = (result(folder)[part] for folder in (tmp_path / "head", whole["head"]))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3, equal_nan=True)


FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "geometry_state.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
)


@pytest.fixture
def checkpoints(tmp_path, whole):
    """A training that stopped after step 6, whose last checkpoint may be damaged."""
    for step in (4, 6):
        shutil.copytree(whole["prompts"] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


@pytest.mark.parametrize("damage", ["gone", "empty", "cut short"])
@pytest.mark.parametrize("name", FILES)
def test_a_half_written_checkpoint_is_left_aside(checkpoints, name, damage):
    path = checkpoints / "checkpoint-6" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[: len(content) // 2] if damage == "cut short" else b"")
    with pytest.warns(UserWarning, match=r"left aside: checkpoint-6 \(.*\. Training goes on from checkpoint-4"):
        assert last_resumable(checkpoints) == str(checkpoints / "checkpoint-4")
    shutil.rmtree(checkpoints / "checkpoint-4")
    with pytest.raises(ValueError, match=r"No valid checkpoint in .* to resume from: checkpoint-6 \("):
        last_resumable(checkpoints)


def test_whole_checkpoints_are_found(checkpoints):
    shutil.copytree(checkpoints / "checkpoint-6", checkpoints / "checkpoint-10")
    for name in ("checkpoint-final", "checkpoint-12-mine"):
        shutil.copytree(checkpoints / "checkpoint-6", checkpoints / name)
    (checkpoints / "checkpoint-14").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_resumable(checkpoints) == str(checkpoints / "checkpoint-10")


def again(folder: Path):
    """The trainer of "prompts" in this process."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS, **CASES["prompts"]()}
    return trainer(folder, train=tiny_images(30), augmentation="crop_flip", **options)


def test_nothing_to_resume_from(tmp_path):
    run = again(tmp_path / "new")
    with pytest.raises(ValueError, match=r"No.*new.*from\. Leave.*resume_"):
        run.train(resume_from_checkpoint=True)
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"Cannot resume from .*other: .*trainer_state.json"):
        run.train(resume_from_checkpoint=str(tmp_path / "other"))


def refuse_to_write(monkeypatch, folder: Path, name: str) -> None:
    """A disk that is full when this file is written, or a place that it cannot take."""
    folder.mkdir()
    if name in ("adapter_config.json", "training_args.bin"):  # written elsewhere, and moved
        (folder / name).mkdir()
        return
    if name != "trainer_state.json":
        (folder / name).symlink_to("/dev/full")
        return

    def write_half(self, path):
        Path(path).write_text('{"epoch": 1')
        Path("/dev/full").write_text("no space")

    monkeypatch.setattr(TrainerState, "save_to_json", write_half)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("name", [name for name in (*FILES, "training_args.bin") if "safetensors" not in name])
def test_a_full_disk_leaves_the_checkpoints_before(checkpoints, name, monkeypatch):
    shutil.rmtree(checkpoints / "checkpoint-6")
    refuse_to_write(monkeypatch, checkpoints / "checkpoint-6", name)
    with pytest.raises(OSError, match=r"checkpoint-6.*not.*written \(.*\)"):
        again(checkpoints).train(resume_from_checkpoint=str(checkpoints / "checkpoint-4"))
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not why_not_resumable(checkpoints / "checkpoint-4")


@pytest.mark.parametrize("name", [name for name in FILES if "safetensors" in name])
def test_training_goes_on_when_there_is_room_again(checkpoints, whole, name):
    room = (checkpoints / "checkpoint-6" / name).stat().st_size - 1
    shutil.rmtree(checkpoints / "checkpoint-6")
    launch(interruptions.run_limited, "prompts", str(checkpoints), room)
    assert re.fullmatch(
        r"\S*checkpoint-6 could not be written \(.*\); the checkpoints before it are intact\.",
        (checkpoints / "error.txt").read_text(),
    )
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-4"]
    assert train("prompts", str(checkpoints)) == 0
    is_equal(result(checkpoints), result(whole["prompts"]))


def test_a_checkpoint_written_again_is_not_vouched_for_by_the_old_one(checkpoints, monkeypatch):
    """Killed while writing over a whole checkpoint of an earlier training."""

    class Killed(BaseException):
        pass

    def stop(*args, **kwargs):
        raise Killed

    run = again(checkpoints)
    monkeypatch.setattr(run, "_save_rng_state", stop)
    with pytest.raises(Killed):
        run.train(resume_from_checkpoint=str(checkpoints / "checkpoint-4"))
    assert "trainer_state.json" in why_not_resumable(checkpoints / "checkpoint-6")
    assert not why_not_resumable(checkpoints / "checkpoint-4")


def test_a_place_that_is_taken_is_said_of_an_adapters_folder(tmp_path):
    run = again(tmp_path / "trained")
    for name, save in {"trainer": run.save_model, "hub": partial(save_adapter, run.model)}.items():
        folder = tmp_path / name
        (folder / "adapter_config.json").mkdir(parents=True)
        with pytest.raises(OSError, match=rf"^{folder} could not be written: "):
            save(str(folder))
        assert [path.name for path in folder.iterdir()] == ["adapter_config.json"]
