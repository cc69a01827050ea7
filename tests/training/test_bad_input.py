"""Bad input gets one line that names the thing and the mend, before training starts where possible."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Image
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments, NPTConfig
from peft_ncgeo.losses import (
    GeometricDebiasing,
    LanguageCollapse,
    LogitAdjustment,
    ModalityIsomorphism,
    OTPreservation,
    PrototypeSupCon,
    Regularizer,
)
from peft_ncgeo.training import PromptAveraging
from peft_ncgeo.training.state.files import FILE_NAME

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit
from .runs import Pointwise, lora_clip, ot_and_budget, prompted_clip, prototypes, trainer, vit, weights


def test_checkpoint_of_other_losses_is_refused(tmp_path):
    trainer(tmp_path, losses=ot_and_budget(), save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="written for other losses"):
        trainer(tmp_path / "b", losses=[OTPreservation(weight=1.0)]).train(resume_from_checkpoint=checkpoint)
    (Path(checkpoint) / FILE_NAME).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="Cannot resume from"):
        trainer(tmp_path / "b", losses=ot_and_budget()).train(resume_from_checkpoint=checkpoint)


def test_non_finite_term_is_named_before_the_step(tmp_path):
    class Broken(Regularizer):
        default_name = "broken"

        def forward(self, batch):
            return batch.image_features.sum() * float("nan")

    run = trainer(tmp_path, losses=[Broken(weight=1.0)])
    before = weights(run.model)
    with pytest.raises(FloatingPointError, match="loss/broken.*1.*no"):
        run.train()
    torch.testing.assert_close(weights(run.model), before)


def bad(column: str, values, feature=None):
    images = tiny_images(10)
    return images.remove_columns(column).add_column(column, values, feature=feature)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (lambda: tiny_images(10).rename_column("image", "img"), "No image column 'image' among"),
        (lambda: tiny_images(10).rename_column("label", "fine"), "No label column 'label' among"),
        (lambda: bad("label", list(range(10))), "'label' is not a ClassLabel but int64"),
        (lambda: bad("label", [[1]] * 10), "multi-label"),
        (lambda: tiny_images(10).cast_column("image", Image(decode=False)), "files that are not decoded"),
        (
            lambda: bad("image", [Image().encode_example(np.full((2, 2), 2000, np.int32))] * 10, Image()),
            "Column 'image' holds whole numbers from 2000",
        ),
        (lambda: bad("image", ["a.png"] * 10), "Column 'image' is not of type datasets.Image"),
        (lambda: tiny_images(10).select([]), "The data set is empty"),
        (lambda: tiny_images(4), "Class 'white panda' has no samples"),
        (lambda: tiny_images(4, ["cat"]), "has 1 class; classification needs at least two"),
        (lambda: bad("label", [-1] * 10, ClassLabel(names=NAMES)), "has label -1, outside the 5 class names"),
        (lambda: tiny_images(4, ["red cat", "Red  cat"]), "Duplicate class names: 'red cat' and 'Red  cat'"),
        (lambda: tiny_images(4, ["red cat", "cat " * 12]), "'cat cat .* would be cut off: its text has 19 tokens"),
    ],
)
def test_bad_data_is_named(tmp_path, train, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, train=train())


def test_a_blank_class_is_refused_before_a_head_is_trained(tmp_path):
    """Its name would be saved, and refused when the adapter is loaded."""
    with pytest.raises(ValueError, match="Class 1.*name ' '.*names must"):
        trainer(tmp_path, vit(), train=tiny_images(10, ["cat", " ", "dog", "hen", "owl"]))


def test_bad_evaluation_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="No image column"):
        trainer(tmp_path, eval_dataset={"base": tiny_images(10), "new": tiny_images(10).rename_column("image", "x")})


def test_missing_files_type_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"Expected a datasets.Dataset, got list"):
        trainer(tmp_path, train=[1, 2])


def test_model_and_losses_must_fit(tmp_path):
    with pytest.raises(ValueError, match="ot requires frozen_text_features, but ViTForImageClassification reads no"):
        trainer(tmp_path, vit(), [OTPreservation(weight=1.0)])
    with pytest.raises(ValueError, match="Two losses have the name 'ot'"):
        trainer(tmp_path, losses=[OTPreservation(weight=1.0), OTPreservation(weight=2.0)])
    with pytest.raises(ValueError, match="no PEFT adapters to switch off"):
        trainer(tmp_path, tiny_clip(), [OTPreservation(weight=1.0)])
    with pytest.raises(ValueError, match="neither text features nor a classification head"):
        trainer(tmp_path, tiny_vit())
    with pytest.raises(ValueError, match="head.*5.*2 classes"):
        trainer(tmp_path, vit(), train=tiny_images(4, ["cat", "dog"]))

    with pytest.raises(ValueError, match="Two losses have the name 'ce'"):
        trainer(tmp_path, losses=[OTPreservation(weight=1.0, name="ce")])
    with pytest.raises(ValueError, match="Nothing to train"):
        trainer(tmp_path, classify=False)

    class Asking(Pointwise):
        requires = ("pooled_features",)

    with pytest.raises(ValueError, match="pooled_features, which GeometryTrainer does not fill"):
        trainer(tmp_path, losses=[Asking(weight=1.0)])


def test_prototypes_and_losses_must_fit(tmp_path):
    with pytest.raises(ValueError, match="has no head"):
        trainer(tmp_path, losses=[PrototypeSupCon(copies=1, temperature=1)])
    with pytest.raises(ValueError, match="give.*PrototypeConfig"):
        trainer(tmp_path, vit(), [PrototypeSupCon()])
    with pytest.raises(ValueError, match="give temperature, or train"):
        trainer(tmp_path, vit(), [PrototypeSupCon(torch.eye(5), copies=3)])
    with pytest.raises(ValueError, match="has no projector"):
        trainer(tmp_path, prototypes(), [OTPreservation(weight=1.0, modality="image")])
    with pytest.raises(ValueError, match="head.*5.*2 classes"):
        trainer(tmp_path, prototypes(), train=tiny_images(4, ["cat", "dog"]))


def test_template_is_the_adapters(tmp_path):
    model = prompted_clip(template="a photo of {}.")
    assert trainer(tmp_path, model).task.template == "a photo of {}."
    with pytest.raises(ValueError, match="differs from the adapter's own template"):
        trainer(tmp_path, model, template="a photo of the {}.")
    assert trainer(tmp_path, lora_clip(), template="a {}.").task.template == "a {}."


def test_processes_that_do_not_see_each_other_are_refused(tmp_path, monkeypatch):
    launched = SimpleNamespace(environ={"WORLD_SIZE": "2"})  # this process really is alone
    monkeypatch.setattr("peft_ncgeo.training.arguments.os", launched)
    with pytest.raises(RuntimeError, match="2"):
        trainer(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "variable", "name"),
    [
        ({"fsdp": "full_shard"}, {}, "FSDP"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, {}, "DeepSpeed"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({}, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
    ],
)
def test_shards_are_refused(tmp_path, monkeypatch, arguments, variable, name):
    for key, value in variable.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=rf"^{name}.*not.*whole") as error:
        trainer(tmp_path, **arguments)
    assert "\n" not in str(error.value)


def test_a_process_that_reads_for_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dispatch_batches=True is not supported"):
        trainer(tmp_path, accelerator_config={"dispatch_batches": True})


def test_argument_values(tmp_path):
    with pytest.raises(ValueError, match="augmentation='blur'"):
        trainer(tmp_path, augmentation="blur")


def test_adapter_of_another_depth_is_refused_on_resume(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    shallow = prompted_clip()
    other = NPTConfig.ivlp(text_init=[6, 7, 8, 6], text_depth=1, vision_depth=1)
    shallow.delete_adapter("default")
    shallow.add_adapter("default", other)
    shallow.set_adapter("default")
    with pytest.raises(ValueError, match="made for another architecture or depth"):
        trainer(tmp_path / "b", shallow).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    shutil.rmtree(tmp_path)


def test_a_head_knows_its_own_classes_only(tmp_path):
    for names, why in (
        (["one", "two", "three", "four", "five"], "in their order only"),
        (NAMES[::-1], "another order"),
    ):
        with pytest.raises(ValueError, match=why):
            trainer(tmp_path, vit(), eval_dataset={"base": tiny_images(10), "new": tiny_images(10, names)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns=True would drop"),
        ({"frozen_templates": ["a photo"]}, r"must hold '\{\}' once"),
        ({"frozen_templates": ["a photo of " * 6 + "{}"]}, "would be cut off"),
    ],
)
def test_arguments_that_would_be_ignored(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, losses=[OTPreservation(weight=1.0)], **arguments)


def test_arguments_of_another_class_are_refused(tmp_path):
    with pytest.raises(TypeError, match="must be GeometryTrainingArguments, got TrainingArguments"):
        GeometryTrainer(prompted_clip(), TrainingArguments(str(tmp_path)), processing_class=tiny_processor())


def test_a_frozen_adapter_is_refused(tmp_path):
    prompted_clip().save_pretrained(tmp_path / "adapter")
    run = trainer(tmp_path, PeftModel.from_pretrained(tiny_clip(), tmp_path / "adapter"))
    with pytest.raises(ValueError, match="No.*adapter.*is_trainable=True"):
        run.train()


def test_a_teacher_that_would_change_is_refused(tmp_path):
    model = get_peft_model(tiny_clip(), LoraConfig(target_modules=["q_proj"], bias="all"))
    with pytest.raises(ValueError, match=r"bias.*no adapter"):
        trainer(tmp_path, model, [OTPreservation(weight=1.0)])


@pytest.mark.parametrize("bad", [lambda batch: batch.image_features, lambda batch: batch.logits.sum(0)])
def test_a_loss_that_is_no_scalar_is_named(tmp_path, bad):
    class Vector(Regularizer):
        default_name = "vector"
        forward = staticmethod(bad)

    with pytest.raises(ValueError, match="loss/vector must be a scalar, got shape"):
        trainer(tmp_path, losses=[Vector(weight=1.0)]).train()


def test_a_weight_that_becomes_nan_is_named_before_the_step(tmp_path):
    run = trainer(tmp_path, losses=[Pointwise(weight=lambda t: float("nan"))])
    before = weights(run.model)
    with pytest.raises(ValueError, match="weight.*0%"):
        run.train()
    torch.testing.assert_close(weights(run.model), before)


def test_unknown_evaluation_sets_are_named(tmp_path):
    run = trainer(tmp_path, eval_dataset={"base": tiny_images(10)})
    with pytest.raises(ValueError, match=r"No.*'neww'.*\['base'\]"):
        run.evaluate("neww")
    with pytest.raises(ValueError, match="nothing to evaluate"):
        trainer(tmp_path).evaluate()


def test_resuming_without_the_checkpoints_losses_is_refused(tmp_path):
    trainer(tmp_path, losses=ot_and_budget(), save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="written for other losses"):
        trainer(tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_terms_in_the_wrong_place_are_refused(tmp_path):
    with pytest.raises(TypeError, match="LogitAdjustment belongs to classification_loss"):
        trainer(tmp_path, losses=[LogitAdjustment()])
    with pytest.raises(TypeError, match="OTPreservation belongs to losses"):
        trainer(tmp_path, classification_loss=OTPreservation(weight=1.0))


@pytest.mark.parametrize("term", [LanguageCollapse, GeometricDebiasing, ModalityIsomorphism])
def test_terms_on_texts_are_refused_on_a_model_without(tmp_path, term):
    with pytest.raises(ValueError, match=r"requires text_features, but ViT\w+ reads no text"):
        trainer(tmp_path, vit(), losses=[term(weight=1.0)])


@pytest.mark.parametrize("field", ["student_templates", "frozen_templates"])
def test_templates_must_be_read_and_have_a_place_for_the_name(tmp_path, field):
    with pytest.raises(ValueError, match=f"{field}.*no"):
        trainer(tmp_path, **{field: ["the {}."]})
    with pytest.raises(ValueError, match=rf"{field}\[0\]='the' must hold '{{}}' once"):
        trainer(tmp_path, **{field: ["the"]})
    with pytest.raises(ValueError, match=rf"{field}\[0\]=3 must hold '{{}}' once"):
        trainer(tmp_path, **{field: [3]})


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(GeometryTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="One process sees 2 GPUs"):
        trainer(tmp_path)


def test_a_batch_that_cannot_be_shared(tmp_path, monkeypatch):
    args = GeometryTrainingArguments(output_dir=str(tmp_path))
    monkeypatch.setattr(GeometryTrainingArguments, "world_size", 2)
    args.share_batch(6)
    assert args.per_device_train_batch_size == 3
    for size in (5, 0):
        with pytest.raises(ValueError, match=f"batch_size={size} cannot be shared by 2 processes"):
            args.share_batch(size)


def test_the_average_of_prompts_is_no_best_model(tmp_path):
    images = tiny_images(10)
    run = trainer(
        tmp_path,
        callbacks=[PromptAveraging()],
        eval_dataset=images,
        load_best_model_at_end=True,
        eval_strategy="epoch",
        save_strategy="epoch",
    )
    with pytest.raises(ValueError, match="load_best_model_at_end=False"):
        run.train()


def test_two_callbacks_of_one_name_cannot_share_a_state(tmp_path):
    run = trainer(tmp_path, callbacks=[PromptAveraging(), PromptAveraging()], save_strategy="epoch")
    with pytest.raises(ValueError, match="2.*name 'prompt_averaging'"):
        run.train()
