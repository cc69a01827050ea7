"""CPU time of CoPA's heads on cached features: many episodes at once, one by one, and with the N x N loss.

    python examples/benchmark_copa.py
    python examples/benchmark_copa.py --ways 5 --shots 1

All three ways train the same heads on the same episodes and take turns in one run; the table shows medians of CPU
time over the repetitions. Features are random, because the time does not depend on their values. "Largest difference"
compares the cosines between support images and prototypes with those of the first row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from peft_ncgeo.data import EpisodeSampler, load_few_shot_domains
from peft_ncgeo.geometry.heads import class_prototypes
from peft_ncgeo.training import fit_episodes


def square_contrast(instances: Tensor, prototypes: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the loss as the paper writes it: cross-entropies of the N x N matrix, episode by episode."""
    losses = []
    for x, p, y in zip(instances, prototypes, labels, strict=True):
        kept = y >= 0
        e, q = (torch.nn.functional.normalize(rows, dim=-1) for rows in (x[kept], p[y[kept]]))
        logits = e @ q.T / temperature
        target = torch.arange(len(logits))
        cross_entropy = torch.nn.functional.cross_entropy
        losses.append((cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2)
    return torch.stack(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--ways", type=int, help="number of classes in each episode; default: it varies")
    parser.add_argument("--shots", type=int, help="support images of each class in an episode; default: it varies")
    parser.add_argument(
        "--width", type=int, default=128, help="width of the features; a ResNet-18 has 512, a ViT-B 768"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    images = load_few_shot_domains()["mnist"].images
    sampler = EpisodeSampler(images, args.ways, args.shots)
    supports = [(sampler[i].support, sampler[i].support_labels) for i in range(args.episodes)]
    features = torch.randn(len(images), args.width, generator=torch.Generator().manual_seed(0))
    features += 2 * features.mean(-1, keepdim=True)  # not centred, like the features of every backbone
    ways: dict[str, dict[str, Any]] = {
        "batches of 8 episodes": {"batch_size": 8},
        "one by one": {"batch_size": 1},
        "one by one, N x N loss": {"batch_size": 1, "objective": square_contrast},
    }
    inputs = []
    for rows, labels in supports:
        support = features[torch.as_tensor(rows)]
        inputs.append((support, class_prototypes(support, torch.as_tensor(labels), int(labels.max()) + 1)))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    heads = {}
    for _ in range(args.repeats):
        for name, options in ways.items():
            started = time.process_time()
            heads[name] = fit_episodes(features, supports, steps=args.steps, progress=False, **options)
            seconds[name].append((time.process_time() - started) / len(supports))
    sizes = [len(rows) for rows, _ in supports]
    mean, threads = statistics.mean(sizes), torch.get_num_threads()
    print(
        f"{args.episodes} episodes of {min(sizes)} to {max(sizes)} support images (mean {mean:.0f}), "
        f"width {args.width}, {args.steps} steps, {threads} thread(s), torch {torch.__version__}\n"
    )
    print("| | ms an episode | ratio | largest difference |\n|---|---|---|---|")
    first = next(iter(ways))
    for name in ways:
        median = statistics.median(seconds[name])
        difference = max(
            float((a.scores(x, p) - b.scores(x, p)).abs().max())
            for a, b, (x, p) in zip(heads[first], heads[name], inputs, strict=True)
        )
        print(
            f"| {name} | {1000 * median:.1f} | {median / statistics.median(seconds[first]):.2f} | {difference:.1e} |"
        )


if __name__ == "__main__":
    main()
