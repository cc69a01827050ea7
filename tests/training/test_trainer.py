"""GeometryTrainer: accumulation, resuming, logging, evaluation, and PEFT's own methods under it."""

from __future__ import annotations

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, get_peft_model
from transformers import CLIPModel, EarlyStoppingCallback, pipeline

from peft_ncgeo import NPTConfig, ZeroShotClassifier
from peft_ncgeo.hub import load_adapter
from peft_ncgeo.losses import OTPreservation

from ..conftest import CHECKPOINTING, NAMES, tiny_clip, tiny_images, tiny_processor
from .runs import Pointwise, lora_clip, ot_and_budget, prompted_clip, trainer, vit, weights


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    results = []
    for size, steps in ((8, 1), (2, 4)):
        run = trainer(
            tmp_path,
            losses=[Pointwise(weight=0.5)],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=6,
        )
        run.train()
        results.append((weights(run.model), [e["loss/pointwise"] for e in run.state.log_history if "loss/ce" in e]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4, abs=1e-7)


def test_budget_is_updated_once_per_optimiser_step(tmp_path):
    updates = []

    class Watched(Pointwise):
        def update(self, value):
            updates.append(float(value))
            super().update(value)

    run = trainer(
        tmp_path,
        losses=[Watched(budget=0.1)],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=3,
    )
    run.train()
    logged = [entry["loss/pointwise"] for entry in run.state.log_history if "loss/pointwise" in entry]
    assert updates == pytest.approx(logged, rel=1e-5)
    expected = 1.0
    for value in updates:
        expected = max(0.0, expected + 0.3 * (value / 0.1 - 1))
    assert run.losses[0].factor() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("at_step", [3, 4], ids=["mid-epoch", "epoch-end"])
def test_resumed_equals_uninterrupted(tmp_path, at_step):
    arguments = {"augmentation": "crop_flip", "save_strategy": "steps", "save_steps": at_step, "num_train_epochs": 3}
    whole = trainer(tmp_path / "whole", losses=ot_and_budget(), **arguments)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{at_step}"
    resumed = trainer(tmp_path / "resumed", prompted_clip(seed=99), losses=ot_and_budget(), **arguments)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(resumed.model)[name]), name
    assert [loss.factor() for loss in whole.losses] == [loss.factor() for loss in resumed.losses]
    assert whole.losses[1].factor() != 1
    tail = [e for e in whole.state.log_history if e["step"] > at_step and "loss/ce" in e]
    assert tail == [e for e in resumed.state.log_history if e["step"] > at_step and "loss/ce" in e]


def test_what_the_trainer_saves_loads_in_every_way(tmp_path):
    tiny_clip().save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    model = get_peft_model(CLIPModel.from_pretrained(tmp_path / "base"), NPTConfig.ivlp(text_depth=2, vision_depth=3))
    images = tiny_images(10)
    run = trainer(tmp_path / "run", model, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "geometry.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training_args.bin",
    ]
    expected = ZeroShotClassifier(run.model, tiny_processor()).predict_proba(images["image"][:], NAMES)
    checkpoint = tmp_path / "run" / "checkpoint-2"  # without a tokenizer, for which AutoPeftModel wants embeddings
    assert not (checkpoint / "tokenizer.json").exists()
    places = [(AutoPeftModel.from_pretrained, checkpoint)]
    places += [(load, tmp_path / "adapter") for load in (CLIPModel.from_pretrained, load_adapter)]
    for load, place in places:
        loaded = load(str(place))
        assert torch.equal(
            ZeroShotClassifier(loaded, tiny_processor()).predict_proba(images["image"][:], NAMES), expected
        )
    classifier = ZeroShotClassifier.from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(classifier.predict_proba(images["image"][:], NAMES), expected)
    pipe = pipeline("zero-shot-image-classification", model=str(tmp_path / "adapter"))
    for image, row in zip(images["image"][:3], expected, strict=False):
        scores = {
            answer["label"]: answer["score"] for answer in pipe(image, NAMES, hypothesis_template="a photo of a {}.")
        }
        assert [scores[name] for name in NAMES] == pytest.approx(row.tolist(), abs=1e-6)


def test_terms_and_factors_are_logged(tmp_path):
    run = trainer(tmp_path, losses=ot_and_budget())
    run.train()
    entry = next(e for e in run.state.log_history if "loss/ce" in e)
    assert {"loss/ot", "lambda/ot", "ot_identity_share", "loss/ot_image", "lambda/ot_image"} <= entry.keys()
    total = entry["loss/ce"] + sum(entry[f"lambda/{n}"] * entry[f"loss/{n}"] for n in ("ot", "ot_image"))
    assert entry["loss"] == pytest.approx(total, rel=1e-5)
    assert entry["lambda/ot"] == 2
    assert run.state.log_history[-1]["train_loss"] > 0


def test_weight_schedule_follows_training(tmp_path):
    run = trainer(tmp_path, losses=[OTPreservation(weight=lambda t: 8 * t)], max_steps=4)
    run.train()
    assert [e["lambda/ot"] for e in run.state.log_history if "lambda/ot" in e] == [0, 2, 4, 6]


def test_training_learns_colours(tmp_path):
    run = trainer(tmp_path, eval_dataset=tiny_images(15, seed=1), num_train_epochs=15)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before


def test_base_and_new_over_their_own_names(tmp_path):
    sets = {"base": tiny_images(15), "new": tiny_images(12, ["red bird", "blue tree", "green cat"])}
    run = trainer(tmp_path, eval_dataset=sets)
    metrics = run.evaluate()
    b, n = metrics["eval_base_accuracy"], metrics["eval_new_accuracy"]
    assert metrics["eval_harmonic_mean"] == (pytest.approx(2 * b * n / (b + n)) if b + n else 0)
    assert run.predict(sets["new"]).predictions.shape == (12, 3)
    assert run.predict(sets["base"]).predictions.shape == (15, 5)


def test_teacher_is_the_untrained_model(tmp_path):
    run = trainer(tmp_path, losses=[OTPreservation(weight=1.0)])
    images = torch.randn(2, 3, 16, 16)
    run.train()
    with torch.no_grad():
        expected = tiny_clip().get_image_features(pixel_values=images).pooler_output
        assert torch.equal(run.frozen.image_features(images), expected)
        student = run.model.get_base_model().get_image_features(pixel_values=images).pooler_output
    assert not torch.allclose(student, expected, atol=1e-3)
    assert all(p.requires_grad == ("ncgeo_npt" in name) for name, p in run.model.named_parameters())


@pytest.mark.parametrize(
    "build", [lora_clip, vit, lambda: vit(LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))]
)
def test_other_models_and_methods_train(tmp_path, build):
    model = build()
    before = weights(model)
    run = trainer(tmp_path, model, [OTPreservation(budget=0.01, modality="image")], eval_dataset=tiny_images(10))
    run.train()
    assert all(not torch.equal(before[name], value) for name, value in weights(model).items())
    assert 0 <= run.evaluate()["eval_balanced_accuracy"] <= 1


def test_classification_loss_none(tmp_path):
    run = trainer(tmp_path, losses=[Pointwise(weight=1.0)], max_steps=1, classify=False)
    run.train()
    assert "loss/ce" not in run.state.log_history[0]
    assert run.state.log_history[0]["loss"] == pytest.approx(run.state.log_history[0]["loss/pointwise"])


@pytest.mark.parametrize("bf16", [True])
def test_bf16(tmp_path, bf16):
    run = trainer(tmp_path, losses=ot_and_budget(), bf16=bf16, eval_dataset=tiny_images(10), max_steps=3)
    run.train()
    assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for p in weights(run.model).values())
    assert run.evaluate()["eval_loss"] > 0


def test_gradient_checkpointing(tmp_path):
    results = []
    for enabled in (False, True):
        run = trainer(tmp_path, losses=ot_and_budget(), max_steps=3, **{CHECKPOINTING: enabled})
        run.train()
        results.append(weights(run.model))
    torch.testing.assert_close(*results)


def test_placeholders_are_noted_by_the_trainer(tmp_path):
    """The model was made without a tokenizer; the trainer has one."""
    model = prompted_clip()
    assert model.peft_config["default"].placeholder_ids == []
    trainer(tmp_path, model)
    assert model.peft_config["default"].placeholder_ids == [6, 7, 8, 6]


def test_a_plain_model_is_evaluated_zero_shot(tmp_path):
    images = tiny_images(10)
    metrics = trainer(tmp_path, tiny_clip(), eval_dataset=images).evaluate()
    predicted = ZeroShotClassifier(tiny_clip(), tiny_processor()).predict(images["image"][:], NAMES)
    right = [NAMES[y] == p for y, p in zip(images["label"], predicted, strict=True)]
    assert metrics["eval_accuracy"] == pytest.approx(sum(right) / 10)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_mode_as_trainer_does(tmp_path, training):
    model = prompted_clip().train(training)
    trainer(tmp_path, model, eval_dataset=tiny_images(10)).evaluate()
    assert not model.training


def test_trainer_and_classifier_agree(tmp_path):
    images = tiny_images(10)
    run = trainer(tmp_path, eval_dataset=images)
    run.train()
    logits = torch.from_numpy(run.predict(images).predictions)
    expected = ZeroShotClassifier(run.model, tiny_processor()).predict_proba(images["image"][:], NAMES)
    torch.testing.assert_close(logits.softmax(-1), expected, atol=1e-6, rtol=1e-5)


def test_early_stopping_sees_the_harmonic_mean_once_an_evaluation(tmp_path):
    sets = {"base": tiny_images(10), "new": tiny_images(10, ["red bird", "blue tree"])}
    arguments = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    arguments |= {"metric_for_best_model": "harmonic_mean", "num_train_epochs": 9, "learning_rate": 0.0}
    run = trainer(tmp_path, eval_dataset=sets, **arguments)
    run.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    run.train()
    assert run.state.epoch == 3  # the best at epoch 1, then two without a better one


def test_plain_image_processor_serves_a_classification_model(tmp_path):
    run = trainer(tmp_path, vit(), processor=tiny_processor().image_processor, max_steps=1)
    assert run.train().global_step == 1


def test_another_adapter_is_read_with_its_own_slots(tmp_path):
    model = prompted_clip()
    model.add_adapter("b", NPTConfig(num_text_tokens=6, template="the {}."))
    run = trainer(tmp_path, model, max_steps=1)
    model.set_adapter("b")
    run.train()
    assert run.features.texts.own["input_ids"][0, :8].tolist() == [1, 5, 5, 5, 5, 5, 9, 11]


def test_requiring_what_every_batch_has(tmp_path):
    class Plain(Pointwise):
        requires = ("image_features", "labels", "frozen_image_features")

    assert trainer(tmp_path, losses=[Plain(weight=1.0)], max_steps=1).train().global_step == 1
