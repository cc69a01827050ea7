"""Cards of what is not usual: odd names of sets, runs that do not belong together, models that only give features."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
from peft import get_peft_model

from peft_ncgeo import CoPAConfig, NPTConfig
from peft_ncgeo.hub import create_card
from peft_ncgeo.hub.record import Component
from peft_ncgeo.losses import OTPreservation

from ..conftest import tiny_vit
from ..training.runs import trainer
from .test_card import record, sections, table


def test_runs_of_several_methods_or_twice_the_same_seed_are_refused():
    with pytest.raises(ValueError, match="runs hold several methods"):
        create_card(record=record(), runs=[{"method": "a", "seed": 1}, {"method": "b", "seed": 1}])
    with pytest.raises(ValueError, match=r"runs hold a seed twice: \[1, 1\]"):
        create_card(record=record(), runs=[{"seed": 1, "base": 1.0}, {"seed": 1, "base": 2.0}])


def test_sets_called_as_rows_are_kept_apart():
    entry = deepcopy(record().sets["base"])
    named = record(sets={"base": deepcopy(entry), "many": entry, "H": deepcopy(entry), "se|ed": deepcopy(entry)})
    rows = {row[0]: row[1:] for row in table(sections(create_card(record=named))["Results"])[1:]}
    assert rows["many (set)"] == ["50.0", "81.2"]
    assert rows["many-shot classes"] == ["75.0", "87.5"]
    assert "H (set)" in rows
    assert any("se" in name and "ed (3 classes" in name for name in rows)


def test_a_template_that_no_config_holds_is_read_from_the_file_beside_the_adapter():
    lora = record(adapter=Component("LoraConfig", {"r": 2}), template="the {} there")
    text = create_card(record=lora).text
    assert 'from_pretrained("user/adapter")' in text
    assert 'hypothesis_template("user/adapter")' in text


def test_a_branch_stands_in_the_snippets():
    text = create_card(record=record(), revision="dev").text
    assert 'from_pretrained("user/adapter", revision="dev")' in text
    assert "pipeline(" not in text


def test_what_is_neither_read_nor_classified_with_gets_no_such_snippet():
    features = create_card(get_peft_model(tiny_vit(), NPTConfig.vpt(vision_depth=2)))
    assert features.data.pipeline_tag == "image-feature-extraction"
    assert "pipeline(" not in features.text
    assert "load_adapter" in features.text
    heads = create_card(get_peft_model(tiny_vit(), CoPAConfig()))  # without prototypes it classifies nothing
    assert "FewShotClassifier" not in heads.text


def test_precision_best_checkpoint_and_no_training_are_told():
    told = record(dtype="bfloat16", arguments={"load_best_model_at_end": True}, changed=1)
    limits = sections(create_card(record=told))["Limits"]
    assert "The base model was run in bfloat16" in limits
    assert "The best of several checkpoints" in limits
    assert ", trained" not in create_card(record=record(steps=0)).text.split("##")[0]
    assert "0 training images each" in create_card(record=record(class_counts=[0, 0, 0], thresholds=None)).text


class Noisy(OTPreservation):
    def __init__(self, weights_file: str = "", **options):
        super().__init__(**options)
        self.weights_file, self.webhook = weights_file, "https://hooks.example/T000"


def test_what_others_objects_hold_is_not_told(tmp_path):
    run = trainer(tmp_path, losses=[Noisy("/mnt/somebody/secret.pt", weight=np.float64(0.1))], max_steps=1)
    run.train()
    told = run.record().terms[1]
    assert told == Component("Noisy", {"weight": 0.1})
    text = create_card(record=run.record()).text
    assert "secret" not in text
    assert "hooks.example" not in text
