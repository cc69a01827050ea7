"""Every method from base to new classes, balanced and with a long tail: the table of docs/results/base_to_new.md.

    python examples/benchmark_base_new.py
        the built-in demo, all recipes of recipes/demo, three tails of few shots and three exponential ones; then
        tau = 1 and IF 50 again, trained on the drawings of one artist and tested on each artist's drawings.

    python examples/benchmark_base_new.py --dataset examples/datasets/oxford_pets.yaml \
        --model_name_or_path openai/clip-vit-base-patch16 --recipes examples/recipes/*.yaml
        a data set of the papers with the papers' recipes; --data_dir reads a local copy of the data set.

    python examples/benchmark_base_new.py --all_classes
        the same settings, trained and tested on all names; on the demo, on the thirty that have training images.

Every cell (setting, method, seed) is a small file in the output folder. A stopped run continues, and several processes
or machines share the cells. The table at the end has the recipes that this call names: when all cells are there, call
it once more with all --recipes. `write_base_to_new.py` writes the page.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from peft_ncgeo.data import load_demo
from peft_ncgeo.data.demo import VENDORS
from peft_ncgeo.protocols import Results, all_classes, base_to_new
from peft_ncgeo.protocols.command_line import (
    model_and_processor,
    overrides,
    protocol_parser,
    read_recipes,
    read_source,
)

RECIPES = Path(__file__).parent / "recipes" / "demo"
ORDER = ("nearest_class_mean", "linear_probe", "tip_adapter", "tip_adapter_f", "gda", "lp_plus_plus", "clap")
ORDER += ("coop", "vpt", "ivlp", "maple", "promptsrc", "prompt_ot", "npt_v1", "npt_v2", "cpt")
ORDER += ("clip_lora", "ln_tuning", "adaptformer", "two_stages")
ORDER += ("budget", "lora_budget")  # ours
TAILS = {
    "tau=1": {"tau": 1.0},
    "tau=0.25": {"tau": 0.25},
    "tau=0.06": {"tau": 0.06},
    "IF 10": {"imbalance_factor": 10, "n_max": 50},
    "IF 50": {"imbalance_factor": 50, "n_max": 50},
    "IF 100": {"imbalance_factor": 100, "n_max": 100},
}
OF_ONE_ARTIST = ("tau=1", "IF 50")


def of_artist(split: str, artist: str | None) -> tuple[Callable[[int, int], Dataset], dict[str, Dataset]]:
    """Return the demo's training images, a function of seed and largest class, and its test sets."""
    splits = load_demo(split, train_artist=artist).splits
    test = {"base": splits["base"], "new": splits["new"], "kept": splits["fashion_mnist"]}
    if artist is not None:
        test |= {f"{part}_other": splits[f"{part}_other_artist"] for part in ("base", "new")}

    def train(seed: int, n_max: int) -> Dataset:
        return load_demo(split, shots=n_max, seed=seed, train_artist=artist).splits["train"]

    return train, test


def main() -> None:
    parser = protocol_parser(__doc__.splitlines()[0], "outputs/base_new", [RECIPES / f"{name}.yaml" for name in ORDER])
    parser.add_argument("--tails", nargs="+", choices=list(TAILS), help="default: all; with --dataset, those with tau")
    parser.add_argument("--split", default="report", choices=["report", "development"], help="split of the demo")
    parser.add_argument(
        "--artists",
        nargs="*",
        choices=VENDORS,
        default=VENDORS,
        help="train on each of these artists of the demo alone too",
    )
    parser.add_argument("--dataset", type=Path, help="a YAML file of examples/datasets; default: the demo")
    parser.add_argument("--all_classes", action="store_true", help="train and test on all names, not on half of them")
    args = parser.parse_args()
    model, processor = model_and_processor(args)
    if args.dataset is None:
        (train, test), template = of_artist(args.split, None), None
        test = test["base"] if args.all_classes else test
    else:
        source = read_source(parser, args, args.dataset)
        train, test = (source.load(part, args.data_dir) for part in ("train", "test"))
        template = source.template
    # few of the papers' sets have a hundred images a class
    names = args.tails or [name for name in TAILS if args.dataset is None or "tau" in TAILS[name]]

    recipes, shared = read_recipes(args, template), {"seeds": args.seeds, "args": overrides(args)}

    def run(protocol: Callable[..., Results], train: Any, test: Any, tails: dict[str, Any]) -> Results:
        return protocol(recipes, train, test, model, processor, args.output_dir, tails=tails, **shared)

    results = run(all_classes if args.all_classes else base_to_new, train, test, {name: TAILS[name] for name in names})
    for artist in args.artists if args.dataset is None and not args.all_classes else ():
        tails = {f"{name}, {artist} alone": TAILS[name] for name in names if name in OF_ONE_ARTIST}
        if tails:
            alone = run(base_to_new, *of_artist(args.split, artist), tails)
            results.rows += alone.rows
            results.columns = list(dict.fromkeys([*results.columns, *alone.columns]))
    data = f"the demo's {args.split} split" if args.dataset is None else args.dataset.stem
    results.note = f"{args.model_name_or_path or 'mini-CLIP'} on {data}: accuracies in percent. {results.note}"
    results.columns += ["trainable", "seconds"]
    results.digits = {"trainable": 0, "seconds": 0}
    results.save(args.output_dir)
    pivot = results.pivot("accuracy" if args.all_classes else "H")
    print(f"{results.markdown()}\n\n{pivot}\n\n{results.note}")


if __name__ == "__main__":
    main()
