"""PromptSRC (arXiv 2307.06948): consistency terms and the Gaussian average, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_ncgeo.losses import PointwisePreservation
from peft_ncgeo.training import PromptAveraging

from ..losses.batches import random_batch, unit_rows
from ..training.runs import trainer, weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_three_terms_by_hand(reduction):
    batch = random_batch()
    f, f0, g, g0 = (
        unit_rows(getattr(batch, name).detach().numpy())
        for name in ("image_features", "frozen_image_features", "text_features", "frozen_text_features")
    )

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(1, keepdims=True)

    scale = np.exp(2.0)
    p, p0 = softmax(scale * f @ g.T), softmax(scale * f0 @ g0.T)
    kl = (p0 * np.log(p0 / p)).sum() / (p.size if reduction == "mean" else len(p))
    expected = 25 * np.abs(g - g0).mean() + 10 * np.abs(f - f0).mean() + kl
    value = PointwisePreservation(weight=1.0, kl_reduction=reduction)(batch)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    parts = [PointwisePreservation(1.0, None, *w, kl_reduction=reduction)(batch).item() for w in np.eye(3).tolist()]
    assert np.dot([25, 10, 1], parts) == pytest.approx(expected, rel=1e-12)


def test_zero_at_zero_drift():
    batch = random_batch()
    batch.image_features, batch.text_features = batch.frozen_image_features, batch.frozen_text_features
    assert PointwisePreservation(weight=1.0)(batch).item() == pytest.approx(0, abs=1e-15)


def test_published_gaussian_weight():
    """0.399 on epoch 15 of 20."""
    logs = np.array([PromptAveraging(15, 1).log_weight(epoch) for epoch in range(1, 21)])
    share = np.exp(logs) / np.exp(logs).sum()
    assert share[14] == pytest.approx(0.399, abs=5e-4)


def test_average_of_the_epochs_and_nothing_else(tmp_path):
    seen = []

    class Note(PromptAveraging):
        def on_epoch_end(self, args, state, control, **kwargs):
            seen.append(weights(kwargs["model"]))

    run = trainer(tmp_path, callbacks=[Note(mean=2, std=0.7)], num_train_epochs=4)
    frozen = {n: p.detach().clone() for n, p in run.model.named_parameters() if not p.requires_grad}
    run.train()
    share = np.exp([-0.5 * ((e - 2) / 0.7) ** 2 for e in range(1, 5)])
    share /= share.sum()
    for name, value in weights(run.model).items():
        expected = sum(s * epoch[name].double() for s, epoch in zip(share, seen, strict=True))
        torch.testing.assert_close(value, expected.float(), atol=1e-7, rtol=1e-6)
        assert not torch.equal(value, seen[-1][name])
    for name, parameter in run.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name])


def test_weights_far_below_the_smallest_float(tmp_path):
    """All epochs lie 100 standard deviations before the mean; the nearest one gets everything."""
    run = trainer(tmp_path / "a", callbacks=[PromptAveraging(mean=100, std=0.5)], num_train_epochs=2)
    run.train()
    plain = trainer(tmp_path / "b", num_train_epochs=2)
    plain.train()
    torch.testing.assert_close(weights(run.model), weights(plain.model))


@pytest.mark.parametrize("step", [4, 6])
def test_resumed_equals_uninterrupted(tmp_path, step):
    """At the end of an epoch, and in the middle of one; four steps an epoch."""

    def run(folder, **arguments):
        return trainer(
            folder, callbacks=[PromptAveraging(mean=2, std=1)], num_train_epochs=3, save_steps=step, **arguments
        )

    whole = run(tmp_path, save_strategy="steps")
    whole.train()
    resumed = run(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for name, value in weights(whole.model).items():
        assert torch.equal(weights(resumed.model)[name], value), name


def test_resuming_with_other_callbacks_is_refused(tmp_path):
    run = trainer(tmp_path, callbacks=[PromptAveraging()], save_strategy="steps", save_steps=4)
    run.train()
    with pytest.raises(ValueError, match="prompt_averaging"):
        trainer(tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_width_must_be_positive():
    with pytest.raises(ValueError, match="std=0"):
        PromptAveraging(std=0)
