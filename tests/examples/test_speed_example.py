"""The speed benchmark compares like with like: equal losses, fewer operations, less kept. Times are not asserted."""

from __future__ import annotations

import json

import pytest

from .test_examples import run_example

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]
# row -> how many times fewer operations ours needs at least, for the mini-CLIP
FEWER = {
    "text": 5.5,
    "ot-50": 4.2,
    "ot-50-bf16": 4.2,
    "ot-50-autocast": 0.99,
    "ot-500": 5.3,
    "text-only": 5.6,
    "lora-4": 2.0,
    "evaluation": 8.8,
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ("--quick", "--rounds", "1", "--rows", "memory", *FEWER, "--output_dir", str(folder))
        run_example("benchmark_speed.py", *arguments, monkeypatch=patch)
    assert "| work | reference s | ours s | ratio | limit by FLOPs |" in (folder / "results.md").read_text()
    return json.loads((folder / "results.json").read_text())


def test_both_sides_compute_the_same(report):
    assert len(report["speed"]) == len(FEWER)
    for row in report["speed"]:
        tolerance = 0.05 if "bf16" in row["work"] else 1e-4
        assert row["our loss"] == pytest.approx(row["reference loss"], abs=tolerance), row["work"]


def test_ours_needs_fewer_operations(report):
    for row, least in zip(report["speed"], FEWER.values(), strict=True):
        assert row["limit by FLOPs"] > least, row["work"]


def test_activations_are_few_and_grow_with_the_classes(report):
    _, hundred, two_hundred = report["memory"]
    assert hundred["ratio"] > 6
    for side in ("reference MiB", "ours MiB"):
        assert two_hundred[side] == pytest.approx(2 * hundred[side], rel=0.02)


def test_note_names_the_flag_that_bf16_needs(report):
    assert "amx_bf16" in report["note"] or "not known" in report["note"]
