"""The cards in `hub_cards`: current, whole, and of trainings that can be repeated."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from peft_ncgeo.hub.card import TEMPLATE

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "hub_cards"
specification = importlib.util.spec_from_file_location("make_cards", ROOT / "examples" / "make_cards.py")
make_cards = importlib.util.module_from_spec(specification)
specification.loader.exec_module(make_cards)


@pytest.mark.parametrize("name", make_cards.CARDS)
def test_card_is_current(name):
    folder = CARDS / name
    assert (folder / "README.md").read_text(encoding="utf-8") == make_cards.render(name, folder), "run `make cards`"
    assert (folder / "geometry.png").read_bytes().startswith(b"\x89PNG")
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.eval_results
    assert "More information needed" not in card.content
    assert "None" not in card.text
    assert f"({name}/README.md)" in (CARDS / "README.md").read_text()


def test_template_is_the_package_own():
    assert (CARDS / "template.md").read_text() == TEMPLATE.read_text()
    assert {path.name for path in CARDS.iterdir() if path.is_dir()} == set(make_cards.CARDS)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_record_is_what_training_gives():
    kept = json.loads((CARDS / "copa" / "record.json").read_text())
    again = make_cards.CARDS["copa"].train(kept["seed"])
    assert again.class_counts == kept["class_counts"]
    for moment in ("before", "after"):
        assert again.sets["test"][moment]["accuracy"] == pytest.approx(
            kept["sets"]["test"][moment]["accuracy"], abs=0.01
        )
    assert again.row() == pytest.approx(kept["runs"][0], abs=1.0)


def test_every_method_is_cited():
    keys = {"npt": "zhu2023npt", "cpt": "guo2026cpt", "prompt_ot": "chen2025promptot", "budget": "menon2021logit"}
    keys |= {"space_alignment": "wang2025spacealignment", "prototypes": "gill2023prototypes", "copa": "tian2024copa"}
    for name in make_cards.CARDS:
        assert keys[name] in (CARDS / name / "README.md").read_text(), name
