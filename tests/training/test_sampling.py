"""Class-balanced sampling, class counts and several texts a class in the trainer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from peft_ncgeo.data import long_tailed
from peft_ncgeo.losses import LDAM, BalancedSoftmax, LogitAdjustment, ModalityIsomorphism, Regularizer
from peft_ncgeo.training.sampling import ClassBalancedSampler

from ..conftest import tiny_images
from .runs import trainer, vit, weights


def test_sampler_shows_classes_equally_often():
    labels = [0] * 900 + [1] * 90 + [2] * 10
    sampler = ClassBalancedSampler(labels, seed=1)
    drawn = [index for index, _ in sampler]
    assert len(drawn) == len(sampler) == 1000
    assert [before for index, before in sampler if index == drawn[-1]] == list(range(drawn.count(drawn[-1])))
    counts = Counter(labels[i] for i in drawn)
    assert all(270 < counts[c] < 400 for c in range(3)), counts
    assert len(set(drawn) & set(range(990, 1000))) == 10
    assert list(sampler) == list(ClassBalancedSampler(labels, seed=1))
    assert list(sampler) != list(ClassBalancedSampler(labels, seed=2))
    first = list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)


def test_labels_without_samples_do_not_matter():
    assert {index for index, _ in ClassBalancedSampler([0, 3, 3])} <= {0, 1, 2}


def test_an_image_drawn_again_is_seen_in_another_view(tmp_path):
    run = trainer(tmp_path, train=tail(), class_balanced_sampling=True, augmentation="crop_flip")
    images = run.get_train_dataloader().dataset
    views = [np.asarray(images[4, draw]["image"]).tobytes() for draw in range(6)]
    assert len(set(views)) == 6
    assert np.asarray(images[4]["image"]).tobytes() == views[0]


def tail():
    return long_tailed(tiny_images(60), imbalance_factor=6, n_max=12)


class Seen(Regularizer):
    """Notes the labels and the counts of each batch."""

    default_name = "seen"
    requires = ("class_counts",)

    def __init__(self):
        super().__init__(weight=0.0)
        self.labels, self.counts = [], None

    def forward(self, batch):
        self.labels += batch.labels.tolist()
        self.counts = batch.class_counts.tolist()
        return batch.image_features.sum() * 0


def test_trainer_balances_classes_and_counts_them(tmp_path):
    balanced, plain = Seen(), Seen()
    for name, term in (("balanced", balanced), ("plain", plain)):
        run = trainer(
            tmp_path / name,
            train=tail(),
            losses=[term],
            num_train_epochs=12,
            class_balanced_sampling=name == "balanced",
        )
        run.train()
        assert term.counts == [12, 7, 4, 3, 2]
    assert sorted(Counter(plain.labels).values()) == [24, 36, 48, 84, 144]
    assert len(balanced.labels) == len(plain.labels)
    assert min(Counter(balanced.labels).values()) > 40


@pytest.mark.parametrize("size", [8, 64])
def test_every_image_is_evaluated_where_training_drops_the_last(tmp_path, size):
    """Also where the evaluation set is smaller than a batch; what a card tells is of all images too."""
    images, options = tiny_images(10, seed=1), {"per_device_eval_batch_size": size, "max_steps": 2}
    runs = [
        trainer(tmp_path, train=tiny_images(30), eval_dataset=images, dataloader_drop_last=drop, **options)
        for drop in (True, False)
    ]
    (dropping, whole), metrics = runs, [run.evaluate() for run in runs]
    for key in ("eval_accuracy", "eval_balanced_accuracy", "eval_loss"):
        assert metrics[0][key] == metrics[1][key]
    output = dropping.predict(images)
    assert output.label_ids.tolist() == images["label"][:]
    assert output.predictions.tolist() == whole.predict(images).predictions.tolist()
    dropping.train()
    labels = dropping.predict(images).predictions.argmax(-1)
    measured = dropping.record().sets["test"]
    assert measured["size"] == 10
    assert measured["after"]["accuracy"] == np.mean(labels == np.array(images["label"]))


@pytest.mark.parametrize("balanced", [False, True])
def test_training_drops_the_last_batch_alone(tmp_path, balanced):
    seen = Seen()
    options = {"dataloader_drop_last": True, "num_train_epochs": 1, "class_balanced_sampling": balanced}
    trainer(tmp_path, train=tiny_images(30), losses=[seen], **options).train()
    assert len(seen.labels) == 24


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("length", [{"max_steps": 3}, {"num_train_epochs": 2}])
def test_a_training_set_that_is_dropped_whole_is_refused(tmp_path, balanced, length):
    options = {"dataloader_drop_last": True, "per_device_train_batch_size": 64, "class_balanced_sampling": balanced}
    run = trainer(tmp_path, train=tiny_images(30), **options, **length)
    with pytest.raises(ValueError, match=r"dataloader_drop_last.*64.*per_device_train_batch_size") as error:
        run.train()
    assert "\n" not in str(error.value)


def test_resumed_equals_uninterrupted(tmp_path):
    """In the middle of the second epoch: its order is drawn again, and what was seen is skipped."""

    def run(folder, **arguments):
        return trainer(folder, train=tail(), class_balanced_sampling=True, num_train_epochs=3, **arguments)

    whole = run(tmp_path, save_strategy="steps", save_steps=6)
    whole.train()
    resumed = run(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(resumed.model)[name], value), name


@pytest.mark.parametrize("term", [LogitAdjustment(), BalancedSoftmax(), LDAM(max_margin=0.1)])
@pytest.mark.parametrize("model", [None, vit], ids=["clip", "vit"])
def test_terms_for_long_tails_train_and_are_logged(tmp_path, term, model):
    run = trainer(tmp_path, model() if model else None, train=tail(), classification_loss=term, max_steps=2)
    run.train()
    assert f"loss/{term.name}" in run.state.log_history[0]


def test_students_templates(tmp_path):
    """`template_features` are the student's own features of each template, and gradients reach the prompts.

    The frozen model's texts are the mean over its own templates.
    """
    seen = []

    class Templates(Regularizer):
        default_name = "templates"
        requires = ("template_features", "frozen_text_features")

        def forward(self, batch):
            seen.append((batch.template_features, batch.text_features, batch.frozen_text_features))
            return batch.template_features.square().mean()

    templates = ["a {}, in the tree.", "photo of the {}.", "a photo of a {}."]
    run = trainer(
        tmp_path,
        losses=[Templates(weight=1.0)],
        student_templates=templates,
        frozen_templates=templates[:2],
        max_steps=1,
        classify=False,
    )
    before = {}
    for template in templates:
        texts = run.task._read(run.class_names, "X X X X " + template, 4)
        with torch.no_grad():
            before[template] = run.extractor.eval()(**texts)["text_features"]
    with torch.no_grad(), run.model.disable_adapter():
        own = [run.task._read(run.class_names, template, 0) for template in templates[:2]]
        frozen_alone = sum(run.extractor(**texts)["text_features"] for texts in own) / 2
    old = weights(run.model)
    run.train()
    several, text, frozen = seen[0]
    assert several.shape == (5, 3, 24)
    torch.testing.assert_close(frozen, frozen_alone, atol=1e-6, rtol=1e-5)
    for t, template in enumerate(templates):
        torch.testing.assert_close(several[:, t], before[template], atol=1e-6, rtol=1e-5)
    for first, second in ((several[:, 0], several[:, 1]), (several[:, 1], several[:, 2]), (several[:, 2], text)):
        assert (first - second).abs().max() > 1e-3  # no words of a template are overwritten
    assert any(not torch.equal(old[n], w) for n, w in weights(run.model).items())


def test_without_templates_the_template_is_the_only_one(tmp_path):
    run = trainer(tmp_path, losses=[ModalityIsomorphism(weight=0.1, method="sinkhorn")], max_steps=1)
    run.train()
    mean = trainer(tmp_path, losses=[ModalityIsomorphism(weight=0.1)], max_steps=1)
    mean.train()
    logged = [r.state.log_history[0]["loss/isomorphism"] for r in (run, mean)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_a_term_that_needs_text_is_refused_on_a_model_without(tmp_path):
    with pytest.raises(ValueError, match="isomorphism requires template_features, but ViT"):
        trainer(tmp_path, vit(), losses=[ModalityIsomorphism(weight=0.1, method="sinkhorn")])
