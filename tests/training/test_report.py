"""`trainer.report()`: scores, calibration and baselines, against classifiers made by hand, and the card after it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from transformers import TrainerCallback

from peft_ncgeo import PrototypeConfig, ZeroShotClassifier
from peft_ncgeo.classifiers.image_features import ImageFeatures, ProjectedFeatures
from peft_ncgeo.hub import create_card
from peft_ncgeo.losses import Distillation
from peft_ncgeo.reports import expected_calibration_error, fit_temperature, linear_probe, nearest_class_mean

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from .runs import larger_clip, lora_clip, trainer, vit

NEW = ["red bird", "blue tree", "green cat"]


class Shown(TrainerCallback):
    """Counts the batches that are predicted."""

    batches = 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += 1


def long_tail():
    """9, 7, 5, 3 and 1 images of five classes."""
    images = tiny_images(45)
    return images.select([i for i in range(45) if i // 5 <= 8 - 2 * (i % 5)])


def share(predicted, dataset) -> float:
    return float(np.mean(np.asarray(predicted) == np.asarray(dataset["label"])))


def features(encoder, *sets):
    return [encoder.embed(dataset["image"][:]).numpy() for dataset in sets]


def test_report_of_a_tuned_clip(tmp_path):
    train, base, new, validation = long_tail(), tiny_images(51, seed=1), tiny_images(9, NEW), tiny_images(26, seed=3)
    shown, sets = Shown(), {"base": base, "new": new}
    options = {"eval_dataset": sets, "callbacks": [shown], "per_device_eval_batch_size": 64}
    run = trainer(tmp_path, lora_clip(), train=train, max_steps=3, learning_rate=1.0, **options)
    run.train()
    run.evaluate()
    seen = shown.batches
    report = run.report("base")

    def logits(model, dataset):
        p = ZeroShotClassifier(model, tiny_processor()).predict_proba(dataset["image"][:], NAMES)
        return p.double().log().numpy()

    labels, own = np.asarray(base["label"]), logits(run.model, base)
    assert report.accuracy == share(own.argmax(1), base)
    for c, name in enumerate(NAMES):
        assert report.per_class.loc[name, "recall"] == pytest.approx((own.argmax(1) == c)[labels == c].mean())
    assert report.per_class["training_images"].tolist() == [9, 7, 5, 3, 1]
    assert report.groups["few"] == pytest.approx(report.per_class["recall"].iloc[4])
    error = expected_calibration_error(np.exp(own.max(1)), own.argmax(1) == labels)
    assert report.calibration.before.error == pytest.approx(error, abs=1e-4)

    x, queries = features(ProjectedFeatures(tiny_clip(), tiny_processor()), train, base)
    expected = {
        "zero-shot": logits(tiny_clip(), base).argmax(1),
        "nearest class mean": nearest_class_mean(x, train["label"][:], queries),
        "linear probe": linear_probe(x, train["label"][:], queries).predicted,
        "tuned model": own.argmax(1),
    }
    assert report.baselines["accuracy"].to_dict() == {name: share(p, base) for name, p in expected.items()}

    assert shown.batches == seen + 1  # the frozen model's: the tuned one had been evaluated
    assert run.report("base").baselines.equals(report.baselines)
    assert shown.batches == seen + 1
    record = run.record()
    assert shown.batches == seen + 2  # the frozen model's on "new"
    assert record.reports == {"base": report.to_dict()}
    text = create_card(record=record).text
    best = report.baselines["accuracy"].iloc[:3].max()
    assert ("does not beat" in text) == (report.accuracy <= best)
    assert f"| linear probe | {100 * share(expected['linear probe'], base):.1f} |" in text

    only = run.report("new")  # its classes have no training images
    assert list(only.baselines.index) == ["zero-shot", "tuned model"]
    assert "training images" in only.notes[0]

    fitted = run.report("base", validation=validation, baselines=()).calibration
    others = logits(run.model, validation), validation["label"][:]
    assert fitted.temperature == pytest.approx(fit_temperature(*others), rel=1e-3)
    scaled = torch.tensor(own / fitted.temperature).softmax(1).numpy()
    assert fitted.after.error == pytest.approx(
        expected_calibration_error(scaled.max(1), scaled.argmax(1) == labels), abs=1e-3
    )
    assert "of this report themselves" in run.report("base", validation="base", baselines=()).to_markdown()
    with torch.no_grad():  # another model, of which there is no report
        next(p for p in run.model.parameters() if p.requires_grad).data.add_(3.0)
    assert "linear probe" not in create_card(record=run.record()).text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:num_classes=3:UserWarning")
@pytest.mark.parametrize("head", ["same", "another"])
def test_an_image_classifier_has_no_texts(head, tmp_path):
    """Also one whose adapter has a head of another size than the frozen model's."""
    names = NAMES if head == "same" else NAMES[:3]
    config = PrototypeConfig(projection_dim=16, num_classes=3, num_vision_tokens=2)
    train, test = tiny_images(25, names), tiny_images(31, names, seed=1)
    options = {"train": train, "eval_dataset": test, "max_steps": 2}
    run = trainer(tmp_path, vit() if head == "same" else vit(config), **options)
    run.train()
    report = run.report()
    x, queries = features(ImageFeatures(tiny_vit_classifier(), tiny_processor()), train, test)
    assert list(report.baselines.index) == ["nearest class mean", "linear probe", "tuned model"]
    found = share(nearest_class_mean(x, train["label"][:], queries), test)
    assert report.baselines.loc["nearest class mean", "accuracy"] == pytest.approx(found)
    found = share(linear_probe(x, train["label"][:], queries).predicted, test)
    assert report.baselines.loc["linear probe", "accuracy"] == pytest.approx(found)
    assert run.record().reports == {"test": report.to_dict()}


def test_a_training_set_of_another_order_is_no_replacement(tmp_path):
    run = trainer(tmp_path, lora_clip(), eval_dataset=tiny_images(11), max_steps=1)
    images, order = tiny_images(), NAMES[::-1]
    run.train_dataset = images.map(
        lambda row: {"label": order.index(NAMES[row["label"]])},
        features=type(images.features)({**images.features, "label": ClassLabel(names=order)}),
    )
    for use in (run.report, run.train):
        with pytest.raises(ValueError, match=r"train_dataset has the classes.*white panda"):
            use()


@pytest.mark.slow
def test_what_is_missing_is_told(tmp_path):
    sets = {"base": tiny_images(11), "new": tiny_images(9, NEW)}
    run = trainer(tmp_path, lora_clip(), eval_dataset=sets)
    for given, wanted in (
        ({}, "base.*new"),
        ({"dataset": "old"}, "'old'.*base.*new"),
        ({"dataset": "base", "validation": "new"}, "classes"),
        ({"dataset": "base", "baselines": ["nearest"]}, "'nearest'.*linear probe"),
    ):
        with pytest.raises(ValueError, match=wanted):
            run.report(**given)
    mixed = tiny_images(9, ["white panda", "red_cat", "blue tree"])  # of classes of training two, in another order
    report = run.report(mixed)
    assert len(report.baselines) == 4
    assert "1 of the 3 classes" in report.notes[0]
    kept = run.record().reports
    assert list(kept) == ["base"]  # without a call: scores alone
    assert kept["base"]["baselines"] == {}

    unlabelled = tiny_images(16).remove_columns("label")
    options = {"train": unlabelled, "class_names": NAMES, "eval_dataset": sets["base"], "classify": False}
    run = trainer(tmp_path, lora_clip(), losses=[Distillation()], teacher=larger_clip(), **options)
    report = run.report()
    assert list(report.baselines.index) == ["zero-shot", "tuned model"]
    assert "no labelled training images" in report.notes[0]

    model = lora_clip()
    model.get_base_model().visual_projection.requires_grad_(True)  # the frozen model is lost
    report = trainer(tmp_path, model, eval_dataset=sets["base"]).report()
    assert report.baselines.empty
    assert "visual_projection" in report.notes[0]
