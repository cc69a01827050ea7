"""Training on images without labels: what it takes, what it equals, what a card says, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from datasets import ClassLabel, Value

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments
from peft_ncgeo.hub import create_card
from peft_ncgeo.losses import (
    Distillation,
    LogitAdjustment,
    OTPreservation,
    PointwisePreservation,
    Regularizer,
    SpaceAlignment,
)
from peft_ncgeo.training import GeometryMonitor, GradientProjection

from ..conftest import NAMES, tiny_images, tiny_processor
from .runs import larger_clip, prompted_clip, student_of, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def with_labels(labels, count=16, feature=None):
    """The same images with other labels; a number stands for all of them."""
    labels = [labels] * count if not isinstance(labels, list) else labels
    return tiny_images(count).remove_columns("label").add_column("label", labels, feature=feature)


LABELS = tiny_images(16)["label"][:]
SETS = {
    "no column": (lambda: tiny_images(16).remove_columns("label"), True),
    "whole numbers": (lambda: with_labels(-1, feature=Value("int64")), True),
    "none known": (lambda: with_labels(-1, feature=ClassLabel(names=NAMES)), False),
    "empty cells": (lambda: with_labels(None, feature=ClassLabel(names=NAMES)), False),
    "some known": (lambda: with_labels([*LABELS[:9], *[-1] * 7], feature=ClassLabel(names=NAMES)), False),
    "named twice": (lambda: with_labels(-1, feature=ClassLabel(names=NAMES)), True),
}


def distilled(tmp_path, train, named, losses=None, **options):
    options = {"model": prompted_clip(), "teacher": larger_clip(), "classify": False, **options}
    losses = [Distillation(weight=5.0)] if losses is None else losses
    return trainer(tmp_path, losses=losses, train=train, class_names=NAMES if named else None, **options)


def test_names_may_come_one_by_one(tmp_path):
    train, options = SETS["no column"][0](), {"teacher": larger_clip(), "classify": False}
    run = trainer(tmp_path, losses=[Distillation()], train=train, class_names=iter(NAMES), **options)
    assert run.class_names == NAMES


@pytest.mark.parametrize("name", SETS)
def test_labels_make_no_difference(tmp_path, name):
    make, named = SETS[name]
    results = []
    for train, given in ((tiny_images(16), False), (make(), named)):
        losses = [Distillation(weight=5.0), PointwisePreservation(weight=0.1)]
        run = distilled(tmp_path, train, given, losses, eval_dataset=tiny_images(10))
        run.train()
        results.append((weights(run.model), run.evaluate()["eval_accuracy"]))
        assert run.class_names == NAMES
    torch.testing.assert_close(results[0][0], results[1][0], atol=0, rtol=0)
    assert results[0][1] == results[1][1]


def test_terms_get_no_labels_rather_than_some(tmp_path):
    seen = []

    class Reads(Regularizer):
        reads_labels = False  # which is not true

        def forward(self, batch):
            seen.append(batch.labels)
            return batch.need("labels")[0].sum() * 0.0

    run = distilled(tmp_path, SETS["some known"][0](), False, [Reads(1.0), Distillation()])
    with pytest.raises(ValueError, match="labels"):
        run.train()
    assert seen == [None]


@pytest.mark.parametrize(("name", "epochs"), [("no column", 1), ("none known", 3)])
def test_a_student_of_texts_and_its_card(tmp_path, name, epochs):
    make, named = SETS[name]
    options = {"model": student_of(larger_clip()), "eval_dataset": {"test": tiny_images(10)}}
    run = distilled(tmp_path, make(), named, num_train_epochs=epochs, **options)
    run.train()
    record = run.record()
    assert (record.unlabelled, record.class_counts, record.class_names) == (16, [], NAMES)
    assert record.teacher == "CLIPModel"
    read = type(record).from_dict(record.to_dict())
    assert dataclasses.replace(record, snapshots=None) == read
    card = create_card(record=record).text
    assert "16 unlabelled images" in card
    assert "ransductive" in card
    assert "Teacher: CLIPModel" in card
    labelled = distilled(tmp_path, tiny_images(16), False, max_steps=1).record()
    assert labelled.unlabelled == 0
    assert "ransductive" not in create_card(record=labelled).text


class OfCounts(Regularizer):
    default_name, requires, reads_labels = "of_counts", ("class_counts",), False


REFUSED = {
    "of_counts reads labels": {"losses": lambda: [Distillation(), OfCounts(1.0)]},
    "ce reads labels": {"classify": True},
    "ce reads labels.*'label'": {"classify": True, "train": SETS["no column"][0], "named": True},
    "ot reads labels": {"losses": lambda: [Distillation(), OTPreservation(weight=1.0)]},
    "space_alignment reads labels": {"losses": lambda: [Distillation(), SpaceAlignment(weight=1.0)]},
    "logit_adjustment reads labels": {"classify": True, "classification_loss": LogitAdjustment()},
    "class_balanced_sampling reads labels": {"class_balanced_sampling": True},
    "No label column.*class_names": {"train": SETS["no column"][0]},
    "not a ClassLabel but int64": {"train": lambda: with_labels(LABELS, feature=Value("int64")), "named": True},
    "class_names.*are not those of column 'label'": {"class_names": NAMES[::-1]},
    "has 1 class": {"train": SETS["no column"][0], "class_names": NAMES[:1]},
    "Duplicate": {"train": SETS["no column"][0], "class_names": ["cat", "cat"]},
    "label -3.*or -1": {"train": lambda: with_labels([-3, *[-1] * 15], feature=ClassLabel(names=NAMES))},
    "No label column 'label'.*": {"eval_dataset": tiny_images(8).remove_columns("label")},
    "label -1, outside": {"eval_dataset": with_labels(-1, feature=ClassLabel(names=NAMES))},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_needs_labels_is_refused_in_one_line(tmp_path, message):
    options = dict(REFUSED[message])
    train, named = options.pop("train", SETS["some known"][0]), options.pop("named", False)
    losses = options.pop("losses", lambda: [Distillation()])()
    given = {"train": train(), "class_names": NAMES if named else None, "teacher": larger_clip()}
    with pytest.raises(ValueError, match=message) as caught:
        trainer(tmp_path, losses=losses, **{**given, "classify": False, **options})
    assert "\n" not in str(caught.value)


def test_class_names_are_those_of_a_training_set(tmp_path):
    args = GeometryTrainingArguments(str(tmp_path))
    with pytest.raises(ValueError, match="class_names.*train_dataset"):
        GeometryTrainer(prompted_clip(), args, class_names=NAMES, processing_class=tiny_processor())


def test_callbacks_that_read_class_means_are_refused(tmp_path):
    run = distilled(tmp_path, SETS["no column"][0](), True, callbacks=[GradientProjection()])
    with pytest.raises(ValueError, match="GradientProjection reads labels"):
        run.train()
    distilled(
        tmp_path, SETS["no column"][0](), True, callbacks=[GeometryMonitor()], eval_dataset=tiny_images(8), max_steps=1
    ).evaluate()


def test_transport_between_images_reads_no_labels(tmp_path):
    make, named = SETS["no column"]
    losses = [OTPreservation(weight=1.0, modality="image")]
    distilled(tmp_path, make(), named, losses, teacher=None, max_steps=2).train()


def test_names_of_a_head_that_is_not_trained_are_its_own(tmp_path):
    """Its rows mean the classes that they were made of."""
    other = ["red tree", *NAMES[1:]]
    with pytest.raises(ValueError, match="'red tree'"):
        trainer(
            tmp_path,
            student_of(larger_clip()),
            [Distillation()],
            train=SETS["no column"][0](),
            class_names=other,
            classify=False,
            teacher=larger_clip(),
        )
