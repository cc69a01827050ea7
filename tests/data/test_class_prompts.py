"""Class names as texts: layout, padding, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoTokenizer

from peft_ncgeo.data import class_prompts
from peft_ncgeo.data.demo import ASSETS
from peft_ncgeo.models.templates import padded_template, placeholder_ids

from ..conftest import BOS, EOT, NAMES, PAD, tiny_processor

TOKENIZER = tiny_processor().tokenizer
A_PHOTO_OF_A = [6, 7, 8, 6]


def test_layout():
    texts = class_prompts(["cat", "red cat"], "a photo of a {}.", 4, TOKENIZER)
    cat, red = TOKENIZER.convert_tokens_to_ids(["cat", "red"])
    dot = TOKENIZER.convert_tokens_to_ids(".")
    assert texts["input_ids"].tolist() == [
        [BOS, *A_PHOTO_OF_A, cat, dot, EOT, PAD],
        [BOS, *A_PHOTO_OF_A, red, cat, dot, EOT],
    ]
    assert texts["attention_mask"].tolist() == [[1] * 8 + [0], [1] * 9]


@pytest.mark.parametrize("names", [["0", "1"], ["7", "-3", "12.0"]])
def test_names_that_are_numbers_are_warned_of(names):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "mini_clip")
    with pytest.warns(UserWarning, match="numbers"):
        texts = class_prompts(names, "a photo of a {}.", 0, tokenizer)
    assert len(texts["input_ids"]) == len(names)


@pytest.mark.parametrize("names", [["one", "two"], ["7 up", "cola"], ["3", "three"]])
def test_names_that_are_words_are_not(names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        class_prompts(names, "a photo of a {}.", 0, AutoTokenizer.from_pretrained(ASSETS / "mini_clip"))


@pytest.mark.parametrize("slots", [0, 2, 4])
def test_a_long_enough_template_is_left_alone(slots):
    assert padded_template("a photo of a {}.", slots, TOKENIZER) == "a photo of a {}."
    assert placeholder_ids("a photo of a {}.", slots, TOKENIZER) == A_PHOTO_OF_A[:slots]


def test_a_short_template_gets_placeholder_words_in_front():
    assert padded_template("a photo of a {}.", 6, TOKENIZER) == "X X a photo of a {}."
    assert padded_template("{}", 3, TOKENIZER) == "X X X {}"
    row = class_prompts(["cat", "dog"], "{}", 3, TOKENIZER)["input_ids"][0].tolist()
    assert row == [BOS, 5, 5, 5, TOKENIZER.convert_tokens_to_ids("cat"), EOT]


def test_names_may_hold_braces():
    assert class_prompts(["{}", "{0}"], "a {}", 1, TOKENIZER)["input_ids"].shape[0] == 2


def test_underscores_are_spaces():
    one, other = (class_prompts([name, "dog"], "a {}", 1, TOKENIZER)["input_ids"] for name in ("red_cat", "red cat"))
    assert torch.equal(one, other)


def test_every_name_keeps_its_own_tokens():
    with_slots = class_prompts(NAMES, "a photo of a {}.", 9, TOKENIZER)["input_ids"]
    plain = class_prompts(NAMES, "a photo of a {}.", 0, TOKENIZER)["input_ids"]
    assert torch.equal(with_slots[:, 10:], plain[:, 5:])


@pytest.mark.parametrize(
    ("names", "template", "slots", "message"),
    [
        ([], "a {}", 1, "at least one class name"),
        (["cat", " "], "a {}", 1, "Class 1 has the name ' '"),
        (["cat", None], "a {}", 1, "Class 1 has the name None"),
        (["cat", "dog", "cat"], "a {}", 1, "Duplicate class names: 'cat' and 'cat'"),
        (["cat", "CAT"], "a {}", 1, "Duplicate class names: 'cat' and 'CAT'"),
        (["cat", "dog " * 12], "a photo of a {}.", 4, "'dog dog .*' would be cut off: its text has 19 tokens"),
        (["cat", "dog"], "a {}.", 13, "'cat' would be cut off: its text has 17 tokens and the model takes 16"),
        (["cat", "s"], "the{}", 1, "'cat' would be overwritten by prompts"),
        (["cat"], "a photo", 1, r"must hold '\{\}' once"),
    ],
)
def test_refusals_name_the_class(names, template, slots, message):
    with pytest.raises(ValueError, match=message):
        class_prompts(names, template, slots, TOKENIZER)


def test_a_single_string_is_refused():
    with pytest.raises(TypeError, match="must.*names.*'cat'"):
        class_prompts("cat", "a {}", 1, TOKENIZER)


def test_padding_is_on_the_right_whatever_the_tokenizer_says():
    tokenizer = tiny_processor().tokenizer
    tokenizer.padding_side = "left"
    assert class_prompts(["cat", "red cat"], "a {}", 1, tokenizer)["input_ids"][:, 0].tolist() == [BOS, BOS]


def test_max_length_overrides_the_tokenizers():
    with pytest.raises(ValueError, match="the model takes 6"):
        class_prompts(["cat", "dog"], "a photo of a {}.", 4, TOKENIZER, max_length=6)
