"""The check of a GPU, on a CPU: every part of it runs, and what is wrong is said."""

from __future__ import annotations

import importlib
import json
import runpy
import sys

import pytest
import torch

from peft_ncgeo import losses

from ..launching import launch_script
from .test_examples import ROOT

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]
SCRIPT = ROOT / "benchmarks" / "check_gpu.py"


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", *arguments])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_every_check_is_good_or_says_why_it_has_no_verdict(tmp_path, monkeypatch, capsys):
    parts = ("losses", "precision", "waits", "compile", "memory", "speed")
    run(monkeypatch, "--checks", *parts, "--output", str(tmp_path / "gpu.json"))
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["failed"] == []
    assert "CPU" in report["device"]
    assert "torch" in report["device"]
    by_name = {row["check"]: row for row in report["rows"]}
    for loss in set(losses.__all__) - {"GeometryBatch", "Regularizer"}:
        assert any(name.startswith(f"loss and gradients: {loss}") for name in by_name), loss
    for start in ("step in bf16", "compiled steps", "text tower", "Prompt-OT step"):
        assert {row["good"] for name, row in by_name.items() if name.startswith(start)} == {True}, start
    for start in ("step in fp16", "waits of the host", "memory of text tower"):
        found = [row for name, row in by_name.items() if name.startswith(start)]
        assert found, start
        assert all(row["good"] is None and "CPU" in row["result"] for row in found), start
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in by_name)


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """As the check starts them, but for the launcher."""
    launch_script(SCRIPT, "--device", "cpu", "--train_to", str(tmp_path / "weights.pt"), out=tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    processes = importlib.import_module("gpu_checks.processes")
    two, one = torch.load(tmp_path / "weights.pt"), processes.train_alone(torch.device("cpu"))
    torch.testing.assert_close(two, one, atol=1e-3 * float(one.norm()), rtol=0)


class NewTerm(losses.Regularizer):
    """A loss that is another one in float32."""

    def forward(self, batch):
        (features,) = batch.need("image_features")
        return features.mean() * features.element_size()


def test_what_failed_is_named(tmp_path, monkeypatch, capsys):
    """Among the losses that nobody wrote settings for."""
    monkeypatch.setattr(losses, "NewTerm", NewTerm, raising=False)
    monkeypatch.setattr(losses, "__all__", [*losses.__all__, "NewTerm"])
    with pytest.raises(SystemExit, match=r"failed: loss and gradients: NewTerm") as ended:
        run(monkeypatch, "--checks", "losses", "--output", str(tmp_path / "gpu.json"))
    assert ended.value.code not in (0, None)
    assert json.loads((tmp_path / "gpu.json").read_text())["failed"] == ["loss and gradients: NewTerm"]
    out = capsys.readouterr().out
    assert out.count("**failed**") == 1


def test_an_error_is_a_row_and_other_checks_still_run(monkeypatch, capsys):
    def refuse(self, batch):
        raise ValueError("not today")

    monkeypatch.setattr(losses.LDAM, "forward", refuse)
    with pytest.raises(SystemExit, match=r"failed: losses: error"):
        run(monkeypatch, "--checks", "losses", "speed")
    out = capsys.readouterr().out
    assert "ValueError: not today" in out
    assert "Prompt-OT step" in out
