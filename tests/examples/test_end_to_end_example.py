"""The benchmark of a whole training: its parts add up, and each is there. Times are not asserted."""

from __future__ import annotations

import json

import pytest

from peft_ncgeo.data.images import ImageCollator, LabelledImages

from .test_examples import run_example

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]


def test_where_the_time_of_a_training_goes(tmp_path, monkeypatch, capsys):
    before = LabelledImages.__getitem__, ImageCollator.__call__
    run_example("benchmark_end_to_end.py", "--quick", "--output_dir", str(tmp_path), monkeypatch=monkeypatch)
    assert (LabelledImages.__getitem__, ImageCollator.__call__) == before
    report = json.loads((tmp_path / "results.json").read_text())
    passes = ("towers, forward", "towers and losses, backward", "frozen towers", "losses", "evaluation passes")
    assert report["seconds"].keys() == {*passes, "decoding and crops", "image processor", "saving", "the rest"}
    assert all(seconds > 0 for seconds in report["seconds"].values())
    spent = sum(report["seconds"][name] for name in passes)
    assert report["towers and losses"] == pytest.approx(spent / sum(report["seconds"].values()))
    assert report["sizes"] == {"classes": 10, "images": 40, "test images": 20, "steps": 2}
    assert list((tmp_path / "training").glob("adapter_model.safetensors"))
    assert "| image processor |" in capsys.readouterr().out
