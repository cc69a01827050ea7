"""Model cards: front matter, tables and text, from records written here and from a training."""

from __future__ import annotations

import ast
import html
import json
import re
import string
from copy import deepcopy
from dataclasses import replace

import numpy as np
import peft
import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

import peft_ncgeo
from peft_ncgeo import CoPAConfig, NPTConfig, PrototypeConfig
from peft_ncgeo.hub import create_card
from peft_ncgeo.hub.record import Component, TrainingRecord, record_model
from peft_ncgeo.losses import LanguageCollapse, OTPreservation

from ..conftest import tiny_clip, tiny_images, tiny_vit, tiny_vit_classifier
from ..training.runs import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*all of them get prompts"),
    pytest.mark.filterwarnings("ignore:num_classes=3, but the model names 5 labels"),
]
KEYS = {
    "base_model",
    "base_model_relation",
    "datasets",
    "language",
    "library_name",
    "license",
    "metrics",
    "model-index",
}
KEYS |= {"pipeline_tag", "tags"}


def record(**changes) -> TrainingRecord:
    """A training that helped on base classes and hurt on new ones."""
    base = {"accuracy": 0.5, "many": 0.75, "medium": None, "few": 0.25, "nc1": 2.0, "modality_gap": 1.25}
    tuned = {"accuracy": 0.8125, "many": 0.875, "medium": None, "few": 0.625, "nc1": 0.5, "modality_gap": 123.4}
    sets = {
        "base": {"size": 1600, "classes": 3, "before": base, "after": tuned},
        "new": {"size": 20, "classes": 2, "before": {"accuracy": 0.7}, "after": {"accuracy": 0.6}},
    }
    values = {
        "task": "zero-shot-image-classification",
        "adapter": Component("NPTConfig", {"num_text_tokens": 4, "num_vision_tokens": 4}),
        "base_model": "user/tiny-clip",
        "template": "a photo of a {}.",
        "terms": [Component("CrossEntropy"), Component("OTPreservation", {"weight": 2.0}), Component("Unknown")],
        "class_names": ["red cat", "blue dog", "green bird"],
        "class_counts": [3, 1200, 40],
        "arguments": {"learning_rate": 0.1, "optim_args": "momentum=0.9", "seed": 1, "augmentation": "none"},
        "changed": 2,
        "seed": 1,
        "steps": 2000,
        "epochs": 2.5,
        "sets": sets,
        "geometry_set": "base",
        "thresholds": [20, 100],
        "versions": {"Python": "3.11", "peft": "0.21"},
    }
    return TrainingRecord(**{**values, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> TrainingRecord:
    """Return the record of a short training."""
    sets = {"base": tiny_images(15, seed=1), "new": tiny_images(9, ["red bird", "blue tree", "green cat"], seed=2)}
    tail = tiny_images(25).select([i for i in range(25) if i // 5 <= 4 - i % 5])
    terms = [OTPreservation(weight=2.0, solver="entropic"), LanguageCollapse(budget=0.1)]
    run = trainer(tmp_path_factory.mktemp("out"), losses=terms, train=tail, eval_dataset=sets, max_steps=2)
    run.train()
    return replace(run.record(), base_model="user/tiny-clip")


def loaded(card: ModelCard, folder) -> ModelCard:
    """The card as others read it from its file."""
    card.save(folder / "README.md")
    return ModelCard.load(folder / "README.md")


def sections(card: ModelCard) -> dict[str, str]:
    title, *parts = re.split(r"^## ", card.text, flags=re.MULTILINE)
    return {"": title, **dict(part.split("\n", 1) for part in parts)}


def cells(row: str) -> list[str]:
    """A table's row as GitHub reads it, where a backslash takes its meaning from the punctuation behind it."""
    found, text, i = [], "", 0
    assert row.startswith("| ")
    assert row.endswith(" |")
    while i < len(row):
        if row[i] == "\\" and row[i + 1] in string.punctuation:
            text, i = text + row[i + 1], i + 2
            continue
        if row[i] == "|":
            found.append(text.strip())
            text = ""
        else:
            assert row[i] not in "<>", row
            text += row[i]
        i += 1
    return [html.unescape(cell) for cell in found[1:]]


def table(text: str) -> list[list[str]]:
    """The only table in a text, as wide in every row as in its head."""
    blocks = [block for block in re.split(r"\n\s*\n", text) if block.lstrip().startswith("|")]
    assert len(blocks) == 1, blocks
    rows = [cells(line) for line in blocks[0].strip().splitlines()]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert all(re.fullmatch(":?-+:?", cell) for cell in rows[1])
    return [rows[0], *rows[2:]]


# Front matter


def test_front_matter(tmp_path):
    options = {"license": "apache-2.0", "datasets": ["user/birds", "user/fish"], "language": ["en", "de"]}
    card = create_card(record=record(), repo_id="user/mine", tags=["birds", "peft_ncgeo"], **options)
    data = loaded(card, tmp_path).data
    assert (data.library_name, data.pipeline_tag) == ("peft", "zero-shot-image-classification")
    assert (data.base_model, data.base_model_relation) == ("user/tiny-clip", "adapter")
    assert data.tags == ["peft_ncgeo", "base_model:adapter:user/tiny-clip", "birds"]
    assert (data.license, data.datasets, data.language) == ("apache-2.0", ["user/birds", "user/fish"], ["en", "de"])
    assert data.model_name == "mine"
    raw = yaml.safe_load(card.content.split("---")[1])
    assert raw.keys() == KEYS
    assert all(raw.values())


def test_model_index_holds_the_records_numbers(tmp_path):
    data = loaded(create_card(record=record(), datasets="user/birds", dataset_name='a: "b" # c'), tmp_path).data
    found = {result.metric_name: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {
        "base accuracy": 0.8125,
        "new accuracy": 0.6,
        "harmonic mean of base and new": pytest.approx(2 * 0.8125 * 0.6 / 1.4125, abs=5e-5),
        "many-shot accuracy": 0.875,
        "few-shot accuracy": 0.625,
    }
    assert found["base accuracy"].metric_type == "accuracy"
    for result in data.eval_results:
        assert result.task_type == "zero-shot-image-classification"
        assert (result.dataset_type, result.dataset_name) == ("user/birds", 'a: "b" # c')


def test_model_index_of_a_training(trained, tmp_path):
    after = {name: entry["after"] for name, entry in trained.sets.items()}
    base, new = after["base"]["accuracy"], after["new"]["accuracy"]
    expected = {"base accuracy": base, "new accuracy": new}
    expected["harmonic mean of base and new"] = 2 * base * new / (base + new)
    expected |= {f"{group}-shot accuracy": after["base"][group] for group in ("many", "medium", "few")}
    found = loaded(create_card(record=trained), tmp_path).data.eval_results
    assert {result.metric_name: result.metric_value for result in found} == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("base", [None, "folder", "/somewhere/base"])
def test_a_base_without_an_id_is_not_made_up(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    card = create_card(record=record(base_model=base))
    assert card.data.base_model is None
    assert card.data.tags == ["peft_ncgeo"]
    assert "/somewhere" not in card.content
    assert create_card(record=record(base_model=base), base_model_id="user/x").data.base_model == "user/x"


# Text


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("source", ["written", "trained", "model", "few-shot", "head"])
def test_every_section_says_something(trained, source, bare):
    torch_models = {
        "model": lambda: get_peft_model(tiny_clip(), LoraConfig(target_modules=["q_proj"])),
        "few-shot": lambda: get_peft_model(tiny_vit(), CoPAConfig()),
        "head": lambda: get_peft_model(tiny_vit_classifier(), PrototypeConfig(num_vision_tokens=2)),
    }
    if source in torch_models:
        known = record_model(torch_models[source]())
    else:
        known = record() if source == "written" else trained
    if bare:
        known = replace(known, sets={}, geometry_set=None, class_names=[], class_counts=[], arguments={}, changed=0)
    card = create_card(record=known, figure=None if bare else "geometry.png")
    parts = sections(card)
    assert {"", "Use it", "Training", "Limits", "Versions"} <= parts.keys()
    assert all(re.search(r"\w", re.sub(r"<.*?>|```\w*", "", body)) for body in parts.values()), parts
    assert not re.search(r"\b(None|nan|inf|undefined)\b|information needed|\{\{|\}\}|\{%", card.text)
    assert card.text.count("<details>") == card.text.count("</details>")
    assert card.text.count("```") % 2 == 0
    assert "\n\n\n" not in card.text.strip()
    first = re.findall(r"```python\n(.*?\n)```\n", card.text, flags=re.DOTALL)[0]
    assert first.startswith("import peft_ncgeo\n")
    ast.parse(first)


def test_without_evaluation_there_are_no_results():
    card = create_card(record=record(sets={}, geometry_set=None))
    assert not {"Results", "Geometry of the features"} & sections(card).keys()
    assert card.data.eval_results is None
    assert yaml.safe_load(card.content.split("---")[1]).keys() == KEYS - {"model-index", "metrics", "datasets"} - {
        "license",
        "language",
    }
    assert "It was not evaluated." in sections(card)["Limits"]


def test_without_training_there_is_the_adapter_alone():
    model = get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=2))
    model.get_base_model().config._name_or_path = "user/tiny-clip"
    card = create_card(model)
    assert sections(card).keys() == {"", "Use it", "Training", "Limits", "Versions", "Citation"}
    assert "steps" not in sections(card)["Training"]
    with pytest.raises(ValueError, match="needs a model or a record"):
        create_card()


def test_results_before_and_after():
    rows = table(sections(create_card(record=record()))["Results"])
    assert rows == [
        ["accuracy in %", "zero-shot", "this adapter"],
        ["base (3 classes, 1,600 images)", "50.0", "81.2"],
        ["new (2 classes, 20 images)", "70.0", "60.0"],
        ["harmonic mean of base and new", f"{200 * 0.5 * 0.7 / 1.2:.1f}", f"{200 * 0.8125 * 0.6 / 1.4125:.1f}"],
        ["many-shot classes", "75.0", "87.5"],
        ["few-shot classes", "25.0", "62.5"],
    ]


def test_mean_and_deviation_over_seeds(tmp_path):
    runs = [
        {"seed": 1, "base": 81.25, "new": 60.0, "few": None, "ignored": 3.0},
        {"seed": 2, "base": 70.5, "new": 64.0, "few": 40.0, "ignored": 4.0},
        {"seed": 5, "base": 77.0, "new": float("nan"), "few": None, "ignored": 5.0},
    ]
    card = create_card(record=record(), runs=runs)
    rows = {row[0].split(" (")[0]: row[-1] for row in table(sections(card)["Results"])}
    base, new = [81.25, 70.5, 77.0], [60.0, 64.0]
    assert rows["base"] == f"{np.mean(base):.1f} ± {np.std(base, ddof=1):.1f}"
    assert rows["new"] == f"{np.mean(new):.1f} ± {np.std(new, ddof=1):.1f}"
    assert rows["few-shot classes"] == ""  # other seeds may have drawn other classes as rare
    assert "ignored" not in card.text
    assert "over 3 seeds (1, 2, 5)" in card.text
    assert "One seed was run" not in card.text
    kept = record(sets={}, geometry_set=None, runs=[{"base": 80.0}, {"base": 90.0, "new": None}])
    data = loaded(create_card(record=kept), tmp_path).data
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {"base accuracy": 0.85}
    assert table(sections(create_card(record=kept))["Results"])[1:] == [["base", "85.0 ± 7.1"]]


STRANGE = [
    'say "hi"',
    "back\\slash",
    "two\nlines",
    "a|b",
    "back\\|both",
    "`code`",
    "```",
    "<b>bold</b>",
    "&amp;",
    "猫 für ç·é",
    "[link](x)",
    "*star* _low_ ~~no~~",
    "{{ name }} {% if %}",
    "it's",
    "# head",
]


@pytest.mark.parametrize("counts", [False, True])
def test_strange_class_names_keep_the_table_whole(counts):
    for turn in range(0, len(STRANGE), 3):  # the first three are in the snippet
        names = STRANGE[turn:] + STRANGE[:turn]
        known = record(class_names=names, class_counts=list(range(1, len(names) + 1)) if counts else [])
        card = create_card(record=known)
        head, *rows = table(sections(card)["Classes"])
        shown = [" ".join(name.split()) for name in (names[::-1] if counts else names)]
        assert head == (["class", "images", ""] if counts else ["class"])
        assert [row[0] for row in rows] == shown
        snippet = re.findall(r"```python\n(.*?\n)```\n", card.text, flags=re.DOTALL)[0]
        call = next(node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.keyword))
        assert ast.literal_eval(call.value) == names[:3]


def test_a_thousand_classes_are_folded_up():
    names = [f"class {i}" for i in range(1000)]
    body = sections(create_card(record=record(class_names=names, class_counts=[1000 - i for i in range(1000)])))[
        "Classes"
    ]
    assert "<details><summary>All 1,000 classes</summary>\n\n|" in body
    rows = table(body)
    assert [row[0] for row in rows[1:]] == names
    assert rows[1][1:] == ["1,000", "█" * 24]
    assert rows[-1][1:] == ["1", "█"]
    assert re.search(r"\|\n\n</details>", body)
    assert "1,000 classes, from 1,000 training images down to 1" in body


def test_arguments_with_bars_and_backticks_keep_their_tables():
    values = {"template": "a | b `c`\nd", "seed": 1}
    body = sections(create_card(record=record(arguments=values, changed=1)))["Training"]
    changed, others = (table(part) for part in body.split("<details>"))
    assert changed[1:] == [["`template`", "`` a | b `c` d ``"]]
    assert others[1:] == [["`seed`", "`1`"]]


@pytest.mark.parametrize(
    "config",
    [
        NPTConfig.maple(text_init=[6, 7], text_depth=3, vision_depth=2, template='the "{}".'),
        LoraConfig(r=2, target_modules=["v_proj", "q_proj"], lora_dropout=0.1),
        PrototypeConfig(num_classes=3, geometry="minority_margin", class_counts=[9, 4, 1]),
        CoPAConfig(shared=True, temperature=0.5),
    ],
)
def test_code_makes_the_config_again(config):
    base = {"PrototypeConfig": tiny_vit_classifier, "CoPAConfig": tiny_vit}.get(type(config).__name__, tiny_clip)
    before = deepcopy(config).to_dict()
    card = create_card(get_peft_model(base(), config))
    code = re.findall(r"```python\n(.*?\n)```\n", sections(card)["Training"], flags=re.DOTALL)[0]
    again = eval(code, {**vars(peft), **vars(peft_ncgeo), "NPTConfig": NPTConfig})
    written = {"token_ids", "num_features"}  # when an adapter is made
    assert {k: v for k, v in again.to_dict().items() if k not in written} == {
        k: v for k, v in before.items() if k not in written
    }


# Limits


def test_a_drop_on_new_classes_is_told():
    said = 'On the classes of "new", not trained, accuracy fell from 70.0 to 60.0.'
    unknown = "Accuracy on classes other than those of training was not measured."
    known = record()
    assert said in sections(create_card(record=known))["Limits"]
    known.sets["new"]["after"]["accuracy"] = 0.71
    better = sections(create_card(record=known))["Limits"]
    assert "accuracy fell" not in better
    assert unknown not in better
    del known.sets["new"]
    assert unknown in sections(create_card(record=known))["Limits"]
    assert unknown not in sections(create_card(record=known, runs=[{"new": 60.0}, {"new": 61.0}]))["Limits"]


def test_few_images_and_one_seed_are_told():
    limits = sections(create_card(record=record()))["Limits"]
    assert "The rarest class has 3 training image" in limits
    assert "One seed was run" in limits
    assert "The first 4 tokens of it are replaced" in limits
    assert "rarest" not in sections(create_card(record=record(class_counts=[10, 20, 30])))["Limits"]


# Records


@pytest.mark.parametrize("source", ["written", "trained"])
def test_a_record_survives_json(trained, source):
    known = record() if source == "written" else trained
    again = TrainingRecord.from_dict(json.loads(json.dumps(known.to_dict(), allow_nan=False)))
    assert again == replace(known, snapshots=None)
    assert str(create_card(record=again)) == str(create_card(record=known))
