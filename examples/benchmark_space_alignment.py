"""Space alignment on the demo's long-tailed photographs: each long-tail loss, alone and with each way to align.

    python examples/benchmark_space_alignment.py
        Fashion-MNIST with 200 images of the largest class, imbalance factors 10 to 200, three seeds; the demo's ViT
        with LoRA and with vision prompts. These are hundreds of short runs, an hour or more on two cores. A run that
        was stopped continues, and two runs with different `--adapters` share the work.

    python examples/benchmark_space_alignment.py --tune
        the runs from which learning rate and strengths were chosen, on validation images and other seeds.

A post-hoc row aligns the head of the plain run of its loss, by a fraction that is chosen on validation images.
"""

from __future__ import annotations

import argparse
import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import transformers
import yaml

from peft_ncgeo.data import load_image_demo
from peft_ncgeo.protocols import Results, long_tail
from peft_ncgeo.training import Recipe, align_classifier, sweep_alignment

ADAPTERS = {"lora": "vit_lora", "prompts": "vit_prompts"}
LOSSES: dict[str, dict[str, Any]] = {
    "CE": {},
    "class-balanced": {"args": {"class_balanced_sampling": True}},
    # logit adjustment at tau = 1 is the same loss
    "balanced softmax": {"classification_loss": {"BalancedSoftmax": {}}},
    "LDAM-DRW": {"classification_loss": {"LDAM": {"max_margin": 0.5, "reweight_after": 0.8}}},
}
ALIGNMENTS: dict[str, dict[str, Any]] = {  # --tune chose the strengths of Reg and SLERP; gamma is the paper's
    "": {},
    " + Reg": {"losses": [{"SpaceAlignment": {"weight": 0.1}}]},
    " + SLERP": {"callbacks": [{"SlerpAlignment": {"alpha": 2e-5}}]},
    " + Proj": {"callbacks": [{"GradientProjection": {"gamma": 0.6}}]},
}
# the paper's control: it moves the head away from the means
CONTROL = {" - Reg": {"losses": [{"SpaceAlignment": {"weight": -1.0}}]}}
POST_HOC = " + post-hoc"
N_MAX = 200
FRACTIONS = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
GRID: dict[str, list[dict[str, Any]]] = {
    "learning_rate": [{"args": {"learning_rate": rate}} for rate in (0.003, 0.01, 0.03)],
    "Reg": [{"losses": [{"SpaceAlignment": {"weight": w}}]} for w in (0.1, 1.0, 3.0)],
    "SLERP": [{"callbacks": [{"SlerpAlignment": {"alpha": a}}]} for a in (0.00002, 0.0002, 0.002)],
}
RECIPES = Path(__file__).parent / "recipes" / "images" / "demo"
DIGITS = {"alignment": 2, "nc2": 2, "nc3": 2, "class_exponent": 2, "exponent_ratio": 3}
COLUMNS = ["all", "many", "medium", "few", "alignment", "nc1", "nc2", "nc3", "class_exponent", "exponent_ratio"]


def compose(adapter: str, name: str, *parts: dict[str, Any]) -> Recipe:
    """Return the adapter's recipe with the parts added."""
    content = yaml.safe_load((RECIPES / f"{ADAPTERS[adapter]}.yaml").read_text(encoding="utf-8"))
    for part in map(deepcopy, parts):
        content["args"] |= part.pop("args", {})
        for key, value in part.items():
            content[key] = content.get(key, []) + value if isinstance(value, list) else value
    return Recipe.from_dict(name, content)


def post_hoc(trainer: Any, evaluate: Any) -> dict[str, Any]:
    """Rotate a plain run's head by the fraction that is best on validation images, and evaluate it again."""
    images, processor = load_image_demo().splits["validation"], trainer.processing_class
    metrics = {"validation": 100 * trainer.predict(images).metrics["test_accuracy"]}
    if trainer.class_means is not None:
        return metrics  # it was aligned during training
    rows = sweep_alignment(trainer.model, trainer.train_dataset, images, FRACTIONS, processor)
    best = max(rows, key=lambda row: (row["accuracy"], -row["fraction"]))
    align_classifier(trainer.model, trainer.train_dataset, best["fraction"], processor, images)
    aligned = {f"post_hoc_{name}": value for name, value in evaluate().items()}
    return {**metrics, "validation_sweep": rows, "post_hoc_fraction": best["fraction"], **aligned}


def run(recipes: list[Recipe], folder: Path, args: argparse.Namespace, **options: Any) -> Results:
    demo = load_image_demo()
    return long_tail(
        recipes,
        demo.splits["train"],
        demo.splits["test"],
        lambda: load_image_demo().model,
        demo.processor,
        folder,
        n_max=N_MAX,
        shuffle_classes=True,
        thresholds="thirds",
        args={} if args.num_train_epochs is None else {"num_train_epochs": args.num_train_epochs},
        after=post_hoc,
        **options,
    )


def with_post_hoc(row: dict[str, Any], adapter: str) -> list[dict[str, Any]]:
    """Return the row of a run and, for a plain run, the row of its aligned head, with the same names of metrics."""
    keys = {"setting": f"{adapter}, {row['setting']}", "seed": row["seed"]}

    def renamed(prefix: str) -> dict[str, Any]:
        found = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
        return {k.removeprefix("all_"): v for k, v in found.items() if not isinstance(v, list)}

    plain = {k: v for k, v in renamed("").items() if not k.startswith("post_hoc_")}
    rows = [{**plain, **keys, "method": row["method"]}]
    if row["method"] in LOSSES:
        rows.append({**renamed("post_hoc_"), **keys, "method": row["method"] + POST_HOC})
    return rows


def tune(args: argparse.Namespace) -> None:
    """Print validation accuracy of plain cross-entropy over learning rates, then over each strength, at IF 100."""
    chosen: list[dict[str, Any]] = []
    for adapter in args.adapters:
        best: dict[str, Any] = {}
        for name, grid in GRID.items():
            recipes = [compose(adapter, f"{name} {json.dumps(part)}", best, part) for part in grid]
            settings = {"imbalance_factors": [100], "seeds": [11, 12]}
            results = run(recipes, args.output_dir / "tune" / adapter, args, **settings)
            scores = []
            for recipe, part in zip(recipes, grid, strict=True):
                found = [row["validation"] for row in results.rows if row["method"] == recipe.name]
                scores.append((sum(found) / len(found), part))
                chosen.append({"adapter": adapter, "step": name, "part": part, "validation": found})
                print(adapter, name, part, found)
            if name == "learning_rate":
                best = max(scores, key=lambda score: score[0])[1]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "tune.json").write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/space_alignment"))
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--imbalance_factors", type=float, nargs="+", default=[10, 50, 100, 200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--num_train_epochs", type=float, help="overrides the recipes' epochs, for short trials")
    parser.add_argument("--tune", action="store_true", help="compare learning rates and strengths instead")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*undefined")  # metrics of classes whose mean is nearest to no sample
    if args.tune:
        tune(args)
        return
    rows: list[dict[str, Any]] = []
    for adapter in args.adapters:
        recipes = [
            compose(adapter, loss + alignment, part, turn)
            for loss, part in LOSSES.items()
            if loss in args.losses
            for alignment, turn in {**ALIGNMENTS, **(CONTROL if loss == "CE" else {})}.items()
        ]
        settings = {"imbalance_factors": args.imbalance_factors, "seeds": args.seeds}
        results = run(recipes, args.output_dir / adapter, args, **settings)
        rows += [new for row in results.rows for new in with_post_hoc(row, adapter)]
    order = [loss + turn for loss in LOSSES for turn in (*ALIGNMENTS, *CONTROL, POST_HOC)]
    settings_in_order = list(dict.fromkeys(row["setting"] for row in rows))
    rows.sort(key=lambda row: (settings_in_order.index(row["setting"]), order.index(row["method"]), row["seed"]))
    note = f"The demo's ViT on long-tailed Fashion-MNIST, n_max {N_MAX}, thirds of the classes. {results.note}"
    table = Results(rows, COLUMNS, note, digits=DIGITS)
    table.save(args.output_dir)
    print(table.markdown())


if __name__ == "__main__":
    main()
