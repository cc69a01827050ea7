"""The papers that cards cite."""

from __future__ import annotations

import re

import peft

import peft_ncgeo
from peft_ncgeo import data, few_shot, losses, training
from peft_ncgeo.hub import create_card, references
from peft_ncgeo.hub.record import Component

from .test_card import record, sections


def test_every_reference_is_in_the_bibliography():
    entries = references._entries()
    known = [*references._PARTS.values(), *references._PROMPTS.values(), references._COPA, references._ASYMMETRIC]
    used = {key for reference in known for key in reference.keys} | {"li2021url", "li2022tsa"}
    assert used == entries.keys()
    for key, entry in entries.items():
        assert re.match(rf"@\w+\{{{key},\n", entry)
        assert entry.count("{") == entry.count("}")
        for field in ("title", "author", "year", "eprint"):
            assert re.search(rf"^  {field} +=", entry, flags=re.MULTILINE), (key, field)


def test_references_go_by_names_that_exist():
    places = (peft_ncgeo, data, few_shot, losses, training, peft)
    assert [name for name in references._PARTS if not any(hasattr(place, name) for place in places)] == []


def test_every_method_used_is_cited_once():
    terms = [Component(name) for name in ("LanguageCollapse", "GeometricDebiasing", "PrototypeSupCon", "CrossEntropy")]
    adapter = Component("PrototypeConfig", {"num_vision_tokens": 2})
    card = create_card(record=record(adapter=adapter, terms=terms, task="image-classification", template=None))
    keys = re.findall(r"^@\w+\{(.*),", sections(card)["Citation"], flags=re.MULTILINE)
    assert keys == ["jia2022vpt", "gill2023prototypes", "zhu2023npt", "khosla2020supcon"]
    few_shot = create_card(
        record=record(adapter=Component("CoPAConfig", {"shared": True, "residual_adapters": True}), terms=[])
    )
    assert re.findall(r"^@\w+\{(.*),", few_shot.text, flags=re.MULTILINE) == ["li2021url", "li2022tsa"]
    other = create_card(record=record(adapter=Component("IA3Config"), terms=[]))
    assert "`IA3Config` for" in other.text
    assert "Citation" not in sections(other)
