"""CoPA's and URL's heads on cached features, one episode or many at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features

from peft_ncgeo.data import EpisodeSampler
from peft_ncgeo.few_shot.episodes import fit_episodes, fit_heads
from peft_ncgeo.geometry.contrast import prototype_cross_entropy

from ..losses.batches import unit_rows
from .support import URL, cross_entropy, draw, full_contrast, loop, means, support


def adam(parameters, lr=1e-3):
    return torch.optim.Adam(parameters, lr=lr, weight_decay=0.1)


def nearest(features, prototypes) -> np.ndarray:
    """Classes by cosine in numpy."""
    features, prototypes = (np.asarray(value, dtype=np.float64) for value in (features, prototypes))
    return (unit_rows(features) @ unit_rows(prototypes).T).argmax(1)


@pytest.mark.parametrize("shared", [False, True])
def test_before_any_step_it_is_the_nearest_prototype(shared):
    features, labels = support(seed=3)
    heads = fit_heads(features, labels, steps=0, shared=shared)
    for head in heads:
        assert torch.equal(head, torch.eye(8, dtype=torch.float64))
    others = draw(200, 8, seed=9)
    scores = heads.scores(others, means(features, labels))
    expected = nearest(others, means(features, labels))
    assert len(set(expected)) == 3
    np.testing.assert_array_equal(scores.argmax(1), expected)
    assert not any(head.requires_grad for head in heads)


@pytest.mark.parametrize(("steps", "lr"), [(1, 1e-3), (50, 1e-3), (20, 0.05)])
def test_copa_is_a_loop_with_the_full_matrix(steps, lr):
    features, labels = support()
    expected = loop(features, labels, full_contrast, lambda p: adam(p, lr), steps)
    heads = fit_heads(features, labels, steps=steps, lr=lr)
    torch.testing.assert_close(tuple(heads), expected, atol=1e-8, rtol=0)
    assert (heads.image - heads.prototype).abs().max() > lr / 2
    if steps == 50:  # the defaults are the paper's
        assert torch.equal(fit_heads(features, labels).image, heads.image)


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_url_is_a_loop_of_one_head(temperature):
    features, labels = support()
    expected = loop(
        features,
        labels,
        cross_entropy,
        lambda p: torch.optim.Adadelta(p, lr=0.1, weight_decay=0),
        40,
        shared=True,
        temperature=temperature,
    )
    heads = fit_heads(features, labels, **URL, shared=True, temperature=temperature, objective=prototype_cross_entropy)
    torch.testing.assert_close(tuple(heads), expected, atol=1e-8, rtol=0)
    assert torch.equal(heads.image, heads.prototype)
    assert (heads.image - torch.eye(8)).abs().max() > 0.01


def test_a_shared_head_may_be_trained_with_the_contrast():
    features, labels = support()
    expected = loop(features, labels, full_contrast, adam, 20, shared=True)
    torch.testing.assert_close(tuple(fit_heads(features, labels, 20, shared=True)), expected, atol=1e-8, rtol=0)


def test_training_on_features_changes_nothing_but_the_heads():
    features, labels = support()
    features.requires_grad_()
    before, state = features.detach().clone(), torch.get_rng_state()
    with torch.no_grad():  # as a caller may have it
        heads = fit_heads(features, labels, 5)
    assert torch.equal(heads.image, fit_heads(features, labels, 5).image)
    assert torch.equal(features, before)
    assert features.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def episodes(count: int = 7):
    """Sets of 2 to 5 ways with 1 to 6 shots a class, of unlike sizes and in no order, over 90 features."""
    rng = np.random.default_rng(5)
    found = []
    for i in range(count):
        shots = rng.integers(1, 7, size=2 + i * 3 % 4)
        labels = rng.permutation(np.repeat(np.arange(len(shots)), shots)).astype(np.int64)
        found.append((rng.choice(90, len(labels), replace=False), labels))
    assert len({len(rows) for rows, _ in found}) > 3
    return found


SETTINGS = {
    "copa": {},
    "url": {**URL, "shared": True, "temperature": 0.1, "objective": prototype_cross_entropy},
}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"])
@pytest.mark.parametrize("method", SETTINGS)
def test_many_episodes_at_once_equal_one_by_one(method, dtype, atol, batch_size):
    features, supports = draw(90, 8, dtype=dtype) + 0.3, episodes()
    settings = {**SETTINGS[method], "steps": 20}
    found = fit_episodes(features, supports, batch_size, progress=False, **settings)
    assert len(found) == len(supports)
    alone = [fit_heads(features[rows], torch.as_tensor(labels), **settings) for rows, labels in supports]
    for got, expected in zip(found, alone, strict=True):
        assert got.image.shape == (8, 8)
        assert got.image.dtype == dtype
        torch.testing.assert_close(tuple(got), tuple(expected), atol=atol, rtol=0)
    apart = [(a.image - b.image).abs().max() for i, a in enumerate(alone) for b in alone[:i]]
    assert min(apart) > 1e-3  # so that their order matters


def test_episodes_of_a_sampler_and_rows_that_no_episode_uses():
    names = ["a", "b", "c", "d"]
    rows = {"label": [i % 4 for i in range(40)]}
    sampler = EpisodeSampler(
        Dataset.from_dict(rows, features=Features({"label": ClassLabel(names=names)})), min_ways=2
    )
    drawn = [sampler[i] for i in range(3)]
    supports = [(episode.support, episode.support_labels) for episode in drawn]
    features = draw(40, 8)
    features[0] = math.nan  # padding repeats row 0; an episode that uses it would be refused
    supports = [(rows[rows != 0], labels[rows != 0]) for rows, labels in supports]
    found = fit_episodes(features, supports, progress=False, steps=5)
    for heads, (rows, labels) in zip(found, supports, strict=True):
        expected = loop(features[rows], torch.as_tensor(labels), full_contrast, adam, 5)
        torch.testing.assert_close(tuple(heads), expected, atol=1e-8, rtol=0)
    assert fit_episodes(features, []) == []


@pytest.mark.parametrize(
    ("features", "labels", "steps", "expected"),
    [
        (draw(4), torch.tensor([0, 1, 0, 1]), 1, r"features must be \(N, d\) or \(E, N, d\).*got \(4,\)"),
        (draw(4, 3), torch.tensor([0, 1, 0]), 1, r"got \(4, 3\) and labels \(3,\)"),
        (draw(2, 4, 3), torch.tensor([0, 1, 0, 1]), 1, r"got \(2, 4, 3\) and labels \(4,\)"),
        (draw(4, 3), torch.tensor([0, 1, 0, 1]), -1, "steps=-1 must be a whole number of at least 0"),
        (draw(4, 3).log(), torch.tensor([0, 1, 0, 1]), 1, "support image 0 are not finite"),
    ],
)
def test_features_that_do_not_fit(features, labels, steps, expected):
    with pytest.raises(ValueError, match=expected):
        fit_heads(features, labels, steps)
