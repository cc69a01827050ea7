"""Every method from base to new classes, balanced and with a long tail: docs/results/long_tails.md.

    python examples/benchmark_base_new.py
        the built-in demo, all recipes of recipes/demo, three tails of few shots and three exponential ones.

    python examples/benchmark_base_new.py --dataset examples/datasets/oxford_pets.yaml \
        --model_name_or_path openai/clip-vit-base-patch16 --recipes examples/recipes/*.yaml
        a data set of the papers with the papers' recipes; --data_dir reads a local copy of it.

    python examples/benchmark_base_new.py --all_classes
        the same settings, trained and tested on all names; on the demo, on the thirty that have training images.

Every cell (setting, method, seed) is a small file in the output folder: a run that was stopped continues, and a part
of the --recipes fills a part of the table.
"""

from __future__ import annotations

from pathlib import Path

from peft_ncgeo.data import load_demo
from peft_ncgeo.protocols import all_classes, base_to_new
from peft_ncgeo.protocols.command_line import (
    model_and_processor,
    overrides,
    protocol_parser,
    read_recipes,
    read_source,
)

RECIPES = Path(__file__).parent / "recipes" / "demo"
ORDER = ("coop", "vpt", "ivlp", "maple", "promptsrc", "prompt_ot", "npt_v1", "npt_v2", "cpt")
ORDER += ("promptsrc_long", "prompt_ot_long", "budget")  # like ours: sixty epochs, a weight chosen by H
TAILS = {
    "tau=1": {"tau": 1.0},
    "tau=0.25": {"tau": 0.25},
    "tau=0.06": {"tau": 0.06},
    "IF 10": {"imbalance_factor": 10, "n_max": 50},
    "IF 50": {"imbalance_factor": 50, "n_max": 50},
    "IF 100": {"imbalance_factor": 100, "n_max": 100},
}


def main() -> None:
    parser = protocol_parser(__doc__.splitlines()[0], "outputs/base_new", [RECIPES / f"{name}.yaml" for name in ORDER])
    parser.add_argument("--tails", nargs="+", choices=list(TAILS), help="default: all; with --dataset, those with tau")
    parser.add_argument("--split", default="report", choices=["report", "development"], help="split of the demo")
    parser.add_argument("--dataset", type=Path, help="a YAML file of examples/datasets; default: the demo")
    parser.add_argument("--all_classes", action="store_true", help="train and test on all names, not on half of them")
    args = parser.parse_args()
    model, processor = model_and_processor(args)
    if args.dataset is None:
        splits, template = load_demo(args.split).splits, None
        test = {"base": splits["base"], "new": splits["new"], "kept": splits["fashion_mnist"]}
        test = splits["base"] if args.all_classes else test
        train = lambda seed, n_max: load_demo(args.split, shots=n_max, seed=seed).splits["train"]  # noqa: E731
    else:
        source = read_source(parser, args, args.dataset)
        train, test = (source.load(part, args.data_dir) for part in ("train", "test"))
        template = source.template
    # few of the papers' sets have a hundred images a class
    names = args.tails or [name for name in TAILS if args.dataset is None or "tau" in TAILS[name]]
    results = (all_classes if args.all_classes else base_to_new)(
        read_recipes(args, template),
        train,
        test,
        model,
        processor,
        args.output_dir,
        tails={name: TAILS[name] for name in names},
        seeds=args.seeds,
        args=overrides(args),
    )
    data = f"the demo's {args.split} split" if args.dataset is None else args.dataset.stem
    results.note = f"{args.model_name_or_path or 'mini-CLIP'} on {data}: accuracies in percent. {results.note}"
    results.save(args.output_dir)
    pivot = results.pivot("accuracy" if args.all_classes else "H")
    print(f"{results.markdown()}\n\n{pivot}\n\n{results.note}")


if __name__ == "__main__":
    main()
