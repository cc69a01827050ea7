"""LIFT whole: a head from texts before CLIP's projection, adapters, logit adjustment, and its files."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F

from peft_ncgeo import AdaptFormerConfig, ImageClassifier
from peft_ncgeo.hub import create_card
from peft_ncgeo.losses import LogitAdjustment
from peft_ncgeo.models.heads import linear_classifier

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor
from .runs import trainer, weights

LOADER = """
import sys, warnings
warnings.simplefilter("ignore", UserWarning)
import torch, transformers, peft_ncgeo
from pathlib import Path
from peft import PeftModel
from PIL import Image
from peft_ncgeo.hub import load_adapter
folder = Path(sys.argv[1])
expected = torch.load(folder / "expected.pt")
processor = transformers.AutoImageProcessor.from_pretrained(folder / "adapter")
images = [Image.open(path) for path in sorted((folder / "images").glob("*.png"))]
base = transformers.AutoModelForImageClassification.from_pretrained(folder / "base")
models = {
    "ours": load_adapter(folder / "adapter"),
    "peft": PeftModel.from_pretrained(base, folder / "adapter").eval(),
    "transformers": peft_ncgeo.ImageClassifier.from_pretrained(folder / "adapter").eval(),
}
with torch.no_grad():
    inputs = processor(images=images, return_tensors="pt")
    for name, model in models.items():
        torch.testing.assert_close(model(**inputs).logits, expected["logits"], msg=lambda m: f"{name}: {m}")
inner = models["ours"].get_base_model()
classify = transformers.pipeline("image-classification", model=inner, image_processor=processor)
print(*(result[0]["label"].replace(" ", "_") for result in classify(images, top_k=1)))
"""


def long_tail():
    """8, 4, 2, 1 and 1 images of five classes."""
    labels, wanted = tiny_images(40)["label"], [8, 4, 2, 1, 1]
    return tiny_images(40).select([i for i, y in enumerate(labels) if labels[:i].count(y) < wanted[y]])


def base(folder):
    torch.manual_seed(0)
    given = {"head": "cosine", "init": "texts", "projected": False, "scale": 25.0, "processor": tiny_processor()}
    ImageClassifier.from_backbone(tiny_clip(), NAMES, **given).save_pretrained(folder)
    return ImageClassifier.from_pretrained(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lift")
    torch.manual_seed(1)
    config = AdaptFormerConfig(bottleneck_dim=3, modules_to_save=["classifier"])
    model = get_peft_model(base(folder / "base"), config)
    options = {"eval_dataset": tiny_images(10, seed=3), "weight_decay": 5e-4, "num_test_views": 5, "max_steps": 6}
    run = trainer(
        folder / "out", model, train=long_tail(), classification_loss=LogitAdjustment(), learning_rate=0.02, **options
    )
    before = weights(model)
    run.train()
    return run, before, folder


def test_every_part_is_trained(trained):
    run, before, _ = trained
    after = weights(run.model)
    assert all(not torch.equal(value, after[name]) for name, value in before.items())
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_the_first_loss_is_that_of_the_frozen_model(tmp_path):
    """CE of 25 cos(f, P g) + log pi, by Transformers alone: adapters start at nothing."""
    model = get_peft_model(base(tmp_path), AdaptFormerConfig(modules_to_save=["classifier"]))
    tail = long_tail()
    options = {"per_device_train_batch_size": len(tail), "max_steps": 1}
    run = trainer(tmp_path / "out", model, train=tail, classification_loss=LogitAdjustment(), **options)
    run.train()
    clip, processor = tiny_clip(), tiny_processor()
    texts = processor.tokenizer([f"a photo of a {name}." for name in NAMES], padding=True, return_tensors="pt")
    pixels = processor.image_processor(images=tail["image"][:], return_tensors="pt")["pixel_values"]
    labels = torch.tensor(tail["label"][:])
    with torch.no_grad():
        rows = clip.get_text_features(**texts).pooler_output @ clip.visual_projection.weight
        logits = 25 * F.normalize(clip.vision_model(pixel_values=pixels).pooler_output) @ F.normalize(rows).T
    prior = torch.bincount(labels).float() / len(labels)
    expected = float(F.cross_entropy(logits + prior.log(), labels))
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_card_names_method_papers_and_views(trained):
    run, _, _ = trained
    card = str(create_card(run.model, run.record()))
    for words in ("AdaptFormer", "chen2022adaptformer", "shi2024lift", "LogitAdjustment", "num_test_views"):
        assert words in card, words
    assert "pipeline_tag: image-classification" in card


@pytest.mark.slow
def test_a_fresh_process_loads_it(trained, tmp_path):
    run, _, folder = trained
    images, model = tiny_images(6, seed=9)["image"][:], run.model.eval()
    processor = tiny_processor().image_processor
    run.save_model(folder / "adapter")  # which names the base's folder
    processor.save_pretrained(folder / "adapter")
    (folder / "images").mkdir()
    for i, image in enumerate(images):
        image.save(folder / "images" / f"{i}.png")
    with torch.no_grad():
        logits = model(**processor(images=images, return_tensors="pt")).logits
    torch.save({"logits": logits}, folder / "expected.pt")
    assert linear_classifier(model).weight.shape == (5, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        done = subprocess.run([sys.executable, "-c", LOADER, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [NAMES[i].replace(" ", "_") for i in np.asarray(logits).argmax(1)]
