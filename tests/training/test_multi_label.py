"""Training on images with any number of labels, on texts and on heads, until labels are predicted again."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Sequence, Value
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score
from transformers import Trainer, TrainingArguments, pipeline

from peft_ncgeo import ImageClassifier, TrainedClassifier, ZeroShotClassifier
from peft_ncgeo.data import MixUp, base_new_split, class_counts, few_shot, long_tailed
from peft_ncgeo.hub import create_card, export_classifier, load_adapter
from peft_ncgeo.losses import (
    CrossEntropy,
    GeometricDebiasing,
    LanguageCollapse,
    MultiLabelLoss,
    PrototypeSupCon,
    SpaceAlignment,
)
from peft_ncgeo.models.text_setting import adapter_text_setting
from peft_ncgeo.training import GeometryMonitor, GradientProjection
from peft_ncgeo.training.evaluating import accuracy_metrics

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from .runs import Gradients, lora_clip, lora_vit, pixels_and_labels, several_labels, trainer, vit, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LISTS, ROWS = several_labels(tiny_images(10)), several_labels(tiny_images(10), as_rows=True)
HOT = np.array(ROWS["label"][:])
OTHERS = several_labels(tiny_images(9, seed=1))


def multi_trainer(folder, model=None, train=LISTS, **options):
    options = {"classification_loss": MultiLabelLoss(), "per_device_train_batch_size": 16, **options}
    return trainer(folder, model or lora_clip(), train=train, **options)


def clip_logits(model, dataset, names=NAMES) -> np.ndarray:
    """Scaled cosines by CLIP's own forward pass, in float64."""
    texts = tiny_processor().tokenizer([f"a photo of a {name}." for name in names], padding=True, return_tensors="pt")
    pixels = pixels_and_labels(dataset)[0].double()
    with torch.no_grad():
        return model.double().eval()(pixel_values=pixels, **texts).logits_per_image.numpy()


def cross_entropy(logits, labels) -> float:
    return float(-(labels * np.log(expit(logits)) + (1 - labels) * np.log(expit(-logits))).mean())


def test_texts(tmp_path):
    """The loss of the first step, the bias that is measured, metrics, and the labels of the adapter once saved."""
    run = multi_trainer(tmp_path, eval_dataset=OTHERS, max_steps=2, save_strategy="no")
    run.train()
    setting = adapter_text_setting(run.model, "default")
    bias = setting.logit_bias
    assert (setting.multi_label, setting.class_names) == (True, tuple(NAMES))
    frozen, share = clip_logits(tiny_clip(), LISTS), HOT.mean()
    assert expit(frozen + bias - 0.006).mean() < share < expit(frozen + bias + 0.006).mean()
    expected = cross_entropy(clip_logits(lora_clip(), LISTS) + bias, HOT)
    assert run.state.log_history[0]["loss/multi_label"] == pytest.approx(expected, rel=1e-4)

    output, metrics = run.predict(OTHERS), run.evaluate()
    truth = np.array(several_labels(tiny_images(9, seed=1), as_rows=True)["label"][:])
    assert (output.label_ids == truth).all()
    chance = expit(output.predictions)
    each = [average_precision_score(truth[:, k], chance[:, k]) for k in range(5)]
    assert metrics["eval_map"] == pytest.approx(np.mean(each))
    assert metrics["eval_macro_f1"] == pytest.approx(f1_score(truth, chance >= 0.5, average="macro", zero_division=0))
    assert metrics["eval_loss"] == pytest.approx(
        np.mean([cross_entropy(output.predictions[i], truth[i]) for i in range(9)]), rel=0.05
    )

    run.save_model(str(tmp_path / "adapter"))
    assert json.loads((tmp_path / "adapter" / "geometry.json").read_text())["logit_bias"] == bias
    classifier = ZeroShotClassifier.from_pretrained(str(tmp_path / "adapter"), tiny_clip(), tiny_processor())
    torch.testing.assert_close(classifier.predict_proba(OTHERS["image"]).numpy(), chance, atol=1e-5, rtol=0)
    threshold = float(np.median(chance)) + 1e-6
    for row, found in zip(chance, classifier.predict_labels(OTHERS["image"], threshold=threshold), strict=True):
        assert found == [NAMES[k] for k in np.argsort(-row) if row[k] >= threshold]
    assert classifier.predict_labels(OTHERS["image"][0], threshold=1.0) == [[]]
    [[(best, share)]] = classifier.top_k(OTHERS["image"][0], k=1)
    assert (best, share) == (NAMES[chance[0].argmax()], pytest.approx(chance[0].max(), abs=1e-5))
    with pytest.raises(ValueError, match="MultiLabelLoss"):
        export_classifier(classifier.model, NAMES, tmp_path / "export", tiny_processor())
    with pytest.raises(ValueError, match="logit_bias"):
        ZeroShotClassifier(tiny_clip(), tiny_processor()).predict_labels(OTHERS["image"], NAMES)


def test_the_bias_counts_a_class_of_several_texts_once(tmp_path):
    """The mean probability of the frozen model is the share of ones, a class with the direction of its texts' mean."""
    own = ["a green tree", "the red fish in the tree", "black cat", "a white bird", "the blue dog", "a leopard"]
    run = multi_trainer(tmp_path, max_steps=1, save_strategy="no", class_texts={NAMES[0]: own})
    run.train()
    texts, base = [*own, *(f"a photo of a {name}." for name in NAMES[1:])], tiny_clip().double()
    tokens = tiny_processor().tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        rows = torch.nn.functional.normalize(base.get_text_features(**tokens).pooler_output)
        images = base.get_image_features(pixels_and_labels(LISTS)[0].double()).pooler_output
        classes = torch.nn.functional.normalize(torch.cat([rows[: len(own)].mean(0, keepdim=True), rows[len(own) :]]))
        logits = base.logit_scale.exp() * torch.nn.functional.normalize(images) @ classes.T
    bias = adapter_text_setting(run.model, "default").logit_bias
    low, high = (float((logits + bias + error).sigmoid().mean()) for error in (-0.006, 0.006))
    assert low < HOT.mean() < high


def test_a_head_has_the_steps_of_transformers(tmp_path):
    """Its Trainer computes `BCEWithLogitsLoss` of one batch, here also of micro-batches and of rows of 0 and 1."""
    whole, model = Gradients(), lora_vit()
    model.get_base_model().config.problem_type = "multi_label_classification"
    pixels = tiny_processor().image_processor(images=LISTS["image"][:], return_tensors="pt")["pixel_values"]
    labels = torch.from_numpy(HOT).float()
    settings = {"optim": "sgd", "max_grad_norm": 0, "seed": 7, "save_strategy": "no", "report_to": "none"}
    Trainer(
        model,
        TrainingArguments(str(tmp_path), per_device_train_batch_size=16, max_steps=1, use_cpu=True, **settings),
        train_dataset=[{"pixel_values": p, "labels": y} for p, y in zip(pixels, labels, strict=True)],
        callbacks=[whole],
    ).train()
    for size, parts, train, names in ((16, 1, LISTS, None), (3, 4, ROWS, NAMES)):
        got = Gradients()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "callbacks": [got]}
        run = multi_trainer(tmp_path, lora_vit(), train, class_names=names, max_steps=1, **options)
        run.train()
        assert run.model.config.problem_type == "multi_label_classification"
        torch.testing.assert_close(got.steps[0], whole.steps[0], atol=2e-6, rtol=1e-4)


REFUSED = {  # options, words of the error
    "CrossEntropy": ({"classification_loss": CrossEntropy()}, ["ce reads one label", "MultiLabelLoss"]),
    "no reader": (
        {"classify": False, "losses": [LanguageCollapse(weight=1.0)]},
        ["no term reads lists", "MultiLabelLoss"],
    ),
    "NPT": ({"losses": [GeometricDebiasing(weight=1.0)]}, ["debiasing", "one label"]),
    "SupCon": ({"model": vit, "losses": [PrototypeSupCon()]}, ["supcon", "one label"]),
    "alignment": ({"losses": [SpaceAlignment(weight=1.0)]}, ["alignment", "one label"]),
    "sampling": ({"class_balanced_sampling": True}, ["class_balanced_sampling", "one label"]),
    "monitor": ({"callbacks": [GeometryMonitor()]}, ["GeometryMonitor", "one label"]),
    "projection": ({"callbacks": [GradientProjection()]}, ["GradientProjection", "one label"]),
    "one label": ({"train": tiny_images(10)}, ["MultiLabelLoss", "'label' is not a list", "CrossEntropy"]),
    "one label to evaluate": ({"eval_dataset": tiny_images(10)}, ["MultiLabelLoss", "'label' is not a list"]),
    "lists to evaluate": (
        {"train": tiny_images(10), "eval_dataset": LISTS, "classification_loss": CrossEntropy()},
        ["evaluation reads one label", "MultiLabelLoss"],
    ),
    "rows without names": ({"train": ROWS}, ["class_names"]),
    "other names": ({"class_names": NAMES[::-1]}, ["class_names", "label"]),
    "lists of numbers": (
        {"train": LISTS.cast_column("label", Sequence(Value("int64")))},
        ["cast_column", "ClassLabel"],
    ),
    "a class of nothing": (
        {"train": LISTS.cast_column("label", Sequence(ClassLabel(names=[*NAMES, "a tree"])))},
        ["a tree", "no image"],
    ),
    "unknown": (
        {
            "train": LISTS.select(range(9)).map(
                lambda row, i: {"label": None if i == 4 else row["label"]}, with_indices=True
            )
        },
        ["Sample 4", "empty list"],
    ),
    "bias of a head": ({"model": lora_vit, "logit_bias": -3.0}, ["logit_bias", "head"]),
    "bias under a softmax": (
        {"train": tiny_images(10), "classification_loss": CrossEntropy(), "logit_bias": -3.0},
        ["logit_bias", "softmax"],
    ),
    "no adapter": ({"model": tiny_clip}, ["logit_bias", "get_peft_model"]),
    "mixed images, whose labels would stay as they are": ({"data_collator": MixUp()}, ["MultiLabelLoss", "MixUp"]),
    "soft labels": (
        {
            "data_collator": lambda samples: {
                "pixel_values": torch.ones(2, 3, 16, 16),
                "labels": torch.full((2, 5), 0.3),
            }
        },
        ["0 or 1", "mixup"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_the_first_step(tmp_path, name):
    options, words = REFUSED[name]
    options = dict(options)
    make = options.pop("model", lora_clip)
    with pytest.raises(ValueError, match=words[0]) as error:
        multi_trainer(tmp_path, make(), **options).train()
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: few_shot(LISTS, 1), "few_shot"),
        (lambda: long_tailed(LISTS, tau=0.5), "long_tailed"),
        (lambda: base_new_split(LISTS), "base_new_split"),
        (lambda: class_counts(LISTS), "class_counts"),
    ],
)
def test_splits_of_one_label_say_so(call, name):
    with pytest.raises(ValueError, match=f"{name} reads one label.*MultiLabelLoss"):
        call()


@pytest.mark.slow
def test_several_sets_the_best_of_them_and_a_card(tmp_path):
    sets = {
        "near": OTHERS,
        "far": several_labels(tiny_images(8, NAMES[:2], seed=2)).cast_column(
            "label", Sequence(ClassLabel(names=[*NAMES[:2], "a tree"]))
        ),
    }
    run = multi_trainer(
        tmp_path,
        eval_dataset=sets,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="near_map",
        num_train_epochs=3,
    )
    run.train()
    history = [entry["eval_near_map"] for entry in run.state.log_history if "eval_near_map" in entry]
    metrics = run.evaluate()
    assert run.state.best_metric == max(history) == pytest.approx(metrics["eval_near_map"])
    assert metrics["eval_far_left_out"] == 1
    record = run.record()
    assert record.class_counts == HOT.sum(0).tolist()
    assert record.sets["near"]["after"]["map"] == pytest.approx(metrics["eval_near_map"])
    assert set(record.row()) == {"seed", "near", "far"}
    assert record == type(record).from_dict(record.to_dict())
    card = create_card(record=record).text
    for words in (
        "mean average precision in %",
        "predict_labels",
        f"{HOT.sum()} labels",
        "left out",
        "MultiLabelLoss()",
    ):
        assert words in card
    with pytest.raises(ValueError, match="one label"):
        multi_trainer(tmp_path, eval_dataset=OTHERS, compute_metrics=accuracy_metrics).evaluate()


@pytest.mark.slow
def test_a_resumed_training_has_the_same_bias_and_weights(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = multi_trainer(tmp_path, **options)
    whole.train()
    # an adapter that starts elsewhere: the bias is that of the frozen model
    other = lora_clip()
    with torch.no_grad():
        for parameter in (p for p in other.parameters() if p.requires_grad):
            parameter.add_(0.1)
    again = multi_trainer(tmp_path / "again", other, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(weights(again.model), weights(whole.model), atol=0, rtol=0)
    assert adapter_text_setting(again.model, "default") == adapter_text_setting(whole.model, "default")
    given = multi_trainer(tmp_path, logit_bias=-1.5, max_steps=1, save_strategy="no")
    given.train()
    assert adapter_text_setting(given.model, "default").logit_bias == -1.5


@pytest.mark.slow
def test_a_pipeline_gives_each_class_its_own_probability(tmp_path):
    run = multi_trainer(tmp_path, lora_vit(), max_steps=2, save_strategy="no")
    run.train()
    chance = expit(run.predict(OTHERS).predictions[0])
    run.save_model(str(tmp_path / "adapter"))
    model = load_adapter(tmp_path / "adapter", tiny_vit_classifier())
    found = pipeline("image-classification", model=model, image_processor=tiny_processor().image_processor)(
        OTHERS["image"][0], top_k=None
    )
    assert {one["label"]: one["score"] for one in found} == pytest.approx(
        dict(zip(NAMES, chance.tolist(), strict=True)), rel=1e-4
    )
    assert math.fsum(chance) != pytest.approx(1, abs=0.01)
    # trained on single labels again, it forgets
    single = trainer(tmp_path, model, train=tiny_images(10), max_steps=1)
    single.model.set_adapter("default")
    single.train()
    assert model.config.problem_type == "single_label_classification"


def test_an_exported_head_gives_each_class_its_own_probability(tmp_path):
    head = ImageClassifier.from_backbone(tiny_clip(), NAMES, head="cosine", init="texts", processor=tiny_processor())
    head.config.problem_type = "multi_label_classification"  # as training writes it
    expected = torch.from_numpy(
        expit(clip_logits(tiny_clip(), OTHERS) * 25 / tiny_clip().logit_scale.exp().item())
    ).float()
    export_classifier(head, NAMES, tmp_path / "export", tiny_processor())
    found = TrainedClassifier.from_pretrained(tmp_path / "export").predict_proba(OTHERS["image"][:])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
