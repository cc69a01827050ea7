"""`GeometryMonitor`: the numbers of an evaluation, recomputed from the features themselves."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from peft_ncgeo.geometry import NeuralCollapse, modality_gap
from peft_ncgeo.geometry.simplex import simplex_distance
from peft_ncgeo.training import GeometryMonitor

from ...conftest import NAMES, tiny_images
from ...losses.batches import unit_rows
from ..runs import pixels_and_labels, prompted_clip, trainer, vit


def test_clip(tmp_path):
    """Normalised features against the texts; each evaluation set has its own numbers."""
    sets = {"a": tiny_images(23, seed=1), "b": tiny_images(9, NAMES[:3], seed=2)}
    run = trainer(tmp_path, eval_dataset=sets, callbacks=[GeometryMonitor()], per_device_eval_batch_size=4)
    metrics = run.evaluate()
    for name, dataset in sets.items():
        pixels, labels = pixels_and_labels(dataset)
        texts = run.task.texts(dataset.features["label"].names)
        with torch.no_grad():
            out = run.extractor.eval()(pixel_values=pixels, **texts)
        image, text = (unit_rows(out[f"{kind}_features"].double()) for kind in ("image", "text"))
        expected = NeuralCollapse(len(text), 24).update(image, torch.tensor(labels)).compute(text)
        expected["modality_gap"] = float(modality_gap(image, text))
        centred = text - text.mean(0)
        expected["text_nc2"] = float(simplex_distance(centred @ centred.T))
        assert {"nc1", "nc2", "nc3_cosine", "nc4"} <= expected.keys()
        for key, value in expected.items():
            assert metrics[f"eval_{name}_{key}"] == pytest.approx(value, rel=1e-4), key


def test_classification_head(tmp_path):
    """Features as they enter the head, against its weights and bias."""
    images = tiny_images(20, seed=1)
    run = trainer(tmp_path, vit(), eval_dataset=images, callbacks=[GeometryMonitor()], per_device_eval_batch_size=8)
    run.train()
    metrics = run.evaluate()
    pixels, labels = pixels_and_labels(images)
    with torch.no_grad():
        out = run.extractor.eval()(pixel_values=pixels)
    head = run.model.base_model.model.classifier.modules_to_save["default"]
    collapse = NeuralCollapse(5, 32).update(out["image_features"], torch.tensor(labels))
    expected = collapse.compute(head.weight.detach(), head.bias.detach())
    for key, value in expected.items():
        assert metrics[f"eval_{key}"] == pytest.approx(value, rel=1e-4), key
    assert "eval_text_nc2" not in metrics
    assert expected["nc4"] == pytest.approx(
        float((out["logits"].argmax(1) == nearest_mean(out["image_features"], torch.tensor(labels))).float().mean())
    )


def test_a_head_that_is_itself_adapted_is_left_out(tmp_path):
    """LoRA on the head: the layer's own weight is not what classifies, so nothing is said of it."""
    lora = vit(LoraConfig(r=2, target_modules=["classifier"], init_lora_weights=False))
    run = trainer(tmp_path, lora, eval_dataset=tiny_images(20), callbacks=[GeometryMonitor(nc4=False)])
    metrics = run.evaluate()
    assert "eval_nc1" in metrics
    assert not {"eval_nc3", "eval_nc3_cosine", "eval_nc4"} & metrics.keys()


def nearest_mean(features, labels):
    means = torch.stack([features[labels == c].mean(0) for c in range(5)])
    return torch.cdist(features, means).argmin(1)


def test_logged_while_training_and_in_predictions(tmp_path):
    run = trainer(
        tmp_path,
        eval_dataset=tiny_images(10),
        callbacks=[GeometryMonitor()],
        eval_strategy="epoch",
        num_train_epochs=1,
    )
    run.train()
    assert any("eval_nc1" in entry and "eval_modality_gap" in entry for entry in run.state.log_history)
    assert "test_nc2" in run.predict(tiny_images(10)).metrics
    quiet = trainer(tmp_path, prompted_clip(), eval_dataset=tiny_images(10))
    assert not any("_nc" in key for key in quiet.evaluate())
