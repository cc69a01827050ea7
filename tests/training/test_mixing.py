"""Mixup and CutMix in the trainer: pixels, targets, refusals, and resuming."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from peft_ncgeo.data import CutMix, MixUp
from peft_ncgeo.losses import (
    LDAM,
    BalancedSoftmax,
    CrossEntropy,
    GeometryBatch,
    ModalityIsomorphism,
    OTPreservation,
    SpaceAlignment,
)
from peft_ncgeo.training import GradientProjection

from ..conftest import tiny_images, tiny_processor
from .runs import prompted_clip, trainer, weights


def colours(count):
    """Images of one pure colour each, after which their class is named; another number of each class."""
    names, labels = ["red", "green", "blue"], [i % 4 % 3 for i in range(count)]
    images = [PILImage.new("RGB", (16, 16), tuple(255 * (np.arange(3) == label))) for label in labels]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


class Seen(CrossEntropy):
    """Keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, batch):
        self.batches.append(batch)
        return super().forward(batch)


@pytest.mark.parametrize(
    "mixing", [MixUp(alpha=0.7), pytest.param(CutMix(alpha=1.0), marks=pytest.mark.slow)], ids=str
)
def test_an_images_targets_are_the_shares_of_its_pixels(tmp_path, mixing):
    """The mean colour of what the model reads is, on these images, the share of each class."""
    loss, read = Seen(), []
    run = trainer(
        tmp_path,
        train=colours(17),
        eval_dataset=colours(9),
        data_collator=mixing,
        classification_loss=loss,
        losses=[OTPreservation(weight=1.0, modality="image")],
        num_train_epochs=1,
    )
    plain = trainer(tmp_path, train=colours(17), eval_dataset=colours(9))
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    run.model.get_base_model().vision_model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(kwargs["pixel_values"]) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    run.train()
    assert [len(pixels) for pixels in read] == [8, 8, 1]
    processor = tiny_processor().image_processor
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    for pixels, batch in zip(read, loss.batches, strict=True):
        seen = (pixels * std + mean).mean((2, 3))
        torch.testing.assert_close(batch.targets, seen, atol=1e-5, rtol=1e-5)
        assert batch.labels is None
        value = -(seen * batch.logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(CrossEntropy()(batch), value)
    assert any(((batch.targets > 0.01).sum(1) == 2).any() for batch in loss.batches)
    assert len(loss.batches[2].targets) == 1  # alone, an image is mixed with itself
    assert loss.batches[2].targets.max() == pytest.approx(1)


@pytest.mark.slow
def test_whole_targets_are_labels():
    """One-hot targets give the value of labels, with class counts and smoothing too."""
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 1, 1, 2, 0])
    whole, counts = torch.nn.functional.one_hot(labels, 4).float(), torch.tensor([5, 1, 2, 9])
    for loss in (CrossEntropy(), CrossEntropy(0.2), BalancedSoftmax()):
        of_labels = loss(GeometryBatch(logits=logits, labels=labels, class_counts=counts))
        of_targets = loss(GeometryBatch(logits=logits, targets=whole, class_counts=counts))
        torch.testing.assert_close(of_labels, of_targets)


@pytest.mark.slow
def test_what_needs_one_label_is_refused_before_training(tmp_path):
    for name, options in (
        ("LDAM", {"classification_loss": LDAM()}),
        ("ModalityIsomorphism", {"losses": [ModalityIsomorphism(weight=1.0)]}),
        ("SpaceAlignment", {"losses": [SpaceAlignment(weight=1.0)]}),
        ("OTPreservation", {"losses": [OTPreservation(weight=1.0)]}),  # texts are weighted by labels
        ("GradientProjection", {"callbacks": [GradientProjection()]}),
    ):
        with pytest.raises(ValueError, match=f"{name}.*MixUp"):
            trainer(tmp_path, data_collator=MixUp(), **options).train()
    for alpha in (0, -1, "x"):
        with pytest.raises((ValueError, TypeError), match="alpha"):
            CutMix(alpha)


@pytest.mark.slow
def test_a_resumed_training_mixes_as_if_it_had_not_stopped(tmp_path):
    arguments = {"train": tiny_images(27), "data_collator": CutMix(), "save_strategy": "steps", "save_steps": 3}
    arguments |= {"gradient_accumulation_steps": 2, "augmentation": "crop_flip", "dataloader_num_workers": 1}
    whole = trainer(tmp_path / "whole", **arguments)
    whole.train()
    resumed = trainer(tmp_path / "resumed", prompted_clip(seed=99), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), atol=0, rtol=0)
    unmixed = trainer(tmp_path / "unmixed", **{**arguments, "data_collator": None})
    unmixed.train()
    assert any(not torch.equal(value, weights(unmixed.model)[name]) for name, value in weights(whole.model).items())
