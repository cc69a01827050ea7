"""Search for this package's own recipe on the demo's development split, with a log of every run.

    python examples/search_demo.py
    python examples/search_demo.py --candidates published

A candidate changes the first recipe (deep prompts, transport budget 0.05, logit adjustment). Each is run once (seed 1)
at tau = 1, tau = 0.06 and IF 50; the best mean H is chosen. "published" searches two published recipes with the same
effort: sixty epochs, and a weight chosen by H. A run that was stopped continues; the log is
`results/search_<candidates>.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import transformers

from peft_ncgeo.data import load_demo
from peft_ncgeo.protocols import base_to_new
from peft_ncgeo.training import Recipe

TAILS = {
    "tau=1": {"tau": 1.0},
    "tau=0.06": {"tau": 0.06},
    "IF 50": {"imbalance_factor": 50, "n_max": 50},
}
FOLDER = Path(__file__).parent
TEMPLATES = Recipe.read(FOLDER / "recipes" / "demo" / "budget.yaml").args["frozen_templates"]
START: dict[str, Any] = {
    "peft": {"NPTConfig.prompt_ot": {}},
    "losses": [{"OTPreservation": {"budget": 0.05}}],
    "classification_loss": {"LogitAdjustment": {}},
    "args": {
        "num_train_epochs": 15,
        "batch_size": 60,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
    },
}
AVERAGED = {"callbacks": [{"PromptAveraging": {"mean": 15, "std": 4}}]}
ENSEMBLE = {"args": {**START["args"], "frozen_templates": TEMPLATES}}
LONGER = {"args": {**ENSEMBLE["args"], "num_train_epochs": 30}}


def ot(**fields: Any) -> dict[str, Any]:
    return {"OTPreservation": fields}


OURS: dict[str, dict[str, Any]] = {
    "start": {},
    "averaged": AVERAGED,
    "templates": ENSEMBLE,
    "averaged, templates": {**AVERAGED, **ENSEMBLE},
    "averaged, templates, budget 0.03": {**AVERAGED, **ENSEMBLE, "losses": [ot(budget=0.03)]},
    "averaged, templates, image 0.03, text 0.03": {
        **AVERAGED,
        **ENSEMBLE,
        "losses": [ot(budget=0.03, modality=m, name=f"ot_{m}") for m in ("image", "text")],
    },
    "averaged, templates, pointwise 0.5": {
        **AVERAGED,
        **ENSEMBLE,
        "losses": [{"PointwisePreservation": {"budget": 0.5}}],
    },
    "templates, budget 0.03, 30 epochs": {**LONGER, "losses": [ot(budget=0.03)]},
    "templates, features only, pointwise 0.5": {
        **ENSEMBLE,
        "losses": [{"PointwisePreservation": {"budget": 0.5, "prediction_weight": 0}}],
    },
    "templates, budget 0.02, 60 epochs": {
        "args": {**LONGER["args"], "num_train_epochs": 60},
        "losses": [ot(budget=0.02)],
    },
    "templates, budget 0.03, 30 epochs, rate 0.01": {
        "args": {**LONGER["args"], "learning_rate": 1e-2},
        "losses": [ot(budget=0.03)],
    },
    "templates, image 0.04, text 0.01": {
        **ENSEMBLE,
        "losses": [
            ot(budget=0.04, modality="image", name="ot_image"),
            ot(budget=0.01, modality="text", name="ot_text"),
        ],
    },
}


def published(loss: dict[str, Any], prompts: str, epochs: int, **change: Any) -> dict[str, Any]:
    """Return a published recipe without logit adjustment, with the prompts' own learning rate."""
    args = {**START["args"], "learning_rate": 1e-2, "num_train_epochs": epochs, **change.pop("args", {})}
    return {
        "peft": {prompts: {}},
        "losses": [loss],
        "classification_loss": {"CrossEntropy": {}},
        "args": args,
        **change,
    }


def promptsrc(weight: float, epochs: int) -> dict[str, Any]:
    return published(
        {"PointwisePreservation": {"weight": weight, "kl_reduction": "mean"}},
        "NPTConfig.ivlp",
        epochs,
        args={"frozen_templates": TEMPLATES},
        callbacks=[{"PromptAveraging": {"mean": 0.75 * epochs, "std": 0.05 * epochs}}],
    )


PUBLISHED: dict[str, dict[str, Any]] = {
    **{f"prompt_ot, weight {w}, 60 epochs": published(ot(weight=w), "NPTConfig.prompt_ot", 60) for w in (3, 10, 30)},
    **{f"promptsrc, weight {w}, 60 epochs": promptsrc(w, 60) for w in (0.3, 1, 3)},
}
GROUPS = {"ours": OURS, "published": PUBLISHED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/search_demo"))
    parser.add_argument("--candidates", default="ours", choices=list(GROUPS))
    parser.add_argument("--log_dir", type=Path, default=FOLDER / "results")
    parser.add_argument("--tails", nargs="+", default=list(TAILS), choices=list(TAILS))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)
    demo, candidates = load_demo("development"), GROUPS[args.candidates]
    results = base_to_new(
        [Recipe.from_dict(name, {**START, **change}) for name, change in candidates.items()],
        lambda seed, n_max: load_demo("development", shots=n_max, seed=seed).splits["train"],
        {"base": demo.splits["base"], "new": demo.splits["new"]},
        lambda: load_demo().model,
        demo.processor,
        args.output_dir,
        tails={name: TAILS[name] for name in args.tails},
        seeds=(1,),
    )
    print(results.markdown(["base", "new", "H", "few"]))
    means = {name: statistics.fmean(r["H"] for r in results.rows if r["method"] == name) for name in candidates}
    for name, mean in sorted(means.items(), key=lambda item: -item[1]):
        print(f"{mean:.2f}  {name}")
    if args.tails == list(TAILS):
        runs = [{k: row.get(k) for k in ("setting", "method", "base", "new", "H", "few")} for row in results.rows]
        log = {"runs": len(runs), "mean_H": means, "candidates": candidates, "rows": runs}
        (args.log_dir / f"search_{args.candidates}.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
