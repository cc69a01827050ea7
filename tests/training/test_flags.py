"""Arguments of Transformers' Trainer: each works as it does there, or is refused before training with the mend."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from peft_ncgeo import GeometryTrainingArguments
from peft_ncgeo.losses import LDAM, CrossEntropy, GeometryBatch, OTPreservation, Regularizer
from peft_ncgeo.training.features.half_weights import autocast_dtype

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from .runs import trainer, vit

pytestmark = pytest.mark.filterwarnings("ignore:.*all of them get prompts")


def refused(error, *words, **arguments):
    """The error is raised when the trainer is made, in one line that has these words."""
    with pytest.raises(error) as found:
        trainer(**arguments)
    assert all(word in str(found.value) for word in words), found.value
    assert "\n" not in str(found.value)


# ------------------------------------------------------------------------------------------------------- evaluation


def test_batches_that_are_not_joined_have_the_same_metrics_and_card(tmp_path):
    options = {"eval_dataset": tiny_images(23, seed=1), "per_device_eval_batch_size": 10}
    joined, apart = trainer(tmp_path, **options), trainer(tmp_path, eval_do_concat_batches=False, **options)
    for key in ("loss", "accuracy", "balanced_accuracy"):
        assert apart.evaluate()[f"eval_{key}"] == pytest.approx(joined.evaluate()[f"eval_{key}"])
    assert apart.record().sets == joined.record().sets
    assert [len(batch) for batch in apart.predict(options["eval_dataset"]).predictions] == [10, 10, 3]


def test_metrics_of_batches_are_the_users_own(tmp_path):
    refused(ValueError, "batch_eval_metrics", "compute_result", output_dir=tmp_path, batch_eval_metrics=True)
    right = []

    def share(prediction, compute_result):
        right.append(np.asarray(prediction.predictions).argmax(-1) == np.asarray(prediction.label_ids))
        return {"share": float(np.concatenate(right).mean())} if compute_result else {}

    options = {"eval_dataset": tiny_images(23, seed=1), "per_device_eval_batch_size": 10}
    run = trainer(tmp_path, batch_eval_metrics=True, compute_metrics=share, **options)
    assert run.evaluate()["eval_share"] == trainer(tmp_path, **options).evaluate()["eval_accuracy"]


def test_metrics_that_ask_for_class_names_get_those_of_their_set(tmp_path):
    near, far = tiny_images(11), tiny_images(7, NAMES[:3][::-1], seed=2)

    def recalls(prediction, class_names):
        predicted, labels = prediction.predictions.argmax(-1), prediction.label_ids
        return {name: float((predicted == labels)[labels == k].mean()) for k, name in enumerate(class_names)}

    run = trainer(tmp_path, eval_dataset={"near": near, "far": far}, compute_metrics=recalls)
    metrics = run.evaluate()
    for name, images in {"near": near, "far": far}.items():
        right = run.predict(images).predictions.argmax(-1) == np.array(images["label"])
        for k, of_class in enumerate(images.features["label"].names):
            expected = right[np.array(images["label"]) == k].mean()
            assert metrics[f"eval_{name}_{of_class}"] == pytest.approx(expected)
    only = trainer(
        tmp_path, eval_dataset=near, compute_metrics=lambda prediction: {"count": len(prediction.label_ids)}
    )
    assert only.evaluate()["eval_count"] == 11
    for wrong in (lambda: {}, lambda prediction, names: {}):
        refused(TypeError, "compute_metrics", "class_names", output_dir=tmp_path, compute_metrics=wrong)


def test_inputs_of_metrics(tmp_path):
    refused(ValueError, "include_for_metrics", "input_ids", output_dir=tmp_path, include_for_metrics=["inputs"])
    seen = []

    def keep(prediction):
        seen.append(prediction.inputs)
        return {}

    images = tiny_images(7)
    options = {"eval_dataset": images, "compute_metrics": keep}
    trainer(tmp_path, vit(), include_for_metrics=["inputs", "loss"], **options).evaluate()
    expected = tiny_processor().image_processor(images=images["image"][:], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(seen[0], expected)


def test_uneven_batches_on_several_processes_are_refused(tmp_path, monkeypatch):
    uneven = {"output_dir": tmp_path, "accelerator_config": {"even_batches": False}}
    trainer(**uneven)  # nothing to even out
    monkeypatch.setattr(GeometryTrainingArguments, "world_size", 2)
    refused(ValueError, "even_batches=False", **uneven)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["accuracy", "loss", "eval_accuracy", "harmonic_mean"])
def test_the_metric_that_chooses_says_of_which_set(tmp_path, metric):
    images = tiny_images(10)
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "metric_for_best_model": metric}
    options |= {"output_dir": tmp_path, "greater_is_better": True, "lr_scheduler_type": "reduce_lr_on_plateau"}
    refused(ValueError, "metric_for_best_model", "'far_accuracy'", eval_dataset={"far": images}, **options)
    trainer(**{**options, "metric_for_best_model": "far_accuracy"}, eval_dataset={"far": images}).train()
    if metric != "harmonic_mean":
        trainer(**options, eval_dataset=images).train()
    else:
        trainer(**options, eval_dataset={"base": images, "new": images}).train()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("neftune_noise_alpha", 5.0),
        ("use_liger_kernel", True),
        ("train_sampling_strategy", "group_by_length"),
        ("fp16", True),
    ],
)
def test_arguments_that_would_fail_once_training_has_begun(tmp_path, name, value):
    if name not in GeometryTrainingArguments.__dataclass_fields__:
        pytest.skip("this Transformers has no such argument")
    refused(ValueError, name, **{name: value}, output_dir=tmp_path)


def test_half_precision_of_the_launcher_is_refused_on_a_cpu_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    refused(ValueError, "fp16", "bf16", output_dir=tmp_path)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_frozen_weights_are_cast_to_what_autocast_really_casts_to(dtype):
    """Accelerate runs no autocast for "fp16" on a CPU, whatever `mixed_precision` says."""

    def autocast():
        return torch.autocast("cpu", dtype=dtype) if dtype else nullcontext()

    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="fp16", autocast=autocast)
    assert autocast_dtype(accelerator) == dtype


# ---------------------------------------------------------------------------------------------------------- losses


class TakesTwo(nn.Module):
    def forward(self, logits, labels):
        return nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), nn.NLLLoss(), nn.TripletMarginLoss(), nn.Flatten(), TakesTwo()]
)
def test_modules_that_take_no_batch_are_refused(tmp_path, loss):
    name = type(loss).__name__
    refused(TypeError, "classification_loss", name, "CrossEntropy()", output_dir=tmp_path, classification_loss=loss)


@pytest.mark.parametrize("loss", [CrossEntropy, "ce", nn.functional.cross_entropy, [CrossEntropy()]])
def test_what_is_no_module_is_refused(tmp_path, loss):
    refused(TypeError, "classification_loss", "CrossEntropy()", output_dir=tmp_path, classification_loss=loss)


@pytest.mark.parametrize("loss", [3, OTPreservation, nn.CrossEntropyLoss(), "ot"])
def test_what_is_no_term_is_refused(tmp_path, loss):
    refused(TypeError, "losses", "Regularizer", output_dir=tmp_path, losses=[loss])


def test_label_smoothing():
    """(1 - a) of the target on the label, a spread over all K classes."""
    logits, labels = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 2, 1, 0, 2, 4])
    targets = 0.9 * nn.functional.one_hot(labels, 5) + 0.1 / 5
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    value = CrossEntropy(label_smoothing=0.1)(GeometryBatch(logits=logits, labels=labels))
    torch.testing.assert_close(value, expected)
    for share in (-0.1, 1.5, "x"):
        with pytest.raises((ValueError, TypeError), match="label_smoothing"):
            CrossEntropy(label_smoothing=share)


def test_label_smoothing_of_the_arguments_is_torchs(tmp_path):
    class Seen(Regularizer):
        requires, reads_labels = (), False

        def forward(self, batch):
            seen.append((batch.logits.detach(), batch.labels))
            return 0 * batch.logits.sum()

    seen, images = [], tiny_images(19)
    run = trainer(tmp_path, train=images, label_smoothing_factor=0.3, losses=[Seen(weight=1.0)], max_steps=3)
    run.train()
    logged = [entry["loss/ce"] for entry in run.state.log_history if "loss/ce" in entry]
    torchs = nn.CrossEntropyLoss(label_smoothing=0.3)
    assert logged == pytest.approx([float(torchs(logits, labels)) for logits, labels in seen], rel=1e-5)
    trainer(tmp_path, classification_loss=CrossEntropy(0.3), label_smoothing_factor=0.3)
    for options, word in (
        ({"classification_loss": LDAM()}, "LDAM"),
        ({"classify": False, "losses": [Seen(weight=1.0)]}, "classification_loss=None"),
        ({"classification_loss": CrossEntropy(0.1)}, "set one"),
        ({"train": images.map(lambda row: {"label": -1})}, "label -1"),
    ):
        refused(ValueError, word, output_dir=tmp_path, label_smoothing_factor=0.3, **options)


def test_a_loss_of_logits_and_labels_as_the_error_says(tmp_path):
    class Mine(CrossEntropy):
        def forward(self, batch):
            return nn.CrossEntropyLoss()(*batch.need("logits", "labels"))

    logs = []
    for loss in (CrossEntropy(), Mine()):
        run = trainer(tmp_path, classification_loss=loss, max_steps=2)
        run.train()
        logs.append([entry["loss/ce"] for entry in run.state.log_history if "loss/ce" in entry])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


# ------------------------------------------------------------------------------------------------ models, collators


def warned(run) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    return [str(warning.message) for warning in caught if "get_peft_model" in str(warning.message)]


def test_a_model_that_is_trained_as_a_whole_is_told_of(tmp_path):
    model = tiny_clip()
    (message,) = warned(trainer(tmp_path, model, max_steps=1))
    assert f"{sum(p.numel() for p in model.parameters()):,}" in message
    head = tiny_vit_classifier()
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    assert not warned(trainer(tmp_path, head, max_steps=1))  # chosen by hand
    assert not warned(trainer(tmp_path, vit(), max_steps=1))


def collated(samples):
    images = [sample["image"] for sample in samples]
    pixels = tiny_processor().image_processor(images=images, return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor([sample["label"] for sample in samples])


def mixup(samples):
    pixels, labels = collated(samples)
    targets = nn.functional.one_hot(labels, 5).float()
    return {"pixel_values": 0.7 * pixels + 0.3 * pixels.flip(0), "labels": 0.7 * targets + 0.3 * targets.flip(0)}


def larger_share(samples):
    pixels, labels = collated(samples)
    return {"pixel_values": 0.7 * pixels + 0.3 * pixels.flip(0), "labels": labels}


def nameless(samples):
    pixels, labels = collated(samples)
    return {"pixel_values": pixels, "targets": labels}


@pytest.mark.parametrize(
    ("collator", "words"),
    [
        (mixup, ["MixUp(alpha)", "larger share"]),
        (nameless, ["'labels'", "targets"]),
        (lambda samples: {}, ["pixel_values"]),
    ],
)
def test_collators_that_give_no_class_an_image(tmp_path, collator, words):
    run = trainer(tmp_path, data_collator=collator, eval_dataset=tiny_images(8))
    for act in (run.train, run.evaluate):
        with pytest.raises(ValueError) as found:
            act()
        assert all(word in str(found.value) for word in words)
        assert "\n" not in str(found.value)
    assert run.state.global_step == 0


def test_mixed_images_of_one_class(tmp_path):
    assert trainer(tmp_path, data_collator=larger_share, max_steps=2).train().global_step == 2
