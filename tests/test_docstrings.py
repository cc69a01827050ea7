"""The examples of the docstrings run and print what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

from peft_ncgeo import geometry

PACKAGE = Path(__file__).parents[1] / "peft_ncgeo"
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text())


def test_examples_print_what_they_say():
    for path in WITH_EXAMPLES:
        module = import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        result = doctest.testmod(module)  # its report goes to the captured output
        assert result.attempted, path
        assert not result.failed, path


@pytest.mark.parametrize(
    "name",
    ["NeuralCollapse", "error_exponent", "gram_distance", "modality_gap", "simplex_etf", "slerp", "transport_cost"],
)
def test_what_stands_by_itself_has_an_example(name):
    assert ">>> " in getattr(geometry, name).__doc__
