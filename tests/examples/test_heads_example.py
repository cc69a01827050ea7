"""The example of heads on cached features."""

from __future__ import annotations

import re

import pytest

from .test_examples import run_example

METHODS = ["CoPA", "Tip-Adapter", "Tip-Adapter-F", "GDA", "LP++", "ZS-LP", "CLAP"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_demo")]


def test_table(monkeypatch, capsys):
    run_example("adapt_heads.py", "--shots", "2", "--num_views", "1", monkeypatch=monkeypatch)
    rows = re.findall(r"^\| ([\w+ -]+) \| ([\d.]+) \| ([\d.]*) \| ([\d.]*) \|$", capsys.readouterr().out, flags=re.M)
    assert [row[0] for row in rows] == ["zero-shot", *METHODS]
    assert {row[0] for row in rows if row[2]} == {"zero-shot", "Tip-Adapter", "Tip-Adapter-F", "GDA"}
    found = {row[0]: float(row[1]) for row in rows}
    assert found["CoPA"] > found["zero-shot"]
    assert all(30 < value < 100 for value in found.values())


def test_benchmark(monkeypatch, capsys):
    run_example("adapt_heads.py", "--benchmark", "--classes", "5", monkeypatch=monkeypatch)
    rows = re.findall(r"^\| ([\w+-]+) \| ([\d.]+) \|$", capsys.readouterr().out, flags=re.M)
    assert [row[0] for row in rows] == METHODS[1:]
