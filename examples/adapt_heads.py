"""Heads on cached features: zero-shot, CoPA, Tip-Adapter, Tip-Adapter-F, GDA, LP++, ZS-LP and CLAP on one support set.

    python examples/adapt_heads.py
        the demo's mini-CLIP and its 30 base concepts, 16 images each: accuracy on other views of these concepts and,
        for the heads that take new names, on 30 new concepts. It takes a minute on one core.

    python examples/adapt_heads.py --shots 4 --seeds 1 2 3

    python examples/adapt_heads.py --benchmark
        seconds of each head for 100 classes of 16 images on random features of width 512.

One setting is used for all data; alpha and beta are chosen by leaving one support image out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import transformers

from peft_ncgeo import ZeroShotClassifier, adapt
from peft_ncgeo.classifiers.heads import FeatureHead, Support
from peft_ncgeo.data import load_demo
from peft_ncgeo.few_shot import CLAP, CoPA, GaussianDiscriminant, LPPlusPlus, TipAdapter
from peft_ncgeo.metrics.accuracy import accuracy

COLUMNS = ("base", "new", "seconds")
HEADS: dict[str, FeatureHead] = {
    "Tip-Adapter": TipAdapter(),
    "Tip-Adapter-F": TipAdapter(train_keys=True),
    "GDA": GaussianDiscriminant(),
    "LP++": LPPlusPlus(),
    "ZS-LP": CLAP(penalty=0.0),
    "CLAP": CLAP(),
}


def compare(shots: int, seed: int, num_views: int | None) -> dict[str, dict[str, float]]:
    """Return the accuracies on base and new concepts, in percent, and the seconds of each method."""
    splits, processor, model = load_demo(shots=shots, seed=seed)
    images = {half: splits[half]["image"][:] for half in ("train", "base", "new")}
    labels = {half: splits[half]["label"][:] for half in images}
    names = {half: splits[half].features["label"].names for half in images}
    zero_shot = ZeroShotClassifier(model, processor)
    rows: dict[str, dict[str, float]] = {"zero-shot": {}}
    for half in ("base", "new"):
        rows["zero-shot"][half] = _percent(zero_shot.predict_proba(images[half], names[half]), labels[half])
    for method, head in {"CoPA": CoPA(), **HEADS}.items():
        options: dict[str, Any] = {} if isinstance(head, CoPA) else {"num_views": num_views}
        options |= {"head": head, "processor": processor, "class_names": names["train"]}
        started = time.perf_counter()
        classifier = adapt(model, images["train"], labels["train"], **options)
        row = {"seconds": time.perf_counter() - started}
        row["base"] = _percent(classifier.predict_proba(images["base"]), labels["base"])
        if getattr(head, "takes_new_names", False):
            row["new"] = _percent(classifier.predict_proba(images["new"], class_names=names["new"]), labels["new"])
        rows[method] = row
    return rows


def _percent(probabilities: torch.Tensor, labels: list[int]) -> float:
    return 100 * accuracy(probabilities.argmax(-1).tolist(), labels)


def benchmark(classes: int = 100, shots: int = 16, width: int = 512) -> dict[str, float]:
    """Return the seconds of fitting each head on made-up features around a centre a class."""
    draws = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws) / width**0.5

    centres, labels = noise(classes, width), torch.arange(classes * shots) % classes
    seconds = {}
    for method, head in HEADS.items():
        views = centres[labels] + noise(len(labels), width) + noise(head.num_views, len(labels), width)
        started = time.perf_counter()
        head.fit(Support(views, labels, centres + noise(classes, width), 100.0))
        seconds[method] = time.perf_counter() - started
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=16, help="support images of each class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds that draw the support images")
    parser.add_argument("--num_views", type=int, help="views of each image; default: each head's own")
    parser.add_argument("--benchmark", action="store_true", help="measure seconds on random features instead")
    parser.add_argument("--classes", type=int, default=100, help="number of classes of --benchmark")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.benchmark:
        print("| method | seconds |\n| --- | --- |")
        for method, seconds in benchmark(args.classes).items():
            print(f"| {method} | {seconds:.1f} |")
        print(
            f"\n{args.classes} classes of 16 images, width 512; torch {torch.__version__}, "
            f"{torch.get_num_threads()} thread(s)."
        )
        return
    runs = [compare(args.shots, seed, args.num_views) for seed in args.seeds]
    print("| method | base | new | seconds |\n| --- | --- | --- | --- |")
    for method in runs[0]:
        row = [[run[method][column] for run in runs if column in run[method]] for column in COLUMNS]
        print(f"| {method} | {' | '.join(f'{statistics.fmean(cell):.1f}' if cell else '' for cell in row)} |")
    seeds = ", ".join(map(str, args.seeds))
    print(f"\n{args.shots} images of each of 30 classes; seeds {seeds}. Seconds include embedding.")


if __name__ == "__main__":
    main()
