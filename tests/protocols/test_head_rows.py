"""Rows of heads on cached features: what `adapt` gives by hand, what texts answer, and what has no answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_ncgeo import ZeroShotClassifier, adapt
from peft_ncgeo.data import base_new_split
from peft_ncgeo.protocols import Task, base_to_new, cross_dataset, run_cells
from peft_ncgeo.reports import linear_probe, nearest_class_mean
from peft_ncgeo.training import Recipe, train_stages

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from ..errors import message

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SIX = [*NAMES, "red tree"]
TRAIN, TEST = tiny_images(30, SIX), tiny_images(60, SIX, 1)
TUNED = {
    "peft": {"peft": {"LoraConfig": {"target_modules": ["q_proj"], "r": 2}}},
    "stages": {"stages": [{"peft": {"LNTuningConfig": {"target_modules": ["layer_norm1"]}}}, {"rows": "texts"}]},
}
ARGS = {"max_steps": 3, "batch_size": 8, "learning_rate": 0.05}


def recipe(head, name="headed", **others):
    return Recipe.from_dict(name, {"head": head, **others})


def share(predicted, dataset) -> float:
    """Accuracy in percent of predicted names, or of predicted classes."""
    names = np.array(dataset.features["label"].names)
    found = np.asarray(predicted)
    found = found if found.dtype.kind == "U" else names[found]
    return 100 * float(np.mean(found == names[dataset["label"][:]]))


@torch.no_grad()
def features(dataset):
    pixels = tiny_processor().image_processor(images=dataset["image"][:], return_tensors="pt")["pixel_values"]
    return tiny_clip().eval().get_image_features(pixel_values=pixels).pooler_output.numpy()


def by_hand(model, head, train, seed):
    images, names = train["image"][:], train.features["label"].names
    given = {"processor": tiny_processor(), "class_names": names, "seed": seed}
    return adapt(model, images, train["label"][:], head=head, **given)


def test_rows_on_the_frozen_model(tmp_path):
    """Base by the head; new by the texts, by the head where it takes new names, or by nothing."""
    heads = ["TipAdapter", "GaussianDiscriminant", "LPPlusPlus", "NearestClassMean", "LinearProbe"]
    recipes = [Recipe("zero-shot"), *(recipe({name: {}}, name) for name in heads)]
    data = TRAIN, TEST, tiny_clip, tiny_processor(), tmp_path
    results = base_to_new(recipes, *data, tails={"a": {"tau": 1.0, "n_max": 5}}, seeds=(3,))
    rows = {row["method"]: row for row in results.rows}
    base, new = base_new_split(TEST).values()
    train = base_new_split(TRAIN)["base"]
    for row, given in zip(results.rows[1:], recipes[1:], strict=True):
        classifier, names = by_hand(tiny_clip(), given.head(), train, 3), new.features["label"].names
        assert row["base"] == pytest.approx(share(classifier.predict(base["image"][:]), base))
        if classifier.head.takes_new_names:
            assert row["new"] == pytest.approx(share(classifier.predict(new["image"][:], class_names=names), new))
    texts = ZeroShotClassifier(tiny_clip(), tiny_processor()).predict(new["image"][:], new.features["label"].names)
    for name in ("LPPlusPlus", "TipAdapter", "zero-shot"):
        assert rows[name]["new"] == pytest.approx(share(texts, new))
    assert rows["LPPlusPlus"]["base"] != rows["zero-shot"]["base"]
    known = features(train), train["label"][:], features(base)
    assert rows["NearestClassMean"]["base"] == pytest.approx(share(nearest_class_mean(*known), base))
    assert rows["LinearProbe"]["base"] == pytest.approx(share(linear_probe(*known).predicted, base))
    for name in heads[3:]:
        assert rows[name]["new"] is rows[name]["H"] is None
    assert f"| a | LinearProbe | {rows['LinearProbe']['base']:.1f} | - | - |" in results.markdown()


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNED)
def test_rows_on_a_tuned_model(tmp_path, name):
    """The head reads the features, and the template, of the model as training left it."""
    base, new = base_new_split(TEST).values()
    task = Task(base_new_split(TRAIN)["base"], {"base": base, "new": new})
    headed = recipe({"LPPlusPlus": {}}, **TUNED[name], args=ARGS)

    def after(trainer, evaluate):
        model = trainer.extractor.model
        texts = ZeroShotClassifier(model, tiny_processor(), trainer.task.template)
        predicted = texts.predict(new["image"][:], new.features["label"].names)
        head = by_hand(model, headed.head(), task.train, 2)
        found = {"by_hand": share(head.predict(base["image"][:]), base), "texts": share(predicted, new)}
        return found | {"again": evaluate()["base"]}

    data = {"a": lambda seed: task}, tiny_clip, tiny_processor(), tmp_path
    (row,) = run_cells([headed], *data, (2,), after=after)
    assert row["base"] == pytest.approx(row["by_hand"]) == row["again"]
    assert row["new"] == pytest.approx(row["texts"])
    assert row["seconds"] > 0


def test_a_cell_is_of_one_head_and_its_fields(tmp_path):
    task = Task(TRAIN, {"some": TEST.select(range(6))})

    def go(folder, head):
        return run_cells([recipe(head)], {"a": lambda seed: task}, tiny_clip, tiny_processor(), folder, (1,))

    first = go(tmp_path, {"LPPlusPlus": {"iterations": 5}})
    assert go(tmp_path, {"LPPlusPlus": {"iterations": 5}}) == first
    for other in ({"LPPlusPlus": {"iterations": 6}}, {"NearestClassMean": {}}):
        assert "another recipe" in message(lambda other=other: go(tmp_path, other))


def test_what_has_no_head_and_no_answer(tmp_path):
    other = {"other": tiny_images(4, ["tree", "dog"])}
    head = recipe({"NearestClassMean": {}})
    (row,) = cross_dataset([head], TRAIN, other, tiny_clip, tiny_processor(), tmp_path, shots=2, seeds=(1,)).rows
    assert row["other"] is row["average"] is None
    task = Task(tiny_images(10), {"all": tiny_images(10)})
    data = {"a": lambda seed: task}, tiny_vit_classifier, tiny_processor(), tmp_path / "vit"
    assert "dual encoder" in message(lambda: run_cells([head], *data, (1,)))
    staged = recipe({"CLAP": {}}, **TUNED["stages"])
    folder = tmp_path / "stages"
    assert "head CLAP" in message(lambda: train_stages(staged, tiny_clip(), TRAIN, tiny_processor(), folder))
    assert not folder.exists()


def test_rows_without_training_of_a_model_in_half_precision(tmp_path):
    """Nothing is trained, so no weight in half precision can lose small steps."""
    some = TEST.select(range(18))
    recipes = [Recipe("zero-shot"), recipe({"NearestClassMean": {}})]
    data = {"a": lambda seed: Task(TRAIN, {"some": some})}, lambda: tiny_clip().half(), tiny_processor(), tmp_path
    texts, means = run_cells(recipes, *data, (1,))
    predicted = ZeroShotClassifier(tiny_clip().half(), tiny_processor()).predict(some["image"][:], SIX)
    assert texts["some"] == pytest.approx(share(predicted, some))
    head = by_hand(tiny_clip().half(), recipes[1].head(), TRAIN, 1)
    assert means["some"] == pytest.approx(share(head.predict(some["image"][:]), some))
    assert "trainable" not in texts


def test_sets_that_a_table_cannot_hold(tmp_path):
    """Names of a row's own columns, labels that are texts or lists, and streams: one line before any cell."""

    def go(train, **test):
        task = Task(train, test)
        data = {"a": lambda seed: task}, tiny_clip, tiny_processor(), tmp_path
        return message(lambda: run_cells([Recipe("zero-shot")], *data, (1,)), (TypeError, ValueError))

    some = TEST.select(range(6))
    for taken in ("setting", "method", "seed", "seconds", "trainable", "cpu_seconds"):
        assert f"named '{taken}'" in go(TRAIN, some=some, **{taken: some})
    words = [SIX[label] for label in some["label"]]
    texts = some.remove_columns("label").add_column("label", words)
    lists = some.remove_columns("label").add_column("label", [[0, 1]] * 6)
    assert "class_encode_column" in go(TRAIN, some=texts)
    assert "multi-label" in go(TRAIN, some=lists)
    assert "streaming" in go(TRAIN.to_iterable_dataset(), some=some)
    assert not any(tmp_path.iterdir())
