"""Adapters, classifiers, checkpoints and recipes that earlier versions wrote load, and say what they said then.

`write.py` made them, with the version that their folder names.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor

from peft_ncgeo import FewShotClassifier, ZeroShotClassifier
from peft_ncgeo.hub import create_card, hypothesis_template, load_adapter
from peft_ncgeo.protocols import EpisodeResults
from peft_ncgeo.training import Recipe, TrainingRecord

from .cases import BASES, NEW, answers, base, compared, losses, parts, pictures, setting, token_ids, trainer

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]
FOLDERS = sorted(Path(__file__).parent.glob("v*"))


def stored(part: str) -> list[Any]:
    """Every folder in this part of every version's."""
    found = [(folder, path.name) for folder in FOLDERS for path in sorted((folder / part).iterdir())]
    return [pytest.param(folder, f"{part}/{name}", id=f"{folder.name}-{name}") for folder, name in found]


each_version = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@cache
def words(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "outputs.json").read_text())


@cache
def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "outputs.safetensors")


def kept(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the stored outputs of a model, by the name of the output."""
    return {key.rpartition("/")[2]: value for key, value in tensors(folder).items() if key.startswith(f"{name}/")}


def place(folder: Path, kind: str) -> str:
    return str(folder / "bases" / BASES[kind][1])


def assert_said(found: dict[str, Tensor], said: dict[str, Tensor]) -> None:
    assert found
    assert found.keys() == said.keys()
    for what, value in found.items():
        torch.testing.assert_close(
            value, said[what], rtol=1e-5, atol=1e-5, msg=lambda text, what=what: f"{what}: {text}"
        )


WAYS = {
    "load_adapter": lambda folder, name, kind: load_adapter(folder / name, place(folder, kind)),
    "PEFT": lambda folder, name, kind: PeftModel.from_pretrained(base(kind, folder), str(folder / name)),
    "Transformers": lambda folder, name, kind: BASES[kind][0].from_pretrained(name),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("folder", "name"), stored("adapters"))
def test_adapters(folder, name, way, monkeypatch):
    """Features, logits and probabilities, whichever library loads them; their texts are read as they were."""
    monkeypatch.chdir(folder)  # the config names the base model as bases/...
    model = WAYS[way](folder, name, words(folder)[name]).eval()
    said = kept(folder, name)
    texts = {key: said.pop(key) for key in ("input_ids", "attention_mask")}
    assert_said(answers(model, texts, folder), said)
    assert_said(token_ids(next(iter(model.peft_config.values())), folder), texts)


@pytest.mark.parametrize(("folder", "name"), stored("few_shot"))
def test_few_shot_classifiers(folder, name):
    said = words(folder)[name]
    classifier = FewShotClassifier.from_pretrained(folder / name, place(folder, said["base"]))
    images = pictures(folder, "new")
    assert_said({"probabilities": classifier.predict_proba(images)}, kept(folder, name))
    assert classifier.predict(images) == said["predicted"]


@each_version
def test_what_a_trainer_left(folder, monkeypatch):
    """`save_model`'s folder alone: adapter, processor, and where the base model lies."""
    monkeypatch.chdir(folder)
    classifier = ZeroShotClassifier.from_pretrained("trainer_output")
    said = kept(folder, "trained/averaging")["probabilities"]
    assert_said({"probabilities": classifier.predict_proba(pictures(folder, "new"), NEW)}, {"probabilities": said})
    assert hypothesis_template(folder / "trainer_output") == words(folder)["trainer_output"]


@each_version
def test_what_was_published(folder):
    """Adapter and processor, and the record that a card is made from."""
    classifier = ZeroShotClassifier.from_pretrained(folder / "published", place(folder, "clip"))
    texts = token_ids(classifier.model.peft_config["default"], folder)
    assert_said(answers(classifier.model, texts, folder), kept(folder, "trained/class_means"))
    values = json.loads((folder / "published" / "record.json").read_text())
    record = TrainingRecord.from_dict(values)
    assert {key: record.to_dict()[key] for key in values} == values
    assert "SpaceAlignment" in str(create_card(classifier.model, record))


@each_version
def test_exported_classifiers(folder, monkeypatch):
    """By the class that was copied into their folder, as Transformers would use it."""
    file = importlib.util.spec_from_file_location("exported", folder / "export" / "exported_classifier.py")
    module = importlib.util.module_from_spec(file)
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where Transformers looks up what its annotations name
    file.loader.exec_module(module)
    model = module.ExportedClassifier.from_pretrained(str(folder / "export")).eval()
    pixels = AutoImageProcessor.from_pretrained(str(folder / "export"))(pictures(folder, "new"), return_tensors="pt")
    with torch.no_grad():
        assert_said({"probabilities": model(**pixels).logits.softmax(-1)}, kept(folder, "export"))
    assert model.config.id2label == dict(enumerate(NEW))


@pytest.mark.skipif(
    int(np.__version__.split(".")[0]) < 2, reason="Transformers reads random states of numpy 2 under numpy 2 alone"
)
@pytest.mark.parametrize(("folder", "name"), stored("checkpoints"))
def test_trainings_go_on(folder, name, tmp_path):
    """To the losses, multipliers and weights that the version itself came to."""
    name = name.partition("/")[2]
    run = trainer(name, folder, tmp_path)
    run.train(resume_from_checkpoint=str(folder / "checkpoints" / name))
    expected = words(folder)[f"checkpoints/{name}"]
    assert [pytest.approx(step, rel=1e-5, abs=1e-5) for step in expected] == losses(run)
    kind = "clip" if "probabilities" in kept(folder, f"trained/{name}") else "vit"
    trained = load_adapter(folder / "trained" / name, place(folder, kind))
    assert_said(get_peft_model_state_dict(run.model), get_peft_model_state_dict(trained))
    texts = token_ids(run.model.peft_config["default"], folder)
    assert_said(answers(run.model.eval(), texts, folder), kept(folder, f"trained/{name}"))


RECIPES = [
    pytest.param(v, f, id=f"{v.name}-{f.stem}") for v in FOLDERS for f in sorted((v / "recipes").rglob("*.yaml"))
]


@pytest.mark.parametrize(("folder", "file"), RECIPES)
def test_recipes(folder, file):
    """The same config, losses and callbacks with the same settings; new settings may have come."""
    recipe, said = Recipe.read(file), words(folder)[str(file.relative_to(folder))]
    assert recipe.args == said["args"]
    for key, made in parts(recipe).items():
        assert len(made) == len(said[key])
        for part, other in zip(made, said[key], strict=True):
            assert (part is None) == (other is None)
            if part is not None:
                now = {name: setting(part, name) for name in other["settings"]}
                assert {"name": type(part).__name__, "settings": now} == other


@each_version
def test_results_of_episodes(folder):
    results = EpisodeResults.load(folder / "episodes" / "results.json")
    assert compared(results) == pytest.approx(words(folder)["episodes"])


@each_version
def test_the_files_are_small(folder):
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 620_000
