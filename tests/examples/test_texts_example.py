"""The benchmark of class texts, on a few of them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_operations_are_shared_out():
    script = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "benchmark_texts.py"))
    ids = script["texts"](30)
    assert len(ids) == 30
    assert 0.95 < script["operations"](30, 2) < 1.3  # short rows repeat the context
