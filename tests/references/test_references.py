"""Numbers stay: no value or gradient of any loss, geometry function or preset moves by 1e-6 without being named."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from peft_ncgeo import geometry, losses
from peft_ncgeo.tuners.prototype.config import GEOMETRIES

from .presets import PRESETS
from .write import FILE, Values, differs, made, moved, stored, write


@pytest.fixture(scope="module")
def values() -> Values:
    return made()


def test_no_number_moved(values):
    lines = list(moved(values, stored()).values())
    assert not lines, "\n".join(lines)


def test_the_file_names_what_is_made(values):
    assert values.keys() == stored().keys(), "run python -m tests.references.write"


LOSSES = [name for name in losses.__all__ if issubclass(getattr(losses, name), nn.Module)]


@pytest.mark.parametrize(
    "name",
    [
        *(f"losses/{name}" for name in LOSSES),
        *(f"geometry/{name}" for name in geometry.__all__),
        *(f"presets/NPTConfig.{name}" for name in PRESETS),
        *(f"presets/PrototypeConfig({name})" for name in GEOMETRIES),
    ],
)
def test_everything_public_has_a_reference(name):
    assert any(re.match(re.escape(name) + r"($|[(/])", other) for other in stored())


@pytest.mark.slow
def test_random_numbers_are_not_among_them(values):
    torch.manual_seed(1234)
    assert not moved(made(), values)


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (0.5 + 4e-7, 0.5, False),
        (0.5 + 6e-7, 0.5, True),  # more than a millionth of it
        (90.0 + 2e-6, 90.0, True),  # more than a millionth
        (90.0 + 5e-7, 90.0, False),
        (1e-16, 0.0, False),
        (1e-6, 0.0, True),
        (float("nan"), 0.5, True),
    ],
)
def test_a_change_of_a_millionth_is_one(new, old, expected):
    assert differs([1.0, new], [1.0, old]) == expected
    assert differs([new], [1.0, old])


def test_a_number_that_moves_is_named_and_is_written_only_by_name(tmp_path):
    file = tmp_path / "values.json"
    old = {"losses/A()/value": [1.0], "losses/B()/value": [2.0], "losses/C()/value": [3.0, 4.0]}
    assert write(old, file) == [f"{name} is new" for name in old]
    new = {"losses/A()/value": [1.0 + 1e-9], "losses/C()/value": [3.0, 4.1], "losses/D()/value": [5.0]}
    line = "losses/C()/value moved from [3.0, 4.0] to [3.0, 4.1]"
    assert moved(new, old) == {"losses/C()/value": line}
    with pytest.raises(ValueError, match="Nothing was written") as refusal:
        write(new, file, ["losses/A"])
    assert line in str(refusal.value)
    assert stored(file) == old
    assert write(new, file, ["losses/C"]) == [line, "losses/D()/value is new", "losses/B()/value is gone"]
    assert stored(file) == new | {"losses/A()/value": [1.0]}


def test_the_file_is_small_and_as_the_command_writes_it(tmp_path):
    assert FILE.stat().st_size < 40_000
    write(stored(), tmp_path / FILE.name)
    assert (tmp_path / FILE.name).read_text() == FILE.read_text()
    assert all(isinstance(numbers, list) and numbers for numbers in json.loads(FILE.read_text()).values())
