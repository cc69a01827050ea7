"""Comparison of transport across instances with the point-wise cost, at equal drift, on the demo.

    python examples/compare_transport.py

Every variant of `OTPreservation` (modality x solver) is trained with a budget, and then with a fixed weight: the mean
multiplier of the later half of training with the budget, so that both have similar drift. In "pointwise" the transport
plan is the identity. Each cell (variant, seed) is a small JSON file; a run that was stopped continues
with the missing cells.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import PrinterCallback, set_seed

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments
from peft_ncgeo.data import load_demo
from peft_ncgeo.files import write_whole
from peft_ncgeo.geometry.sphere import l2_normalize
from peft_ncgeo.losses import GeometryBatch, OTPreservation, Regularizer
from peft_ncgeo.training import Recipe

RECIPE = Path(__file__).parent / "recipes" / "demo" / "ot_budget.yaml"
JOINT_BUDGET = 0.05  # half of it for a single modality, whose cost is one mean instead of two
COLUMNS = {
    "base": "base",
    "new": "new",
    "H": "H",
    "kept": "knowledge kept",
    "share": "identity share",
    "drift": "drift",
    "factor": "factor",
}


class PointwisePairs(Regularizer):
    """Point-wise cost `mean_i 1/2 ||u_i - v_i||^2`: the joint cost of each pair with itself."""

    default_name = "ot"
    requires = ("frozen_image_features", "frozen_text_features")

    def forward(self, batch: GeometryBatch) -> torch.Tensor:
        image, text, frozen_image, frozen_text = map(
            l2_normalize,
            batch.need("image_features", "text_features", "frozen_image_features", "frozen_text_features"),
        )
        moved = [image - frozen_image, (text - frozen_text)[batch.labels]]
        return sum(0.5 * m.square().sum(-1).mean() for m in moved)


SOLVERS = {"exact": {}, "entropic": {"solver": "entropic"}, "memory": {"memory_size": 240}}
VARIANTS: dict[str, Callable[..., Regularizer]] = {"pointwise": PointwisePairs}
for _modality in ("joint", "separate", "image", "text"):
    for _solver, _options in SOLVERS.items():
        VARIANTS[f"{_modality} {_solver}"] = lambda m=_modality, o=_options, **kw: OTPreservation(
            modality=m, **o, **kw
        )


def budget_of(variant: str) -> float:
    return JOINT_BUDGET / 2 if variant.startswith(("image", "text")) else JOINT_BUDGET


def train(loss: Regularizer | None, seed: int, split: str, recipe: Recipe, folder: Path) -> dict[str, float]:
    set_seed(seed)
    demo = load_demo(split, seed=seed)
    args = GeometryTrainingArguments(
        output_dir=str(folder),
        **{name: value for name, value in recipe.args.items() if name != "batch_size"},
        per_device_train_batch_size=recipe.args["batch_size"],
        per_device_eval_batch_size=256,
        logging_strategy="epoch",
        save_strategy="no",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = GeometryTrainer(
        model=get_peft_model(demo.model, recipe.config()),
        args=args,
        train_dataset=demo.splits["train"],
        eval_dataset={"base": demo.splits["base"], "new": demo.splits["new"], "kept": demo.splits["fashion_mnist"]},
        processing_class=demo.processor,
        losses=[loss] if loss else [],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    metrics = trainer.evaluate()
    result = {name: 100 * metrics[f"eval_{name}_accuracy"] for name in ("base", "new", "kept")}
    result["H"] = 100 * metrics["eval_harmonic_mean"]
    logs = [entry for entry in trainer.state.log_history if "loss/ce" in entry]
    late = logs[len(logs) // 2 :]  # after the multiplier has settled
    if loss:
        result["factor"] = statistics.fmean(entry["lambda/ot"] for entry in late)
        result["share"] = statistics.fmean(entry.get("ot_identity_share", 1.0) for entry in late)
    result["drift"] = drift(trainer, demo.splits["train"])
    return result


@torch.no_grad()
def drift(trainer: GeometryTrainer, images) -> float:
    """Return the point-wise joint cost over the training images, which is comparable between variants."""
    probe = GeometryTrainer(
        model=trainer.model,
        args=trainer.args,
        train_dataset=images,
        processing_class=trainer.processing_class,
        losses=[PointwisePairs(weight=1.0)],
    )
    probe.features.begin(dict(probe.task.texts(probe.class_names)))
    batches = [probe.geometry_batch(probe.extractor, inputs) for inputs in probe.get_train_dataloader()]
    values = [(len(batch.labels), float(probe.losses[0](batch))) for batch in batches]
    return sum(n * value for n, value in values) / sum(n for n, _ in values)


def cell(path: Path, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    if not path.exists():
        write_whole(path, json.dumps(run(), indent=1) + "\n")
    return json.loads(path.read_text())


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| variant | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for title, results in rows.items():
        cells = []
        for column in COLUMNS:
            values = [r[column] for r in results if column in r]
            digits = 1 if column in ("base", "new", "H", "kept") else 3 if column == "drift" else 2
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and digits == 1 else ""
            cells.append(f"{statistics.fmean(values):.{digits}f}{spread}" if values else "")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare_transport"))
    parser.add_argument("--split", default="report", choices=["report", "development"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="prompts and arguments; losses are replaced")
    parser.add_argument("--num_train_epochs", type=float, help="default: the recipe's")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args()
    recipe = Recipe.read(args.recipe)
    if args.num_train_epochs is not None:
        recipe.args["num_train_epochs"] = args.num_train_epochs
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)
    rows: dict[str, list[dict[str, float]]] = {}
    bar = tqdm(total=len(args.seeds) * (1 + 2 * len(args.variants)), unit="cell")

    def fill(title: str, make: Callable[[int], Regularizer | None]) -> list[dict[str, float]]:
        for seed in args.seeds:
            bar.set_description(f"{title}, seed {seed}")
            path = args.output_dir / args.split / title.replace(" ", "_").replace(",", "") / f"seed-{seed}.json"
            train_one = lambda s=seed: train(make(s), s, args.split, recipe, args.output_dir)  # noqa: E731
            rows.setdefault(title, []).append(cell(path, train_one))
            bar.update()
        return rows[title]

    fill("no transport", lambda seed: None)
    for variant in args.variants:
        budgets = fill(f"{variant}, budget", lambda seed, v=variant: VARIANTS[v](budget=budget_of(v)))
        weights = {seed: result["factor"] for seed, result in zip(args.seeds, budgets, strict=True)}
        fill(f"{variant}, weight", lambda seed, v=variant, w=weights: VARIANTS[v](weight=w[seed]))
    bar.close()
    epochs, size = recipe.args["num_train_epochs"], recipe.args["batch_size"]
    note = (
        f"mini-CLIP on the demo's {args.split} split, 16 shots, {epochs:g} epochs, batch {size}, seeds "
        f"{', '.join(map(str, args.seeds))}; drift is the point-wise joint cost over the training images, factor the "
        f"mean multiplier of the later half of training. torch {torch.__version__} on the CPU."
    )
    print(f"\n{table(rows)}\n\n{note}")
    write_whole(args.output_dir / "results.md", f"{table(rows)}\n\n{note}\n")
    write_whole(args.output_dir / "results.json", json.dumps({"note": note, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
