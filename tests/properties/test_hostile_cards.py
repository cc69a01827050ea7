"""Cards of records that hold anything: every text is shown, and none is read as Markdown, HTML, YAML or Python."""

from __future__ import annotations

import ast
import re
import string
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import strategies as st

from peft_ncgeo.hub import create_card
from peft_ncgeo.hub.record import Component, TrainingRecord
from peft_ncgeo.markdown import code_cell, escape, literal

from ..hub.test_card import cells
from ..profiles import cases

PIECES = [
    *("<script>alert(1)</script>", "<img src=https://evil.example/x.png>", "![x](https://evil.example/x.png)"),
    *(
        "[x](javascript:x)",
        "</details>",
        "<!--",
        "`",
        "``",
        "```",
        "~~~",
        "\n",
        "\r\n",
        "\n\n# head\n",
        "\n---\n",
        "---",
    ),
    *("|", "\\|", "\\", '"', "'", "{{ 1 }}", "{% if x %}", "&lt;", "&", "*", "**", "_", "~", "$x$", ": ", "# ", "- "),
    *(
        "\u2028",
        "\u202e",
        "\x00",
        "\ud800",
        "猫",
        "👩\u200d🚀",
        "a_b",
        "x",
        " ",
        "@",
        "!!python/name:os.system",
        "[",
        "]",
    ),
]
hostile = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join) | st.text(min_size=1, max_size=8)
ATTACKS = [
    "<script>x</script>",
    "![x](https://evil.example/x.png)",
    "```\n<script>x</script>\n```",
    "a`|`<b>\\",
    "\ud800",
]

TEXTS = {  # field -> the record with a text there
    "adapter": lambda text: {"adapter": Component(text, {})},
    "setting": lambda text: {"adapter": Component("LoraConfig", {text: 1, "r": text})},
    "tokens": lambda text: {"adapter": Component("NPTConfig", {"num_text_tokens": text})},
    "base_model": lambda text: {"base_model": text},
    "base_model_with_a_slash": lambda text: {"base_model": f"user/{text}".replace("/", "-").replace("-", "/", 1)},
    "template": lambda text: {"template": text, "adapter": Component("LoraConfig", {"r": 2})},
    "own_template": lambda text: {"template": text},
    "term": lambda text: {"terms": [Component(text, {"weight": 2.0}), Component("OTPreservation", {text: text})]},
    "class_names": lambda text: {"class_names": [text, "dog", "bird"]},
    "argument": lambda text: {"arguments": {text: 1, "seed": text}, "changed": 1},
    "device": lambda text: {"device": text},
    "dtype": lambda text: {"dtype": text},
    "seed": lambda text: {"seed": text},
    "versions": lambda text: {"versions": {text: "1", "peft": text}},
    "set": lambda text: {"sets": {"base": ENTRY, text: {**ENTRY, "trained": False}}, "geometry_set": "base"},
    "geometry_set": lambda text: {"sets": {text: ENTRY}, "geometry_set": text},
    "runs": lambda text: {"runs": [{"seed": text, "base": 1.0}, {"seed": 2, "base": 2.0, text: 3.0}]},
}
OPTIONS = {  # argument of the card -> its value with a text in it
    "repo_id": lambda text: f"user/{text}",
    "base_model_id": lambda text: text,
    "license": lambda text: text,
    "datasets": lambda text: [text, "user/birds"],
    "dataset_name": lambda text: text,
    "language": lambda text: ["en", text],
    "tags": lambda text: [text, "birds"],
    "figure": lambda text: text,
    "revision": lambda text: text,
}
ENTRY = {
    "size": 10,
    "classes": 3,
    "before": {"accuracy": 0.75, "nc1": 1.0},
    "after": {"accuracy": 0.5, "nc1": 0.5},
}


def card(place: str, text: str) -> ModelCard:
    values: dict[str, Any] = {
        "task": "zero-shot-image-classification",
        "adapter": Component("NPTConfig", {"num_text_tokens": 4}),
        "base_model": "user/base",
        "template": "a photo of a {}.",
        "class_names": ["cat", "dog", "bird"],
        "class_counts": [3, 2, 1],
        "steps": 2,
        "seed": 1,
        "versions": {"peft": "1"},
    }
    changes = TEXTS[place](text) if place in TEXTS else {}
    options = {place: OPTIONS[place](text)} if place in OPTIONS else {}
    return create_card(record=TrainingRecord(**{**values, **changes}), **options)


def fences(text: str) -> list[str]:
    """Lines that begin or end a block of code."""
    return [line.strip() for line in re.split(r"\r\n|\n|\r", text) if re.match(r" {0,3}(```|~~~)", line)]


def live(text: str) -> str:
    """Return the part of a text that is read as Markdown: no code blocks, no code spans, no escaped characters."""
    text = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    found, i = "", 0
    while i < len(text):
        if text[i] == "\\" and text[i + 1 : i + 2] in (*string.punctuation,):
            i += 2
            continue
        run = re.match("`+", text[i:])
        if run:
            # a cell ends at a bar, and with it the code in it
            closed = re.match(rf"{run[0]}(?!`)((?:[^|\n]|(?<=\\)\|)*?[^`|\n])??{run[0]}(?!`)", text[i:])
            i += len(closed[0]) if closed else len(run[0])
            continue
        found, i = found + text[i], i + 1
    return found


def skeleton(text: str) -> dict[str, Any]:
    """Return a page's structure without its words: headings, code blocks, tables, lists, links, pictures and tags."""
    read = live(text)
    return {
        "headings": re.findall(r"^#+ (?!user)[A-Z].*", re.sub(r"^# .*", "", text, count=1, flags=re.MULTILINE), re.M),
        "fences": fences(text),
        "tables": [read_row.count("|") for read_row in read.splitlines() if read_row.startswith("|")],
        "items": len(re.findall(r"^- ", read, re.M)),
        "tags": re.findall(r"<[^>\n]*>?", read),
        "pictures": re.findall(r"!\[[^\]]*\]", read),
        "links": len(re.findall(r"\]\(", read)),
    }


@cases(2)
@given(place=st.sampled_from([*TEXTS, *OPTIONS]), text=hostile)
def test_a_text_changes_nothing_but_words(tmp_path_factory, place, text):
    check(tmp_path_factory.getbasetemp(), place, text)


@pytest.mark.parametrize("place", [*TEXTS, *OPTIONS])
@pytest.mark.parametrize("text", ATTACKS, ids=range(len(ATTACKS)))
def test_known_attacks_in_every_place(tmp_path, place, text):
    check(tmp_path, place, text)


def check(folder: Any, place: str, text: str) -> None:
    made, plain = card(place, text), card(place, "word")
    shape, expected = skeleton(made.text), skeleton(plain.text)
    if place in ("base_model", "base_model_with_a_slash", "base_model_id"):  # linked to where it is an id
        shape["links"], expected["links"] = 0, 0
    assert shape == expected, made.text
    made.save(folder / "README.md")
    again = ModelCard.load(folder / "README.md")
    assert again.data.to_dict() == made.data.to_dict()
    assert (yaml.safe_load(made.content.split("\n---\n")[0].removeprefix("---\n"))) is not None
    for block in re.findall(r"^```python\n(import .*?)^```$", made.text, flags=re.DOTALL | re.MULTILINE):
        ast.parse(block)


@cases(4)
@given(text=hostile)
@example(text="猫 ناو\u200cنیس")
def test_what_is_shown_is_what_was_written(text):
    assert ast.literal_eval(literal(text)) == text
    assert literal(text).isprintable()
    shown = " ".join(text.split())
    if not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]", shown):
        assert cells(f"| {escape(text)} | x |") == [shown, "x"]
        parts = live(f"| {code_cell(text)} | x |")
        assert parts.count("|") == 3
        assert "<" not in parts
