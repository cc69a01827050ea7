"""Every loss once more, in plain float64, from the numbers that a batch holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import expit, logsumexp

from peft_ncgeo import losses

from .tensors import unit_rows


def cross_entropy(z, y, weights=None):
    weights = np.ones(z.shape[1]) if weights is None else weights
    values = logsumexp(z, axis=1) - z[np.arange(len(y)), y]
    return (weights[y] * values).sum() / weights[y].sum()


def logit_adjustment(b, tau):
    return cross_entropy(b["logits"] + tau * np.log(b["class_counts"] / b["class_counts"].sum()), b["labels"])


def ldam(b, max_margin, scale, beta=None):
    n, z, y = b["class_counts"], b["logits"].copy(), b["labels"]
    margins = n**-0.25 / (n**-0.25).max() * max_margin
    z[np.arange(len(y)), y] -= (scale * margins)[y]
    return cross_entropy(z, y, None if beta is None else -(1 - beta) / np.expm1(n * np.log1p(-(1 - beta))))


def multi_label(b, gamma_pos, weight, gamma_neg, clip):
    """ASL as it is written: of no exponents and no margin it is the binary cross-entropy."""
    z, y = b["logits"], b["multi_hot"]
    absent, present = expit(-z), expit(z)
    shifted = np.maximum(present - clip, 0)
    log_absent = np.log1p(-shifted) if clip else -np.logaddexp(0, z)
    ones = weight * absent**gamma_pos * -np.logaddexp(0, -z)
    return -(y * ones + (1 - y) * shifted**gamma_neg * log_absent).mean()


def assignment(u, v):
    """The exact plan's value: between as many points with as many it is the best permutation's."""
    cost = ((u[:, None] - v[None]) ** 2).sum(-1) / 2
    rows, columns = linear_sum_assignment(cost)
    return cost[rows, columns].mean()


def sinkhorn_plan(cost, epsilon, iterations=300):
    """The entropic plan between uniform marginals, in the log domain."""
    n, m = cost.shape
    if cost.mean() == 0 or 1 in cost.shape:
        return np.full((n, m), 1 / (n * m))
    k = -cost / (epsilon * cost.mean())
    f, g = np.zeros((n, 1)), np.zeros((1, m))
    for _ in range(iterations):
        f = -np.log(n) - logsumexp(k + g, axis=1, keepdims=True)
        g = -np.log(m) - logsumexp(k + f, axis=0, keepdims=True)
    return np.exp(f + g + k)


def transport(b, modality, epsilon=None):
    problems = {"joint": [("image", "text")], "separate": [("image",), ("text",)]}.get(modality, [(modality,)])
    sides = {}
    for half in {half for problem in problems for half in problem}:
        sides[half] = [unit_rows(b[f"{who}{half}_features"]) for who in ("", "frozen_")]
        if half == "text":
            sides[half] = [x[b["labels"]] for x in sides[half]]
    value = 0.0
    for halves in problems:
        u, v = (np.concatenate([sides[half][i] for half in halves], 1) for i in (0, 1))
        if epsilon is None:
            value += assignment(u, v)
        else:
            cost = ((u[:, None] - v[None]) ** 2).sum(-1) / 2
            value += (sinkhorn_plan(cost, epsilon) * cost).sum()
    return value


def pointwise(b, text_weight, image_weight, prediction_weight, mean):
    f, f0, g, g0 = (
        unit_rows(b[k]) for k in ("image_features", "frozen_image_features", "text_features", "frozen_text_features")
    )
    scale = np.exp(b["logit_scale"])
    p, q = scale * f @ g.T, scale * f0 @ g0.T
    p, q = p - logsumexp(p, axis=1, keepdims=True), q - logsumexp(q, axis=1, keepdims=True)
    kl = (np.exp(q) * (q - p)).sum() / (p.size if mean else len(p))
    return text_weight * np.abs(g - g0).mean() + image_weight * np.abs(f - f0).mean() + prediction_weight * kl


def distillation(z, t, factor):
    p, q = z - logsumexp(z, axis=1, keepdims=True), t - logsumexp(t, axis=1, keepdims=True)
    return factor * (np.exp(q) * (q - p)).sum() / z.size


def rotation(b):
    return np.abs(unit_rows(b["text_features"]) - unit_rows(b["frozen_text_features"])).sum(1).mean()


def etf_deviation(points):
    k, g = len(points), unit_rows(points)
    off = ~np.eye(k, dtype=bool)
    return (((g @ g.T)[off] + 1 / (k - 1)) ** 2).mean()


def clustered(b, clusters, reduction):
    g, number = b["text_features"], clusters.max() + 1
    sizes = np.bincount(clusters)
    parts = [etf_deviation(g[clusters == m]) for m in range(number) if sizes[m] > 1]
    if reduction == "mean":
        return np.mean(parts) if parts else 0.0
    return sum(p * k * (k - 1) for p, k in zip(parts, sizes[sizes > 1], strict=True)) / number


def _centred_gram(points):
    scale = np.abs(points).max()
    points = points / (scale or 1)
    centred = points - points.mean(0)
    # what is left of equal points is rounding
    centred[np.linalg.norm(centred, axis=1) <= 1e-6 * np.linalg.norm(points, axis=1).max()] = 0
    g = unit_rows(centred)
    return g @ g.T


def debiasing(b, anchor):
    x, y = b["image_features"], b["labels"]
    classes = np.unique(y)
    n = len(classes)
    if n < 3:
        return 0.0
    grams = [_centred_gram(b["text_features"][classes]), _centred_gram(np.stack([x[y == c].mean(0) for c in classes]))]
    grams = [g / (np.linalg.norm(g) or 1) for g in grams]
    etf = (np.eye(n) - 1 / n) / np.sqrt(n - 1)
    value = np.linalg.norm(grams[0] - grams[1])
    return value + sum(np.linalg.norm(g - etf) for g in grams) if anchor else value


def isomorphism(b):
    y = b["labels"]
    squares = ((unit_rows(b["image_features"]) - unit_rows(b["text_features"])[y]) ** 2).sum(1)
    return np.mean([squares[y == c].mean() for c in np.unique(y)])


def isomorphism_sinkhorn(b, epsilon):
    y, f, t = b["labels"], unit_rows(b["image_features"]), unit_rows(b["template_features"])
    values = []
    for c in np.unique(y):
        cost = 2 - 2 * t[c] @ f[y == c].T
        values.append((sinkhorn_plan(cost, epsilon) * cost).sum())
    return np.mean(values)


def space_alignment(b, center):
    m, w = b["class_means"], unit_rows(b["classifier_weight"])
    seen = ~np.isnan(m).all(1)
    m = np.where(seen[:, None], m, 0)
    mu = m - m.sum(0) / max(1, seen.sum()) if center else m
    if center:
        longest = np.linalg.norm(m, axis=1).max()
        mu[np.linalg.norm(mu, axis=1) <= 2e-6 * longest] = 0
    kept = seen & (mu != 0).any(1) & (w != 0).any(1)
    return (1 - (unit_rows(mu) * w).sum(1))[kept].mean() if kept.any() else 0.0


def supcon(b, copies, temperature):
    h, w, y = unit_rows(b["image_features"]), unit_rows(b["classifier_weight"]), b["labels"]
    s, c = h @ h.T / temperature, h @ w.T / temperature
    values = []
    for i in range(len(y)):
        others = [j for j in range(len(y)) if j != i]
        near = [j for j in others if y[j] == y[i]]
        weight = len(near) + copies
        if not weight:
            continue
        terms, counts = [*s[i, others], *c[i]], [1.0] * len(others) + [copies] * len(w)
        with np.errstate(divide="ignore"):
            total = logsumexp(terms, b=counts)
        values.append(total - (s[i, near].sum() + copies * c[i, y[i]]) / weight)
    return np.mean(values) if values else 0.0


def prototype_image(b, temperature):
    """CLIP's own form: the N x N logits and their transpose."""
    y, p = b["labels"], b["class_means"]
    kept = (y >= 0) & ~np.isnan(p).all(1)[y]
    if not kept.any():
        return 0.0
    s = unit_rows(b["image_features"][kept]) @ unit_rows(p[y[kept]]).T / temperature
    return (cross_entropy(s, np.arange(len(s))) + cross_entropy(s.T, np.arange(len(s)))) / 2


# loss -> its value, of the fields of a batch, the loss and its arguments
ORACLES: dict[Any, Callable[..., float]] = {
    losses.CrossEntropy: lambda b, _: cross_entropy(b["logits"], b["labels"]),
    losses.BalancedSoftmax: lambda b, _: logit_adjustment(b, 1.0),
    losses.LogitAdjustment: lambda b, _, tau: logit_adjustment(b, tau),
    losses.LDAM: lambda b, _, max_margin=0.5, scale=1.0, reweight_after=2.0: ldam(
        b, max_margin, scale, 0.9999 if b.get("progress", 0) >= reweight_after else None
    ),
    losses.MultiLabelLoss: lambda b, _, asymmetric=False, gamma_pos=0.0, pos_weight=1.0: multi_label(
        b, gamma_pos, pos_weight, *((4.0, 0.05) if asymmetric else (0.0, 0.0))
    ),
    losses.OTPreservation: lambda b, _, modality="joint", epsilon=None, **others: transport(b, modality, epsilon),
    losses.PointwisePreservation: lambda b, _, kl_reduction="batchmean", **others: pointwise(
        b, 25.0, 10.0, 1.0, mean=kl_reduction == "mean"
    ),
    losses.Distillation: lambda b, _, temperature=1.0, **others: distillation(
        b["logits"] / temperature, b["teacher_logits"] / temperature, temperature**2
    ),
    losses.RotationStabilization: lambda b, _, **others: rotation(b),
    losses.LanguageCollapse: lambda b, _, **others: etf_deviation(b["text_features"]),
    losses.ClusterCollapse: lambda b, loss, reduction, **others: clustered(b, loss.clusters.numpy(), reduction),
    losses.GeometricDebiasing: lambda b, _, anchor, **others: debiasing(b, anchor),
    losses.ModalityIsomorphism: lambda b, _, method="mean", epsilon=None, **others: (
        isomorphism(b) if method == "mean" else isomorphism_sinkhorn(b, epsilon)
    ),
    losses.SpaceAlignment: lambda b, _, center, **others: space_alignment(b, center),
    losses.PrototypeSupCon: lambda b, _, copies, temperature: supcon(b, copies, temperature),
    losses.PrototypeImageContrast: lambda b, loss: prototype_image(b, loss.temperature),
}
