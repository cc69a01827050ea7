"""Transfer to other data sets without further training; also long tails and few shots of all classes of one set.

    python examples/benchmark_transfer.py cross_dataset --source examples/datasets/imagenet.yaml \
        --targets examples/datasets/{caltech101,oxford_pets,dtd}.yaml \
        --model_name_or_path openai/clip-vit-base-patch16 --recipes examples/recipes/*.yaml
    python examples/benchmark_transfer.py domain_generalisation --source examples/datasets/imagenet.yaml \
        --targets examples/datasets/imagenet_{v2,sketch,a,r}.yaml ...
    python examples/benchmark_transfer.py long_tail --source examples/datasets/cifar100.yaml ...
    python examples/benchmark_transfer.py all_classes --source examples/datasets/oxford_pets.yaml ...
        few shots of every class, tested on all names, without a target

Without --source each protocol runs on the built-in demo: from 30 emoji to other emoji and Fashion-MNIST, from the
drawings of one vendor to those of another, or on the 30 emoji with few images or long tails.
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset

from peft_ncgeo.data import DatasetSource, load_demo
from peft_ncgeo.protocols import all_classes, cross_dataset, domain_generalisation, long_tail
from peft_ncgeo.protocols.command_line import (
    model_and_processor,
    overrides,
    protocol_parser,
    read_recipes,
    read_source,
)

RECIPES = [Path(__file__).parent / "recipes" / "demo" / f"{name}.yaml" for name in ("ivlp", "prompt_ot", "budget")]


def of_vendor(dataset: Dataset, vendor: int, views: int) -> Dataset:
    """Return the demo's images of one vendor; each class has `views` images of each vendor, one vendor at a time."""
    return dataset.select([i for i in range(len(dataset)) if i // views % 2 == vendor])


def demo_sets(protocol: str) -> tuple[Dataset, Dataset, dict[str, Dataset]]:
    """Return training images, test images of the same classes, and targets."""
    other, splits = load_demo("development").splits, load_demo(shots=32).splits
    if protocol == "domain_generalisation":
        train, test = of_vendor(splits["train"], 0, 16), of_vendor(splits["base"], 0, 24)
        return train, test, {"emojione": of_vendor(splits["base"], 1, 24)}
    if protocol == "long_tail":
        return load_demo(shots=50).splits["train"], splits["base"], {}
    targets = {"new": splits["new"], "development": other["base"], "fashion_mnist": splits["fashion_mnist"]}
    return splits["train"], splits["base"], targets


def main() -> None:
    parser = protocol_parser(__doc__.splitlines()[0], "outputs/transfer", RECIPES)
    parser.add_argument("protocol", choices=["cross_dataset", "domain_generalisation", "long_tail", "all_classes"])
    parser.add_argument("--source", type=Path, help="a YAML file of examples/datasets; default: the demo")
    parser.add_argument("--targets", type=Path, nargs="+", default=[], help="YAML files to test on")
    parser.add_argument(
        "--imbalance_factors", type=float, nargs="+", help="default: the source's own; demo: 10 and 50"
    )
    args = parser.parse_args()
    model, processor = model_and_processor(args)
    template, shots, n_max, thresholds, factors = None, 16, None, "thirds", [10, 50]
    if args.source is None:
        train, test, targets = demo_sets(args.protocol)
    else:
        source = read_source(parser, args, args.source)
        train, test = (source.load(part, args.data_dir) for part in ("train", "test"))
        targets = {path.stem: DatasetSource.read(path).load("test") for path in args.targets}
        template, shots, n_max, thresholds = source.template, source.shots or 16, source.n_max, (20, 100)
        factors = [source.imbalance_factor or 100]
    common = {"seeds": args.seeds, "args": overrides(args)}
    output, recipes = args.output_dir / args.protocol, read_recipes(args, template)
    if args.protocol == "long_tail":
        results = long_tail(
            recipes,
            train,
            test,
            model,
            processor,
            output,
            imbalance_factors=args.imbalance_factors or factors,
            n_max=n_max,
            shuffle_classes=args.source is None,  # published tails follow the order of the labels
            thresholds=thresholds,
            **common,
        )
    elif args.protocol == "all_classes":
        tails = {f"{shots} shots": {"tau": 1.0, "n_max": shots}}
        results = all_classes(recipes, train, test, model, processor, output, tails=tails, **common)
    else:
        protocol = {"cross_dataset": cross_dataset, "domain_generalisation": domain_generalisation}[args.protocol]
        results = protocol(recipes, train, targets, model, processor, output, source=test, shots=shots, **common)
    print(f"{results.markdown()}\n\n{results.note}")


if __name__ == "__main__":
    main()
