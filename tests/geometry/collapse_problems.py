"""Features of known collapse, and neural collapse by its formulas in numpy."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from peft_ncgeo.geometry import NeuralCollapse

STATISTICS = {"nc1", "nc1_trace", "nc2", "nc2_norm_spread", "nc2_cosine"}
ALL = STATISTICS | {"nc3", "nc3_cosine", "nc4"}
# counts of each class, d
CASES = {
    "few classes": ([5, 5, 5, 5], 7),
    "K = d + 1": ([6, 6, 6, 6, 6], 4),
    "many classes": ([4] * 9, 3),
    "imbalanced": ([40, 13, 3, 1, 1], 6),
    "absent": ([0, 9, 4, 0, 2, 7, 0], 5),
    "absent, many": ([3, 0, 8, 5, 2, 2, 0, 6, 4], 3),
    "two classes": ([6, 3], 4),
}


def problem(counts: list[int], dim: int, seed: int = 0, noise: float = 1.0):
    """Shuffled features and labels, a classifier that agrees with the means on some samples, and its bias."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(len(counts), dim)) + 0.3
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    features = means[labels] + noise * rng.normal(size=(len(labels), dim))
    weights = means + 0.7 * rng.normal(size=means.shape) + 1
    bias = 0.5 * rng.normal(size=len(counts))
    return [torch.from_numpy(a) for a in (features, labels, weights, bias)]


def frobenius_from_simplex(a: np.ndarray) -> float:
    k, total = len(a), math.sqrt(sum(v * v for v in a.flatten()))
    target = np.array([[(i == j) - 1 / k for j in range(k)] for i in range(k)]) / math.sqrt(k - 1)
    return math.sqrt(sum(v * v for v in (a / total - target).flatten()))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def covariances(x: np.ndarray, y: np.ndarray) -> tuple[list[int], dict, np.ndarray, np.ndarray, np.ndarray]:
    """Classes present, their means, mu_G, S_W and S_B, sample by sample."""
    classes = sorted(set(y.tolist()))
    mu = {c: sum(x[i] for i in range(len(y)) if y[i] == c) / (y == c).sum() for c in classes}
    mu_g = sum(mu.values()) / len(classes)
    within = sum(np.outer(x[i] - mu[c], x[i] - mu[c]) for i, c in enumerate(y.tolist())) / len(y)
    between = sum(np.outer(m - mu_g, m - mu_g) for m in mu.values()) / len(classes)
    return classes, mu, mu_g, within, between


def expected(x, y, weights=None, bias=None, center_weights=True) -> dict[str, float]:
    x, y = x.double().numpy(), y.numpy()
    classes, mu, mu_g, within, between = covariances(x, y)
    k = len(classes)
    m = {c: mu[c] - mu_g for c in classes}
    lengths = [math.sqrt(m[c] @ m[c]) for c in classes]
    mean_length = sum(lengths) / k
    pairs = [(c, e) for c in classes for e in classes if c != e]
    result = {
        "nc1": np.trace(np.linalg.pinv(between, rcond=1e-10) @ within) / k,
        "nc1_trace": np.trace(within) / np.trace(between),
        "nc2": frobenius_from_simplex(np.array([[m[c] @ m[e] for e in classes] for c in classes])),
        "nc2_norm_spread": math.sqrt(sum((v - mean_length) ** 2 for v in lengths) / k) / mean_length,
        "nc2_cosine": sum(abs(cosine(m[c], m[e]) + 1 / (k - 1)) for c, e in pairs) / len(pairs),
    }
    if weights is not None:
        weights = weights.double().numpy()
        bias = np.zeros(len(weights)) if bias is None else bias.double().numpy()
        average = sum(weights[c] for c in classes) / k if center_weights else 0
        w = {c: weights[c] - average for c in classes}
        result["nc3"] = frobenius_from_simplex(np.array([[w[c] @ m[e] for e in classes] for c in classes]))
        result["nc3_cosine"] = sum(cosine(w[c], m[c]) for c in classes) / k
        named = [max(range(len(weights)), key=lambda c: weights[c] @ row + bias[c]) for row in x]
        nearest = [min(classes, key=lambda c: ((row - mu[c]) ** 2).sum()) for row in x]
        result["nc4"] = sum(a == b for a, b in zip(named, nearest, strict=True)) / len(x)
    return result


def streamed(features, labels, num_classes: int, batch: int = 7, **arguments) -> NeuralCollapse:
    collapse = NeuralCollapse(num_classes, features.shape[1], **arguments)
    for x, y in zip(features.split(batch), labels.split(batch), strict=True):
        assert collapse.update(x, y) is collapse
    return collapse


def distributed_problem():
    """Far from the origin and, in the second half, from the first's mean."""
    x, y, weights, bias = problem([20, 11, 0, 3, 6], 8)
    x = torch.where(torch.arange(len(x))[:, None] < 25, x, x + 2) + 1e4
    return x, y, weights, bias - weights.sum(1) * 1e4


def reduce_two(folder: str) -> None:
    """Save the statistics that each of two processes gets from the samples of both, and its refusals afterwards."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    x, y, weights, bias = distributed_problem()
    results = {}
    for cut in (25, 0):  # at 0 the first process has no sample
        own = slice(0, cut) if rank == 0 else slice(cut, None)
        collapse = NeuralCollapse(5, 8).update(x[own], y[own])
        assert collapse.all_reduce() is collapse
        results[cut] = (collapse.counts, collapse.class_means, collapse.compute(weights, bias))
    refusals = []
    for call in (lambda: collapse.update(x, y), collapse.all_reduce):
        try:
            call()
        except RuntimeError as error:
            refusals.append(str(error).split(":")[0])
    own = slice(0, 25) if rank == 0 else slice(25, None)
    alone = NeuralCollapse(5, 8).update(x[own], y[own]).compute(weights, bias)  # not asked to reduce
    torch.save((results, refusals, alone), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
