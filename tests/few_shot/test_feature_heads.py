"""Heads on cached features: published numbers in float64, and each formula computed again in another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peft_ncgeo.classifiers.heads import gaussian
from peft_ncgeo.classifiers.heads.clap import distance, multipliers
from peft_ncgeo.classifiers.heads.lp_plus_plus import step_sizes
from peft_ncgeo.classifiers.heads.tip_adapter import GRID, cache_logits
from peft_ncgeo.few_shot import CLAP, GaussianDiscriminant, LPPlusPlus, TipAdapter

from .made_up_support import (
    FEATURES,
    LABELS,
    NEW_TEXTS,
    QUERIES,
    SCALE,
    SUPPORT,
    TEXTS,
    drawn_support,
    rows,
    unit,
)
from .support import draw


def close(found, expected, atol=6e-7) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0
    )


def discriminants(state, x=QUERIES):
    """`x W + b` without the texts."""
    return x @ state["weight"].T + state["offset"] + state["log_prior"]


def test_the_made_up_numbers():
    close(rows(2, 4, 1), [[-5 / 6, -1 / 6, 5 / 6, 0], [-1 / 2, -2 / 3, -1 / 2, 0]], 1e-12)
    close(SUPPORT.text_logits(QUERIES), [[-7.561539, -4.789207, -3.030458], [-5.337877, -2.470831, 0.354385]])
    close(F.cross_entropy(SUPPORT.text_logits(FEATURES), LABELS), 1.377059)


# Tip-Adapter


def test_tip_adapters_published_numbers():
    head = TipAdapter(alpha=1.17, beta=5.5)
    state, _ = head.fit(SUPPORT)
    close(head.logits(state, QUERIES), [[-7.533509, -4.762486, -2.830057], [-5.334365, -2.468858, 0.476074]])
    keys = state["keys"].clone().requires_grad_()
    zero_shot = SUPPORT.text_logits(FEATURES)
    loss = F.cross_entropy(zero_shot + 1.17 * cache_logits(FEATURES @ keys.T, LABELS, zero_shot, 5.5), LABELS)
    loss.backward()
    close(loss.detach(), 1.029622)
    close(keys.grad.norm(), 1.130828)


def tip_logits(x, support, keys, labels, alpha, beta) -> np.ndarray:
    """By loops over queries, keys and classes."""
    x, keys, texts = np.asarray(unit(x)), np.asarray(keys), np.asarray(unit(support.texts))
    out = support.scale * x @ texts.T
    for i, query in enumerate(x):
        for key, label in zip(keys, labels.tolist(), strict=True):
            out[i, label] += alpha * math.exp(-beta * (1 - query @ key))
    return out


def test_keys_are_means_of_raw_views():
    support = drawn_support()
    head = TipAdapter(alpha=2.0, beta=3.0)
    state, _ = head.fit(support)
    keys = unit(support.features.mean(0))
    x = draw(5, 6, seed=9)
    np.testing.assert_allclose(head.logits(state, x), tip_logits(x, support, keys, support.labels, 2, 3), atol=1e-9)
    assert not torch.allclose(state["keys"], unit(unit(support.features).mean(0)))  # of another order


def test_alpha_and_beta_leave_the_image_out():
    """The first of the best, with beta outside and alpha inside, by fitting anew without each image."""
    support = drawn_support()
    keys, best = unit(support.features.mean(0)), None
    for beta in GRID:
        for alpha in GRID:
            right = 0
            for i, label in enumerate(support.labels):
                rest = torch.arange(len(keys)) != i
                x = support.features[0, i : i + 1]
                right += tip_logits(x, support, keys[rest], support.labels[rest], alpha, beta).argmax() == int(label)
            if best is None or right > best[0]:
                best = right, alpha, beta
    _, measured = TipAdapter().fit(support)
    assert (measured["alpha"], measured["beta"]) == best[1:]
    assert measured["leave_one_out_accuracy"] == pytest.approx(best[0] / 10)
    assert TipAdapter(alpha=best[1]).fit(support)[1]["alpha"] == best[1]


def test_trained_keys_are_those_of_a_loop_by_hand():
    """One view, so that nothing is drawn but the order in a batch, which a full batch does not see."""
    support = drawn_support(views=1)
    state, _ = TipAdapter(True, 2.0, 3.0, epochs=7, lr=0.01).fit(support)
    keys = unit(support.features[0]).clone().requires_grad_()
    x, moments = unit(support.features[0]), [torch.zeros_like(keys), torch.zeros_like(keys)]
    for step in range(7):
        lr = 0.01 * (1 + math.cos(math.pi * step / 7)) / 2
        onehot = F.one_hot(support.labels, 3).double()
        logits = SCALE * x @ unit(support.texts).T + 2 * torch.exp(-3 * (1 - x @ keys.T)) @ onehot
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, support.labels), keys)
        moments = [0.9 * moments[0] + 0.1 * gradient, 0.999 * moments[1] + 0.001 * gradient**2]
        unbiased = moments[0] / (1 - 0.9 ** (step + 1)), moments[1] / (1 - 0.999 ** (step + 1))
        keys = (keys * (1 - lr * 0.01) - lr * unbiased[0] / (unbiased[1].sqrt() + 1e-4)).detach().requires_grad_()
    torch.testing.assert_close(state["keys"], keys.detach(), atol=1e-10, rtol=0)
    assert (state["keys"].norm(dim=1) - 1).abs().max() > 1e-4  # not normalised again


def test_trained_keys_do_better_on_the_support_set():
    support = drawn_support()
    losses = []
    for train in (False, True):
        head = TipAdapter(train, 2.0, 3.0, epochs=50, lr=0.01)
        state, _ = head.fit(support)
        losses.append(float(F.cross_entropy(head.logits(state, support.features[1]), support.labels)))
    assert losses[1] < losses[0]
    again = TipAdapter(True, 2.0, 3.0).fit(support)[0]["keys"]
    assert torch.equal(again, TipAdapter(True, 2.0, 3.0).fit(support)[0]["keys"])
    assert not torch.equal(again, TipAdapter(True, 2.0, 3.0).fit(support._replace(seed=1))[0]["keys"])


# Gaussian discriminant analysis


def test_gdas_published_numbers():
    head = GaussianDiscriminant(alpha=0.3)
    state, _ = head.fit(SUPPORT)
    close(state["precision"].trace(), 26.292450)
    expected = [[-3.923961, -5.637110, -0.316038], [-6.644798, -4.626453, -1.058879]]
    close(discriminants(state), expected)
    logits = SUPPORT.text_logits(QUERIES) + 0.3 * torch.tensor(expected)
    torch.testing.assert_close(head.logits(state, 7 * QUERIES), logits, atol=1e-6, rtol=0)


def test_gdas_published_numbers_of_new_classes():
    head = GaussianDiscriminant(alpha=1.0, neighbors=3, published_precisions=True)
    state, _ = head.fit(SUPPORT)
    new = head.for_names(state, torch.tensor([-1, -1]), 5 * NEW_TEXTS)
    close(discriminants(new), [[-0.242023, -1.518822], [-0.774350, -1.487482]])
    covariance = sum(torch.cov(FEATURES[c == LABELS].T) for c in range(3)) / 3
    precision = torch.linalg.pinv(covariance)
    for c in range(3):
        mean = FEATURES[c == LABELS].mean(0)
        torch.testing.assert_close(state["weight"][c], precision @ mean, atol=1e-6, rtol=1e-6)


def gda(support, keep, counts=False):
    """Weights and biases in numpy, of some of the images with all their views."""
    x = np.asarray(unit(support.features)[:, keep]).reshape(-1, support.features.shape[-1])
    y = np.tile(np.asarray(support.labels)[keep], len(support.features))
    n, d = x.shape
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    covariance = sum(np.outer(v, v) for v in x - means[y]) / (n - 1)
    precision = d * np.linalg.inv((n - 1) * covariance + np.trace(covariance) * np.eye(d))
    prior = np.log(np.bincount(y) / n) if counts else -np.log(3)
    bias = prior - np.array([m @ precision @ m for m in means]) / 2
    return means @ precision, bias, precision


@pytest.mark.parametrize("prior", ["uniform", "counts"])
def test_alpha_leaves_the_image_out_with_all_its_views(prior):
    """The closed form against fitting anew, and the choice from it."""
    support = drawn_support()
    scores, images = [], np.arange(10)
    for i in images:
        weight, bias, _ = gda(support, images != i, prior == "counts")
        scores.append(np.asarray(unit(support.features[0, i])) @ weight.T + bias)
    scores = torch.tensor(np.array(scores))
    zero_shot = support.text_logits(support.features[0])
    right = [int(((zero_shot + a * scores).argmax(1) == support.labels).sum()) for a in 10.0 ** np.arange(-4, 3)]
    state, measured = GaussianDiscriminant(prior=prior).fit(support)
    assert measured["alpha"] == pytest.approx(10.0 ** (int(np.argmax(right)) - 4))
    assert measured["leave_one_out_accuracy"] == pytest.approx(max(right) / 10)
    assert len(set(right)) > 1
    fitted = gaussian.GaussianFit(unit(support.features), support.labels, 3)
    found = fitted.leave_one_out(torch.arange(10))
    found, wanted = (s - s.mean(1, keepdim=True) for s in (found, scores))
    if prior == "uniform":
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
    weight, bias, _ = gda(support, images >= 0, prior == "counts")
    x = draw(5, 6, seed=9)
    expected = np.asarray(unit(x)) @ weight.T + bias
    np.testing.assert_allclose(discriminants(state, unit(x)), expected, atol=1e-8)


def test_new_and_trained_names_share_one_precision():
    support = drawn_support()
    head = GaussianDiscriminant(alpha=0.7, neighbors=5)
    state, _ = head.fit(support)
    words = draw(3, 6, seed=11)
    found = head.for_names(state, torch.tensor([-1, 2, -1]), words)
    samples, _ = support.samples()
    weight, _, precision = gda(support, np.arange(10) >= 0)
    for place, word in ((0, unit(words[0])), (2, unit(words[2]))):
        near = samples[(samples @ word).argsort(descending=True)[:5]]
        mean = np.asarray(torch.cat([near, word.repeat(16, 1)]).mean(0))
        weight_new, offset = precision @ mean, -mean @ precision @ mean / 2
        np.testing.assert_allclose(found["weight"][place], weight_new, atol=1e-9)
        np.testing.assert_allclose(found["offset"][place], offset, atol=1e-9)
    np.testing.assert_allclose(found["weight"][1], weight[2], atol=1e-9)
    torch.testing.assert_close(found["log_prior"], torch.full((3,), -math.log(3), dtype=torch.float64))
    torch.testing.assert_close(found["text"][1], SCALE * unit(support.texts[2]))  # not the text given now
    torch.testing.assert_close(found["text"][0], SCALE * unit(words[0]))
    assert head.logits(found, words).shape == (3, 3)


# LP++ and CLAP


def test_lp_plus_plus_published_numbers():
    lr_w, lr_alpha = step_sizes(FEATURES, FEATURES @ TEXTS.T)
    close([lr_w, lr_alpha], [8.920424, 0.754464])
    for iterations, loss in ((0, 8.130612), (1, 6.814069), (5, 0.574009)):
        head = LPPlusPlus(iterations)
        close(F.cross_entropy(head.logits(head.fit(SUPPORT)[0], FEATURES), LABELS), loss)


@pytest.mark.parametrize(("published", "alpha"), [(True, [73.693797, 74.184486, 73.868152]), (False, [74.099494] * 3)])
def test_alphas_of_lp_plus_plus(published, alpha):
    """A loop by hand gives the published alphas, and with them the head's weights."""
    w = torch.stack([FEATURES[c == LABELS].sum(0) for c in range(3)])
    a = torch.full((3,), 250 * float((FEATURES * TEXTS[LABELS]).sum(1).mean()), dtype=torch.float64)
    close(a, [74.099494] * 3)
    parameters, total, velocity = [w, torch.zeros(3).double(), a], 0, [0, 0]
    for i in range(1, 21):
        parameters = [p.detach().requires_grad_() for p in parameters]
        logits = FEATURES @ parameters[0].T + parameters[2] * (FEATURES @ TEXTS.T) + parameters[1]
        gradients = torch.autograd.grad(F.cross_entropy(logits, LABELS), parameters)
        velocity = [0.9 * v + g for v, g in zip(velocity, gradients[:2], strict=True)]
        total = total + gradients[2]
        step = total if published else gradients[2]
        parameters = [
            *(p - 8.92042361 * v for p, v in zip(parameters, velocity, strict=False)),
            parameters[2] - 0.75446387 * step * (i % 10 == 0),
        ]
    close(parameters[2].detach(), alpha, 2e-5)
    state, _ = LPPlusPlus(20, published).fit(SUPPORT)
    expected = (parameters[0] + parameters[2][:, None] * TEXTS).detach()
    torch.testing.assert_close(state["weight"], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(state["bias"], parameters[1].detach(), atol=1e-4, rtol=0)


def test_claps_published_numbers():
    weight = TEXTS + 0.1 * rows(3, 4, 2)
    held = multipliers(SUPPORT)
    close(held, [0.236557, 0.762169, 0.960990])
    close(F.cross_entropy(SCALE * FEATURES @ unit(weight).T, LABELS), 0.967990)
    close(distance(weight, TEXTS, held), 0.010261)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 5.0])
def test_clap_is_a_loop_by_hand(penalty):
    """One view, all in one batch: SGD with momentum on weights that start at the raw texts."""
    support = drawn_support(views=1)
    state, measured = CLAP(penalty, epochs=30, lr=0.5).fit(support)
    x, texts = unit(support.features[0]), support.texts
    probabilities = (SCALE * x @ unit(texts).T).softmax(1)
    held = torch.stack([probabilities[support.labels == c, c].mean() for c in range(3)])
    w, velocity = texts.clone(), 0
    for epoch in range(30):
        w = w.detach().requires_grad_()
        loss = F.cross_entropy(SCALE * x @ unit(w).T, support.labels)
        loss = loss + penalty * sum(held[c] * (w[c] - texts[c]).square().sum() for c in range(3)) / 3
        velocity = 0.9 * velocity + torch.autograd.grad(loss, w)[0]
        w = w - (0.5 * (1 + math.cos(math.pi * (epoch - 1) / 30)) / 2 if epoch else 1e-5) * velocity
    torch.testing.assert_close(state["weight"], SCALE * unit(w.detach()), atol=1e-9, rtol=0)
    assert torch.equal(state["bias"], torch.zeros(3, dtype=torch.float64))
    moved = penalty * (held * (w.detach() - texts).square().sum(1)).mean()
    assert measured["penalty"] == pytest.approx(float(moved), abs=1e-9)


def test_an_epoch_of_clap_sees_as_many_views_as_images():
    """A view that is drawn moves the weights, and with another seed others are drawn."""
    support = drawn_support(views=5)
    found = [CLAP(epochs=3).fit(support._replace(seed=seed))[0]["weight"] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# All of them


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: TipAdapter(train_keys="yes"), "train_keys"),
        (lambda: TipAdapter(alpha=-1), "alpha"),
        (lambda: TipAdapter(beta=math.nan), "beta"),
        (lambda: TipAdapter(epochs=0), "epochs"),
        (lambda: GaussianDiscriminant(prior="balanced"), "prior"),
        (lambda: GaussianDiscriminant(neighbors=0), "neighbors"),
        (lambda: GaussianDiscriminant(published_precisions=True), "alpha"),
        (lambda: LPPlusPlus(iterations=-1), "iterations"),
        (lambda: CLAP(lr=0), "lr"),
        (lambda: CLAP(penalty=-1), "penalty"),
    ],
)
def test_settings_out_of_range(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()


@pytest.mark.parametrize("head", [TipAdapter(), GaussianDiscriminant()], ids=["tip", "gda"])
def test_one_image_a_class_leaves_nothing_to_leave_out(head):
    support = drawn_support(labels=(0, 1, 2))
    with pytest.raises(ValueError, match=r"pass \w+\(alpha=\.\.\."):
        head.fit(support)
    given = TipAdapter(alpha=1.0, beta=1.0) if isinstance(head, TipAdapter) else GaussianDiscriminant(alpha=1.0)
    state, measured = given.fit(support)
    assert "leave_one_out_accuracy" not in measured
    assert given.logits(state, support.features[0]).isfinite().all()


def test_in_a_tail_classes_of_one_image_are_not_asked():
    """Six of seven images are left out in turn; the one image of class 0 always stays."""
    support = drawn_support(labels=(0, 1, 1, 1, 2, 2, 1))
    for head in (TipAdapter(), GaussianDiscriminant(prior="counts")):
        sixths = 6 * head.fit(support)[1]["leave_one_out_accuracy"]
        assert sixths == pytest.approx(round(sixths))


def test_one_view_of_one_image_a_class_does_not_spread():
    with pytest.raises(ValueError, match="do not spread"):
        GaussianDiscriminant(alpha=1.0).fit(drawn_support(views=1, labels=(0, 1, 2)))
