"""Choose learning rates and weights of published methods by accuracy on the demo's base validation images.

    python examples/tune_demo.py

Only the development split is used, and one setting is chosen for all tails, by the mean validation accuracy over
tau = 1, 0.25 and 0.06: first the learning rate of each kind of prompts; then, at that rate, one factor on all weights
of a method's terms. The recipes in `recipes/demo` hold the chosen values, `results/tune_demo.json` holds every run. A
run that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from copy import deepcopy
from pathlib import Path

import transformers

from peft_ncgeo.data import load_demo, long_tailed
from peft_ncgeo.protocols import Task, run_cells
from peft_ncgeo.training import Recipe

FOLDER = Path(__file__).parent / "recipes" / "demo"
RATES = (2e-3, 5e-3, 1e-2, 2e-2)
LOWER = (5e-4, 1e-3, 2e-3, 5e-3)  # for methods that train weights of the towers, not prompts
FACTORS = (0.1, 0.3, 1.0, 3.0)
# recipe of prompts -> methods that use its prompts and its learning rate, and add terms
FAMILIES = {
    "coop": [],
    "vpt": [],
    "ivlp": ["promptsrc", "prompt_ot"],
    "maple": ["npt_v1", "npt_v2", "cpt"],
    "clip_lora": [],
    "ln_tuning": [],
}
# as published, before any factor
PUBLISHED = {
    "promptsrc": {"PointwisePreservation": 1},
    "prompt_ot": {"OTPreservation": 10},
    "npt_v1": {"GeometricDebiasing": 0.25, "ModalityIsomorphism": 0.15},
    "npt_v2": {"LanguageCollapse": 0.25, "ModalityIsomorphism": 0.15},
    "cpt": {"ClusterCollapse": 0.25, "ModalityIsomorphism": 0.15, "RotationStabilization": 0.10},
}


def variant(name: str, rate: float, factor: float | None = None) -> Recipe:
    """Return the method's recipe at another learning rate, its published weights times a factor."""
    content = deepcopy(Recipe.read(FOLDER / f"{name}.yaml").source)
    content["args"]["learning_rate"] = rate
    title = f"{name}, rate {rate:g}"
    if factor is not None:
        for term in content["losses"]:
            ((loss, fields),) = term.items()
            fields["weight"] = round(factor * PUBLISHED[name][loss], 6)
        title += f", weights x {factor:g}"
    return Recipe.from_dict(title, content)


def task(seed: int, tau: float) -> Task:
    demo = load_demo("development", seed=seed)
    train = long_tailed(demo.splits["train"], tau=tau, seed=seed, shuffle_classes=True)
    return Task(train, {"validation": demo.splits["validation"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/tune_demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--log", type=Path, default=Path(__file__).parent / "results" / "tune_demo.json")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)
    settings = {f"tau={tau:g}": lambda seed, t=tau: task(seed, t) for tau in (1.0, 0.25, 0.06)}
    processor = load_demo("development").processor
    log: list[dict] = []

    def best(recipes: list[Recipe]) -> Recipe:
        rows = run_cells(
            recipes, settings, lambda: load_demo().model, processor, args.output_dir, args.seeds, {"report_to": "none"}
        )
        means = {
            r.name: statistics.fmean(row["validation"] for row in rows if row["method"] == r.name) for r in recipes
        }
        chosen = max(means, key=means.get)
        for recipe in recipes:
            log.append({"run": recipe.name, "validation": means[recipe.name], "chosen": recipe.name == chosen})
        return next(r for r in recipes if r.name == chosen)

    for family in args.families:
        rates = LOWER if family in ("clip_lora", "ln_tuning") else RATES
        rate = best([variant(family, rate) for rate in rates]).args["learning_rate"]
        for name in FAMILIES[family]:
            best([variant(name, rate, factor) for factor in FACTORS])
    lines = ["| run | base validation |", "| --- | --- |"]
    lines += [f"| {'**' * e['chosen']}{e['run']}{'**' * e['chosen']} | {e['validation']:.1f} |" for e in log]
    print("\n".join(lines))
    again = {name for family in args.families for name in (family, *FAMILIES[family])}
    kept = json.loads(args.log.read_text())["runs"] if args.log.exists() else []
    log = [run for run in kept if run["run"].split(",")[0] not in again] + log
    args.log.write_text(json.dumps({"seeds": args.seeds, "runs": log}, indent=1) + "\n")


if __name__ == "__main__":
    main()
