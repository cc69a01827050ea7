"""Experiment trackers get their values through Trainer's own callbacks."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from peft_ncgeo.losses import LanguageCollapse, OTPreservation

from ..conftest import tiny_images
from .runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> value, of the event files in a folder."""
    found = {}
    for file in folder.rglob("events.out.*"):
        data, start = file.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack("<Q", data[start : start + 8])
            event = Event.FromString(data[start + 12 : start + 12 + length])  # checksums stand around it
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value if v.HasField("simple_value")}
            start += length + 16
    return found


def test_tensorboard_shows_every_term(tmp_path):
    losses = [OTPreservation(budget=0.05), LanguageCollapse(weight=0.25)]
    options = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "report_to": "tensorboard"}
    run = trainer(tmp_path, losses=losses, eval_dataset=tiny_images(10), **options)
    run.train()
    seen = scalars(tmp_path)
    logged = [row for row in run.state.log_history if "loss" in row]
    assert [row["step"] for row in logged] == [2, 4]
    terms = ("loss", "loss/ce", "loss/ot", "lambda/ot", f"loss/{losses[1].name}", f"lambda/{losses[1].name}")
    for row in logged:
        for term in terms:
            assert seen[f"train/{term}", row["step"]] == pytest.approx(row[term], rel=1e-6)
    assert ("eval/accuracy", 4) in seen


def test_the_reader_would_notice_a_term_that_is_missing(tmp_path):
    run = trainer(tmp_path, max_steps=2, logging_steps=2, report_to="tensorboard")
    run.train()
    assert ("train/loss/ce", 2) in scalars(tmp_path)
    assert not any("ot" in tag.split("/") for tag, _ in scalars(tmp_path))
