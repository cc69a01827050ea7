"""Files that others wrote: read within bounds or refused in one line; and names that stay inside their folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peft_ncgeo.data import DatasetSource
from peft_ncgeo.files import LARGEST, file_name, parse_json, read_json, read_yaml
from peft_ncgeo.training import Recipe

from ..profiles import cases
from .outcomes import said_well

MANY = 10**5
DOUBLED = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)), "args: *a11"]
)
ENDLESS = {
    "aliases that multiply": (DOUBLED, "alias"),
    "an alias of itself": ("args: &a [*a]", "alias"),
    "digits": (f"args: {'1' * MANY}", "characters"),
    "digits and an exponent": (f"args: {'1' * MANY}e5", "characters"),
    "hexadecimal digits": (f"args: 0x{'f' * MANY}", "characters"),
    "sexagesimal digits": (f"args: 1{':1' * MANY}", "characters"),
    "sexagesimal fractions": (f"args: 1{':1' * MANY}.5", "characters"),
    "quoted digits": (f"args: !!int '{'1' * MANY}'", "characters"),
    "brackets": ("[" * MANY, "deep"),
    "mappings": ("{a: " * MANY, "deep"),
    "dashes": ("- " * MANY, "deep"),
    "questions": ("? " * MANY, "deep"),
    "a key that stands twice": ("args: {seed: 1}\nlosses: []\nargs: {}", "twice"),
    "an inner key that stands twice": ("args: {seed: 1, seed: 2}", "twice"),
    "bytes": (f"args: {'x' * LARGEST}", "bytes"),
}


@pytest.mark.parametrize(("text", "said"), ENDLESS.values(), ids=ENDLESS)
@pytest.mark.parametrize("read", [Recipe.read, DatasetSource.read])
def test_a_yaml_file_that_would_not_end(tmp_path, read, text, said):
    path = tmp_path / "made_up.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s){path}.*{said}"):
        read(path)
    assert said_well(lambda: read(path), ValueError) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * MANY, "deep"),
        ("[" * 52 + "]" * 52, "deep"),
        ('{"a":' * 60 + "1" + "}" * 60, "deep"),
        ("9" * MANY, "characters"),
        (f"[-{'9' * 200}.5]", "characters"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "twice"),
    ],
)
def test_a_json_text_that_would_not_end(text, said):
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_no_more_of_a_file_is_read_than_may_be(tmp_path):
    with (tmp_path / "sparse.json").open("wb") as file:
        os.truncate(file.fileno(), 2**40)  # takes no place on the disk, but memory when it is read
    with pytest.raises(ValueError, match="more than 1,048,576 bytes"):
        read_json(tmp_path / "sparse.json")
    with pytest.raises(ValueError, match="more than 1,048,576 bytes"):
        read_yaml(tmp_path / "sparse.json", "Recipe")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**90), 10**90) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


@cases(2)
@given(value=values)
@example(value=[[[[[[[[[[[[[[[[[[[[{"a": [[[[[[[[[[[[[[[[[[[[[[[[[[1.5]]]]]]]]]]]]]]]]]]]]]]]]]]}]]]]]]]]]]]]]]]]]]]])
def test_other_json_is_read_as_it_stands(value):
    assert repr(parse_json(json.dumps(value))) == repr(value)


@cases(4)
@given(name=st.text(max_size=12) | st.text(st.sampled_from("./\\\0 a~:*猫"), max_size=220))
@example(name="..")
@example(name=".")
@example(name="~")
@example(name="a" * 201)
@example(name="猫" * 67)
@example(name="\ud800")
def test_names_stay_in_their_folder(tmp_path_factory, name):
    """A name that is not refused gives one new file in that folder."""
    found = said_well(lambda: file_name(name, "a recipe"), ValueError)
    if found is None:
        return
    folder = tmp_path_factory.mktemp("cells")
    (folder / found).mkdir()
    (folder / found / "x.json").touch()
    assert [path.relative_to(folder) for path in folder.rglob("x.json")] == [Path(found) / "x.json"]
    assert not found.startswith(".")


def test_usual_names_are_as_they_were():
    for name, expected in {"coop": "coop", "IF 100": "IF_100", "0.5-tau_é": "0.5-tau_é", "n=4": "n_4"}.items():
        assert file_name(name, "a setting") == expected
