"""Patterns in configs of others: those that could run without end are refused, those that people write are not."""

from __future__ import annotations

import re

import pytest

from peft_ncgeo.loading.patterns import check_patterns
from peft_ncgeo.training import Recipe

from ..properties.outcomes import said_well

HARMLESS = [
    r"q_proj",
    "all-linear",
    r".*\.(q|k|v|out)_proj",
    r".*vision_model.*\.(fc1|fc2)",
    r".*\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    r"^(?!.*(lm_head|text_model)).*\.(q_proj|v_proj)$",
    r"(?:text|vision)_model\.encoder\.layers\.(0|1|2|3|4|5|6|7|8|9|10|11)\.mlp\.fc[12]",
    r"vit\.(?P<part>encoder\.)?layer\.[0-9]+\..*query",
    r"[(+*|?]\(\+\*\?\|",
]
ENDLESS = [
    "(a+)+!",
    "(a*)*!",
    "(a|a)*!",
    "(a|aa)+!",
    "(?:a+){2,}!",
    "((a+))+!",
    "(([a-z])+.)+!",
    "(?P<name>.*)+!",
    "(a+)+?!",
    "(.*)(?:x)*!",
    ".*" * 5,
    "[^!]*" * 6,
    "(a|a)" * 25,
    "(a|a|a|a|a|a)" * 9,
    "a?" * 25 + "a" * 25,
    r"(.+)\1+!",
    "(?P<n>.+)(?P=n)+!",
    "(?x)(a+) +!",
    "(",
    "a" * 5000,
]


@pytest.mark.parametrize("pattern", HARMLESS)
@pytest.mark.parametrize("held", [str, lambda p: [p], lambda p: {p}, lambda p: {p: 4}])
def test_harmless(pattern, held):
    check_patterns({"target_modules": held(pattern), "template": "(a+)+!"})
    re.fullmatch(pattern, "vision_model.encoder.layers.11.self_attn.out_proj" * 2)


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("field", ["target_modules", "modules_to_save", "layers_pattern", "rank_pattern"])
def test_without_end(field, pattern):
    given = {"rank_pattern": {pattern: 4}, "modules_to_save": [pattern]}.get(field, pattern)
    assert said_well(lambda: check_patterns({field: given}), ValueError) is None
    with pytest.raises(ValueError, match=field):
        check_patterns({field: given})


def test_many_of_them():
    check_patterns({"target_modules": [f"layers.{i}.q_proj" for i in range(500)]})
    with pytest.raises(ValueError, match="too long"):
        check_patterns({"modules_to_save": [f"layers.{i}.q_proj" for i in range(5000)]})


def test_what_is_no_text_is_left_to_its_config():
    check_patterns({"target_modules": None, "rank_pattern": 3, "target_parameters": [1, None]})


def test_a_recipe_brings_none_either(tmp_path):
    path = tmp_path / "sent.yaml"
    path.write_text("peft: {LoraConfig: {target_modules: '(.+)+!'}}")
    with pytest.raises(ValueError, match="sent.yaml: target_modules="):
        Recipe.read(path)
