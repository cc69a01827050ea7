"""Helpers that read what a plot draws and how its picture looks."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from peft_ncgeo.few_shot.evaluate import SHIFTS
from peft_ncgeo.protocols import EpisodeResults


def rows():
    rng = np.random.default_rng(0)
    return [
        {"setting": s, "method": m, "seed": seed, "x": 10 * shift + rng.normal(), "y": -10 * shift + rng.normal()}
        for shift, s in enumerate(("a", "b"))
        for m in ("p", "q")
        for seed in range(5)
    ]


def moments(count, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(count, 3, generator=generator) @ torch.randn(3, dim, generator=generator)
    means = low + 5 + 0.3 * torch.randn(count, dim, generator=generator)
    weights = low + torch.randn(count, dim, generator=generator)
    return (means, weights), (means * 2 - 1, 0.3 * weights + 4 * (means - means.mean(0)))


def made_episodes(domains, counts, seen=(), sweep=True):
    """Rows in no order, `counts[method]` episodes of every domain; episodes share the gap before adaptation."""
    rng = np.random.default_rng(0)
    made = []
    for domain in domains:
        before = rng.uniform(0.1, 0.3, max(counts.values()))
        for shift, (method, count) in enumerate(counts.items()):
            for i in range(count):
                gap = before[i] + shift * rng.uniform(0.1, 0.2)
                row = {"domain": domain, "method": method, "episode": i, "gap_before": before[i], "gap_after": gap}
                if sweep:
                    row["sweep_gaps"] = [gap * (1 + t) for t in SHIFTS]
                    row["sweep_losses"] = rng.uniform(3, 4, len(SHIFTS)).tolist()
                made.append(row)
    rng.shuffle(made)
    return EpisodeResults(made, list(domains), list(counts), list(seen))


def seen_whole(path):
    """The picture has colours, and nothing touches its edges."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    assert (picture[[0, -1]] == 255).all(), "something is cut off"
    assert (picture[:, [0, -1]] == 255).all(), "something is cut off"
