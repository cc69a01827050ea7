"""The errors of docs/troubleshooting.md are those that the package gives."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, Value
from peft import LoraConfig, get_peft_model
from transformers import ResNetConfig, ResNetModel
from typer.testing import CliRunner

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments, NPTConfig, ZeroShotClassifier
from peft_ncgeo.cli import app
from peft_ncgeo.data import base_new_split, class_prompts, few_shot, load_images
from peft_ncgeo.losses import LDAM, OTPreservation

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from .pages import ROOT

TEXT = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
LORA = LoraConfig(target_modules=["q_proj", "v_proj"])
HEAD = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])


def arguments(folder, **options) -> GeometryTrainingArguments:
    return GeometryTrainingArguments(str(folder / "outputs"), max_steps=1, report_to="none", **options)


def trainer(folder, model=None, config=LORA, data=None, evaluation=None, losses=(), loss=None, **options):
    parts = {"processing_class": tiny_processor(), "peft_config": config, "losses": list(losses)}
    parts |= {"classification_loss": loss} if loss else {}
    model, data = model or tiny_clip(), data or tiny_images()
    return GeometryTrainer(model, arguments(folder, **options), data, evaluation, **parts)


def numbered() -> Dataset:
    return tiny_images().cast_column("label", Value("int64"))


def frozen():
    return get_peft_model(tiny_clip(), LORA).requires_grad_(False)


def zero_shot() -> ZeroShotClassifier:
    return ZeroShotClassifier(tiny_clip(), tiny_processor())


def texts(*names: str):
    return class_prompts(names, "a photo of a {}.", 4, tiny_processor().tokenizer)


def damaged(folder):
    (folder / "photo.png").write_bytes(b"no image")
    return zero_shot().predict(folder / "photo.png", class_names=NAMES)


def on_a_resnet():
    model = ResNetModel(ResNetConfig(hidden_sizes=[4, 4], depths=[1, 1], embedding_size=4))
    return get_peft_model(model, NPTConfig(num_text_tokens=0, num_vision_tokens=2))


def command(*words: str):
    raise ValueError(CliRunner().invoke(app, list(words)).output)


BEST = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
OT = OTPreservation(budget=0.05)
# the words of the page, and what a user did
PROVOKED = {
    "is not a ClassLabel": lambda folder: trainer(folder, data=numbered()),
    "name it in image_column": lambda folder: trainer(folder, data=tiny_images().rename_column("image", "picture")),
    "name the classes, in the order of the numbers": lambda folder: load_images(numbered()),
    "needs at least 4 classes": lambda folder: base_new_split(tiny_images(names=NAMES[:3])),
    "fewer than the": lambda folder: few_shot(tiny_images(), 500),
    "its file is empty, damaged or of an unknown kind": damaged,
    "An array must be uint8": lambda folder: zero_shot().predict(np.zeros((8, 8, 3)), class_names=NAMES),
    "give the same text and cannot separate": lambda folder: texts("Cat", "cat"),
    "would be cut off": lambda folder: texts("cat", "a long name " * 9),
    "The classes of the adapter's training are not known": lambda folder: zero_shot().predict(
        tiny_images()[0]["image"]
    ),
    "neither a folder nor the id of a repository": lambda folder: ZeroShotClassifier.from_pretrained(f"{folder}/none"),
    "No parameter is trainable": lambda folder: trainer(folder, frozen(), None).train(),
    "takes exactly one of weight and budget": lambda folder: OTPreservation(weight=10, budget=0.05),
    "reads no text": lambda folder: trainer(folder, tiny_vit_classifier(), HEAD, losses=[OT]),
    "prompts: set num_vision_tokens=0": lambda folder: on_a_resnet(),
    "the data set 3 classes": lambda folder: trainer(folder, tiny_vit_classifier(), data=tiny_images(names=NAMES[:3])),
    "smooths the labels of CrossEntropy alone": lambda folder: trainer(
        folder, loss=LDAM(), label_smoothing_factor=0.1
    ),
    "does not say which evaluation set is meant": lambda folder: trainer(
        folder, evaluation={"base": tiny_images()}, metric_for_best_model="accuracy", **BEST
    ),
    "fp16=True needs a GPU": lambda folder: trainer(folder, fp16=True),
    "FSDP is not supported": lambda folder: arguments(folder, fsdp="full_shard"),
    "No valid checkpoint in": lambda folder: trainer(folder).train(resume_from_checkpoint=True),
    "Images of your own need --model": lambda folder: command("train", str(folder)),
}


def test_errors_are_those_that_the_page_shows(tmp_path):
    assert len(PROVOKED) >= 20
    for words, provoke in PROVOKED.items():
        with pytest.raises((ValueError, OSError, NotImplementedError)) as error:
            provoke(tmp_path)
        assert words in " ".join(str(error.value).split())
        assert words in TEXT
