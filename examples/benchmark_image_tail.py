"""Image classifiers on long tails, with the settings that a search chose: the table of docs/results/image_tail.md.

python examples/search_recipes.py --spaces examples/search/image_tail.yaml
python examples/benchmark_image_tail.py
    the demo's ViT on Fashion-MNIST with 200 photographs of the largest class, imbalance factors 10, 50 and 100, three
    seeds; every method that has a log of its search. A run that was stopped continues, and several runs can share the
    work, for example with different --methods. The table at the end shows the methods of --methods.
python examples/write_image_tail.py
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from peft import inject_adapter_in_model
from torch import nn

from peft_ncgeo import ImageClassifier
from peft_ncgeo.data import class_counts, load_image_demo, long_tailed
from peft_ncgeo.protocols import Results, long_tail
from peft_ncgeo.protocols.runs import describe
from peft_ncgeo.training import Recipe, align_classifier

LOGS = Path(__file__).parent / "results" / "search" / "image_tail"
OF_CLASSIFIER = ("head", "inside", "align")  # arguments of a recipe that `run_tails` reads
N_MAX = 200
TITLES = {"all_alignment": "alignment", "all_nc1": "NC1", "trainable": "trained numbers"}
COLUMNS = ["all", "many", "medium", "few", "all_alignment", "all_nc1", "trainable"]
DIGITS = {"all_alignment": 2, "trainable": 0}
Content = dict[str, Any]


def classifier(head: str = "linear", inside: Content | None = None) -> nn.Module:
    """Return the demo's ViT with a new head, and with an adapter inside that is trained with the recipe's own."""
    model: Any = load_image_demo().model
    if head != "linear":
        model = ImageClassifier.from_backbone(model.base_model, list(model.config.id2label.values()), head=head)
    if inside:
        config = Recipe.from_dict("inside", {"peft": inside}).config()
        inject_adapter_in_model(config, model, adapter_name="inside")
    return model


def turn(trainer: Any, evaluate: Callable[[], Content], fraction: float) -> Content:
    """Align a trained head with the class means, and evaluate it again."""
    align_classifier(trainer.model, trainer.train_dataset, fraction, trainer.processing_class)
    return evaluate()


def with_counts(content: Content, counts: Content) -> Content:
    """Return a recipe's content whose prototypes belong to other class counts."""
    return {**content, "peft": {"PrototypeConfig": {**content["peft"]["PrototypeConfig"], **counts}}}


def run_tails(
    recipes: dict[str, Content],
    test: Dataset,
    folder: Path,
    imbalance_factors: Sequence[float],
    n_max: int,
    seeds: Sequence[int],
    args: Content | None = None,
) -> list[Content]:
    """Return the rows of [`long_tail`] on the demo's photographs, for recipes with these arguments besides.

    - `head`: "linear" or "cosine", which starts at random.
    - `inside`: another adapter, such as LoRA under prototypes.
    - `align`: the fraction by which the head is turned to the class means after training.

    `class_counts` of a PrototypeConfig are replaced by those of each tail.
    """
    demo, groups = load_image_demo(), {}
    for name, content in recipes.items():
        given = dict(content["args"])
        own = {key: given.pop(key) for key in OF_CLASSIFIER if key in given}
        counted = "class_counts" in (content["peft"].get("PrototypeConfig") or {})
        groups.setdefault(json.dumps([own, counted]), {})[name] = {**content, "args": given}
    rows = []
    for key, group in groups.items():
        own, counted = json.loads(key)
        fraction = own.pop("align", None)
        each = product(imbalance_factors, seeds)
        for factors, some in [([f], [s]) for f, s in each] if counted else [(imbalance_factors, seeds)]:
            tail = {"n_max": n_max, "shuffle_classes": True}
            if counted:
                train = long_tailed(demo.splits["train"], imbalance_factor=factors[0], seed=some[0], **tail)
                counts = {"class_counts": class_counts(train).tolist()}
                group = {name: with_counts(content, counts) for name, content in group.items()}
            rows += long_tail(
                [Recipe.from_dict(*recipe) for recipe in group.items()],
                demo.splits["train"],
                test,
                partial(classifier, **own),
                demo.processor,
                folder,
                imbalance_factors=factors,
                seeds=some,
                args=args,
                thresholds="thirds",
                after=partial(turn, fraction=fraction) if fraction is not None else None,
                **tail,
            ).rows
    order = list(recipes)
    settings = [f"IF {factor:g}" for factor in imbalance_factors]
    return sorted(rows, key=lambda row: (settings.index(row["setting"]), order.index(row["method"]), row["seed"]))


def quieten() -> None:
    """Turn off messages and warnings of training that are expected here."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)  # prompts over all layers, LoRA under prototypes, ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/image_tail"))
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of the searches' logs")
    parser.add_argument("--methods", nargs="+", help="names of methods; default: all that have a log")
    parser.add_argument("--imbalance_factors", type=float, nargs="+", default=[10, 50, 100])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--num_train_epochs", type=float, help="overrides the recipes' epochs, for short trials")
    args = parser.parse_args()
    quieten()
    found = {path.stem: json.loads(path.read_text())["chosen"]["recipe"] for path in sorted(args.logs.glob("*.json"))}
    methods = args.methods or list(found)
    if not methods or set(methods) - set(found):
        missing = min(set(methods) - set(found), default="any method")
        parser.error(f"{args.logs} has no log of {missing}; search first, see search_recipes.py.")
    rows = run_tails(
        {method: found[method] for method in methods},
        load_image_demo().splits["test"],
        args.output_dir,
        args.imbalance_factors,
        N_MAX,
        args.seeds,
        {} if args.num_train_epochs is None else {"num_train_epochs": args.num_train_epochs},
    )
    note = f"The demo's ViT on long-tailed Fashion-MNIST, n_max {N_MAX}, thirds of the classes. {describe(args.seeds)}"
    table = Results(rows, COLUMNS, note, TITLES, DIGITS)
    table.save(args.output_dir)
    print(table.markdown())


if __name__ == "__main__":
    main()
