"""Fixed prototypes on the demo's step-imbalanced photographs: does a better geometry give a better classifier?

python examples/benchmark_prototypes.py
    five classes of Fashion-MNIST with 200 images, five with 200/R, R = 10 and 100; 0 to 1,000 copies of each
    prototype, ETF and minority_margin, three seeds; the demo's ViT (vision prompts) and ResNet (LoRA). It takes about
    an hour of one core. A run that was stopped continues, and two runs with different `--backbones` share the work.

python examples/benchmark_prototypes.py --tune
    validation accuracy over learning rates and temperatures; those of this file were chosen in this way.

python examples/benchmark_prototypes.py --cost
    time and memory of the loss for different numbers of copies; our loss and plain concatenation take turns.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from peft_ncgeo.data import class_counts, load_image_demo, step_imbalanced
from peft_ncgeo.evaluation import evaluate_groups
from peft_ncgeo.geometry import NeuralCollapse, gram_distance, simplex_etf
from peft_ncgeo.losses import GeometryBatch, PrototypeSupCon
from peft_ncgeo.metrics.accuracy import accuracy
from peft_ncgeo.models.heads import linear_classifier
from peft_ncgeo.protocols import Results, Task, run_cells
from peft_ncgeo.protocols.runs import describe
from peft_ncgeo.training import Recipe

COPIES, RATIOS, GEOMETRIES = (0, 10, 50, 100, 1000), (10, 100), ("etf", "minority_margin")
PER_CLASS, THRESHOLDS = 200, (50, 100)  # more than 100 images: a majority class; up to 50: a minority class
ARGS = {"num_train_epochs": 6, "batch_size": 64, "optim": "adamw_torch", "lr_scheduler_type": "cosine"}
# chosen by --tune (for the ViT with twice as many prompts)
CHOSEN = {"vit": {"learning_rate": 0.003, "temperature": 0.1}, "resnet": {"learning_rate": 0.01, "temperature": 0.5}}
PROMPTS = {"vit": {"num_vision_tokens": 4, "vision_depth": 4}, "resnet": {}}
TITLES = {
    "train_gram_distance": "Delta_G*, training images",
    "all_gram_distance": "Delta_G*, test images",
    "many": "majority",
    "few": "minority",
    "mean_many": "majority, nearest mean",
    "mean_few": "minority, nearest mean",
}
COLUMNS = ["train_gram_distance", "all_gram_distance", "all", "many", "few", "mean_all", "mean_many", "mean_few"]


def make_model(backbone: str) -> nn.Module:
    """Return the demo's backbone; ResNet has no tokens for prompts, so LoRA adapts its convolutions instead."""
    model = load_image_demo(backbone).model
    if backbone == "resnet":
        inject_adapter_in_model(LoraConfig(r=8, target_modules=["convolution"]), model, adapter_name="lora")
    return model


def make_recipe(
    backbone: str, ratio: float, name: str, copies: float = 0, geometry: str = "etf", **changes: Any
) -> Recipe:
    settings = {**CHOSEN[backbone], **changes}
    counts = [PER_CLASS] * 5 + [int(PER_CLASS / ratio)] * 5
    config = {
        "projection_dim": 64,
        "geometry": geometry,
        "class_counts": counts,
        "prototypes_per_class": copies,
        "temperature": settings["temperature"],
        "trainable": settings.get("trainable", False),
        **PROMPTS[backbone],
    }
    content: dict[str, Any] = {
        "peft": {"PrototypeConfig": config},
        "args": {**ARGS, "learning_rate": settings["learning_rate"], "weight_decay": 0.01},
    }
    if not settings.get("cross_entropy"):
        content |= {"losses": ["PrototypeSupCon"], "classification_loss": None}
    return Recipe.from_dict(name, content)


def make_recipes(backbone: str, ratio: float, copies: list[int]) -> list[Recipe]:
    make = partial(make_recipe, backbone, ratio)
    recipes = [make("SupCon, no prototypes")]
    for geometry in GEOMETRIES:
        recipes += [make(f"{geometry}, {number} copies", number, geometry) for number in copies if number]
        recipes += [make(f"{geometry}, cross-entropy", 0, geometry, cross_entropy=True)]
    return [*recipes, make("trained prototypes, 100 copies", 100, trainable=True)]


@torch.no_grad()
def embed(trainer: Any, images: Any) -> tuple[Tensor, Tensor]:
    """Return embeddings (N, d) of length 1, and labels (N,)."""
    trainer.extractor.eval()
    loader = trainer.get_test_dataloader(images)
    found = [(trainer.extractor(pixel_values=b["pixel_values"])["image_features"], b["labels"]) for b in loader]
    features, labels = (torch.cat(part) for part in zip(*found, strict=True))
    return nn.functional.normalize(features), labels


def nearest_mean(trainer: Any, evaluate: Any) -> dict[str, Any]:
    """Return Delta_G* of training images, and accuracy by the nearest class mean, which needs no prototypes."""
    features, labels = embed(trainer, trainer.train_dataset)
    means = NeuralCollapse(10, features.shape[1], keep_samples=False).update(features, labels).class_means
    prototypes = linear_classifier(trainer.model).weight.detach().double()
    distance = float(gram_distance(means, prototypes))
    features, labels = embed(trainer, load_image_demo().splits["test"])
    predicted = (features @ nn.functional.normalize(means).to(features).T).argmax(1)
    groups = evaluate_groups(predicted, labels, class_counts(trainer.train_dataset), THRESHOLDS)
    shares = {f"mean_{group}": None if share is None else 100 * share for group, share in groups.items()}
    return {"train_gram_distance": distance, "mean_all": 100 * accuracy(predicted, labels), **shares}


def validate(trainer: Any, evaluate: Any) -> dict[str, Any]:
    """Return the accuracy on validation images."""
    return {"validation": 100 * trainer.predict(load_image_demo().splits["validation"]).metrics["test_accuracy"]}


def run(
    backbone: str, ratio: float, recipes: list[Recipe], seeds: list[int], args: argparse.Namespace, after: Any
) -> list[dict]:
    splits = load_image_demo().splits

    def task(seed: int) -> Task:
        train = step_imbalanced(splits["train"], ratio, PER_CLASS, seed)  # the first five classes are large
        return Task(train, {"all": splits["test"]}, "all", THRESHOLDS)

    overrides = {} if args.num_train_epochs is None else {"num_train_epochs": args.num_train_epochs}
    return run_cells(
        recipes,
        {f"{backbone}, R = {ratio:g}": task},
        partial(make_model, backbone),
        load_image_demo(backbone).processor,
        args.output_dir / backbone,
        seeds,
        overrides,
        after=after,
    )


def tune(args: argparse.Namespace) -> None:
    """Print validation accuracy over learning rates and temperatures: ETF, 100 copies, R = 10, seed 11."""
    log = []
    for backbone in args.backbones:
        grid = [(rate, tau) for tau in (0.1, 0.5, 1.0) for rate in (0.003, 0.01)]
        recipes = [
            make_recipe(backbone, 10, f"rate {rate:g}, temperature {tau:g}", 100, learning_rate=rate, temperature=tau)
            for rate, tau in grid
        ]
        rows = run(backbone, 10, recipes, [11], args, validate)
        for recipe, (rate, tau) in zip(recipes, grid, strict=True):
            found = [row["validation"] for row in rows if row["method"] == recipe.name]
            log.append({"backbone": backbone, "learning_rate": rate, "temperature": tau, "validation": found})
            print(log[-1])
    (args.output_dir / "tune.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def concatenated(batch: GeometryBatch, prototypes: Tensor, copies: int, temperature: float) -> Tensor:
    """Return the loss as the paper writes it: copies of the prototypes are rows of the batch."""
    classes = torch.arange(len(prototypes)).repeat_interleave(copies)
    points = nn.functional.normalize(torch.cat([batch.image_features, prototypes[classes]]))  # type: ignore[list-item]
    labels = torch.cat([batch.labels, classes])  # type: ignore[list-item]
    size = len(batch.labels)  # type: ignore[arg-type]
    logits = points[:size] @ points.T / temperature
    own = torch.zeros_like(logits, dtype=torch.bool)
    own[torch.arange(size), torch.arange(size)] = True
    log_share = logits.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True) - logits
    same = (labels[:size, None] == labels) & ~own
    return ((log_share * same).sum(1) / same.sum(1)).mean()


def cost(rounds: int, batch_size: int = 256, classes: int = 100, dim: int = 128) -> None:
    """Print milliseconds, and megabytes kept for the backward pass; the two losses take turns."""
    torch.manual_seed(0)
    prototypes = simplex_etf(classes, dim, dtype=torch.float32)
    features, labels = torch.randn(batch_size, dim, requires_grad=True), torch.randint(classes, (batch_size,))
    batch = GeometryBatch(image_features=features, labels=labels)
    print(f"batch {batch_size}, {classes} classes, width {dim}; mean of {rounds} rounds, interleaved")
    print("| copies | ms | MB kept | ms, concatenated | MB kept, concatenated | ratio |\n|---|---|---|---|---|---|")
    for copies in COPIES[1:]:
        losses = {
            "ours": partial(PrototypeSupCon(prototypes, copies, 0.1), batch),
            "naive": partial(concatenated, batch, prototypes, copies, 0.1),
        }
        seconds, kept = dict.fromkeys(losses, 0.0), dict.fromkeys(losses, 0)
        for turn in range(rounds + 1):
            for name, loss in losses.items():
                sizes: dict[int, int] = {}

                def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
                    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                    return tensor

                start = time.perf_counter()
                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    value = loss()
                value.backward()
                seconds[name] += (time.perf_counter() - start) * (turn > 0)  # the first round is not counted
                kept[name] = sum(sizes.values())
        ms = {name: 1000 * total / rounds for name, total in seconds.items()}
        mb = {name: size / 2**20 for name, size in kept.items()}
        cells = [f"{copies}", *(f"{n[k]:.2f}" for k in losses for n in (ms, mb)), f"{ms['naive'] / ms['ours']:.1f}"]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/prototypes_table"))
    parser.add_argument("--backbones", nargs="+", choices=CHOSEN, default=list(CHOSEN))
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--copies", type=int, nargs="+", default=list(COPIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--num_train_epochs", type=float, help="overrides the recipes' epochs, for short trials")
    parser.add_argument("--tune", action="store_true", help="compare learning rates and temperatures instead")
    parser.add_argument("--cost", action="store_true", help="measure time and memory of the loss instead")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of --cost")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # LoRA under the prototypes
    if args.cost:
        cost(args.rounds)
        return
    if args.tune:
        tune(args)
        return
    rows = []
    for backbone in args.backbones:
        for ratio in args.ratios:
            rows += run(backbone, ratio, make_recipes(backbone, ratio, args.copies), args.seeds, args, nearest_mean)
    note = f"Five classes of {PER_CLASS} photographs, five of {PER_CLASS}/R. {describe(args.seeds)}"
    digits = {"train_gram_distance": 2, "all_gram_distance": 2}
    table = Results(rows, COLUMNS, note, TITLES, digits)
    table.save(args.output_dir)
    print(table.markdown())


if __name__ == "__main__":
    main()
