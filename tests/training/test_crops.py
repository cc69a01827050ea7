"""Evaluation of a trainer over five crops of each image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peft_ncgeo.data.crops import view_inputs
from peft_ncgeo.data.images import ImageCollator
from peft_ncgeo.hub import create_card
from peft_ncgeo.models.image_encoder import encode_images
from peft_ncgeo.training import GeometryMonitor

from ..conftest import tiny_images, tiny_processor
from ..errors import message
from .runs import lora_clip, lora_vit, trainer

SET = tiny_images(11, seed=4)


def views(images=SET) -> list[dict[str, torch.Tensor]]:
    rgb = [image.convert("RGB") for image in images["image"][:]]
    return view_inputs(tiny_processor().image_processor, rgb, 5)


def five(tmp_path, model, **options):
    options = {"eval_dataset": SET, "max_steps": 1, "per_device_eval_batch_size": 4, "num_test_views": 5, **options}
    return trainer(tmp_path, model, **options)


def test_logits_of_a_head_are_averaged(tmp_path):
    run = five(tmp_path, lora_vit(), callbacks=[GeometryMonitor()])
    run.train()
    found = run.predict(SET)
    model = run.model.eval()
    with torch.no_grad():
        logits = torch.stack([model(**view).logits for view in views()]).mean(0)
    np.testing.assert_allclose(found.predictions, logits, atol=1e-5)
    labels = torch.tensor(SET["label"][:])
    assert found.metrics["test_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    evaluated = run.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    single = torch.from_numpy(trainer(tmp_path, model, eval_dataset=SET).predict(SET).predictions)
    assert not torch.allclose(single, logits, atol=1e-3)


@torch.no_grad()
def test_cosines_of_a_clip_are_averaged(tmp_path):
    run = five(tmp_path, lora_clip())
    found = run.predict(SET).predictions
    model = run.model.eval()
    names = SET.features["label"].names
    texts = tiny_processor().tokenizer([f"a photo of a {name}." for name in names], padding=True, return_tensors="pt")
    text = F.normalize(model.get_base_model().get_text_features(**texts).pooler_output)
    cosines = [F.normalize(encode_images(model, **view)) @ text.T for view in views()]
    expected = model.get_base_model().logit_scale.exp() * torch.stack(cosines).mean(0)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_training_images_are_not_cropped(tmp_path):
    one, crops = (trainer(tmp_path, lora_vit(), max_steps=2, num_test_views=n) for n in (1, 5))
    for run in (one, crops):
        torch.manual_seed(0)
        run.train()
    weights = [dict(run.model.named_parameters()) for run in (one, crops)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_card_tells_it_and_measures_again_for_another_number(tmp_path):
    run = five(tmp_path, lora_vit())
    run.train()
    record = run.record()
    accuracy = run.evaluate()["eval_accuracy"]
    assert record.sets["test"]["after"]["accuracy"] == pytest.approx(accuracy)
    assert "num_test_views" in str(create_card(run.model, record))
    measured = run.measure(SET)
    assert run.measure(SET) is measured
    run.args.num_test_views = 1
    assert run.measure(SET) is not measured


def test_what_does_not_fit_is_refused(tmp_path):
    assert "num_test_views=3" in message(lambda: five(tmp_path, lora_vit(), num_test_views=3))
    collator = ImageCollator(tiny_processor().image_processor)
    assert "data_collator" in message(lambda: five(tmp_path, lora_vit(), data_collator=collator))
