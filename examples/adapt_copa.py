"""Few-shot classification with CoPA: nearest prototype, URL, CoPA and CoPA with residual adapters, episode by episode.

    python examples/adapt_copa.py
        the demo's five domains and its ResNet: 300 episodes each, 60 with residual adapters. This takes an hour and
        more on one core; without residual adapters (--methods "nearest prototype" URL CoPA) it takes minutes. A run
        that was stopped continues. Several runs with different --domains share the work; one more run without
        --domains collects their results.

    python examples/adapt_copa.py --shots 5
    python examples/adapt_copa.py --ways 5 --shots 1 --backbone vit

    python examples/adapt_copa.py --model_name_or_path facebook/dinov2-small --dataset_name path/to/folder other/set
        your own backbone on your own data sets (from the Hub, or image folders), on the part "test" if there is one.

    python examples/adapt_copa.py --tune
        learning rates on the demo's development domains; the rates in this file were chosen in this way.

One setting is used for all domains. The table says which domains the backbone was pre-trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, load_dataset
from torch import nn
from transformers import AutoImageProcessor, AutoModel

from peft_ncgeo.data import load_demo, load_few_shot_domains, load_image_demo, load_images
from peft_ncgeo.plots import plot_gaps
from peft_ncgeo.protocols import EpisodeResults, FewShotMethod, few_shot

NEAREST = FewShotMethod("nearest prototype", settings={"steps": 0})
URL = {"steps": 40, "weight_decay": 0.0, "optimizer": torch.optim.Adadelta}
# --tune chose the rates, by the best mean over the demo's three backbones; CoPA's equal the published ones.
# The demo's images are small: each support set fits into one pass. Your own images use adapt's batch size.
ADAPTERS = FewShotMethod("CoPA + adapters", {"residual_adapters": True}, {"batch_size": 512}, episodes=60)
METHODS = [
    NEAREST,
    FewShotMethod("URL", {"shared": True}, {**URL, "lr": 0.1}),
    FewShotMethod("URL, lr 1", {"shared": True}, {**URL, "lr": 1.0}),  # URL's authors use it on unseen domains
    FewShotMethod("CoPA"),
    ADAPTERS,
]
PAIRS = [("CoPA", "URL"), ("CoPA", "URL, lr 1"), ("CoPA", "nearest prototype"), (ADAPTERS.name, "CoPA")]
GRID = [
    NEAREST,
    *(FewShotMethod(f"URL, lr {rate}", {"shared": True}, {**URL, "lr": rate}) for rate in (0.03, 0.1, 0.3, 1.0)),
    *(FewShotMethod(f"CoPA, lr {rate}", settings={"lr": rate}) for rate in (0.0003, 0.001, 0.003, 0.01)),
]
ADAPTER_GRID = [
    FewShotMethod(
        f"CoPA + adapters, adapter_lr {rate}",
        {"residual_adapters": True},
        {"adapter_lr": rate, "batch_size": 512},
        episodes=10,
    )
    for rate in (0.1, 1.0)
]
BACKBONES: dict[str, Callable[[], Any]] = {
    "resnet": lambda: load_image_demo("resnet"),
    "vit": lambda: load_image_demo("vit"),
    "clip": load_demo,
}


def own_domains(names: Sequence[str], label_column: str) -> dict[str, Dataset]:
    """Return the "test" part of each data set, else "validation", else "train"."""
    domains = {}
    for name in names:
        folder = Path(name).is_dir()
        parts = load_images(name) if folder else load_dataset(name)
        if isinstance(parts, Dataset):  # a folder of classes
            parts = {"train": parts}
        part = next((part for part in ("test", "validation", "train") if part in parts), None)
        if part is None:
            raise SystemExit(f"{name} has no part named test, validation or train; it has {sorted(parts)}.")
        if label_column not in parts[part].column_names:
            raise SystemExit(f"{name} has no column {label_column!r} among {parts[part].column_names}.")
        if Path(name).name in domains:
            raise SystemExit(f"Two data sets are called {Path(name).name!r}; rename one of the folders.")
        domains[Path(name).name] = parts[part]
    return domains


def load_backbone(args: argparse.Namespace) -> tuple[Callable[[], nn.Module], Any]:
    """Return a function that makes the backbone, and its image processor."""
    if args.model_name_or_path is None:
        return (lambda: BACKBONES[args.backbone]().model), BACKBONES[args.backbone]().processor
    name = args.model_name_or_path
    return (lambda: AutoModel.from_pretrained(name)), AutoImageProcessor.from_pretrained(name)


def seen_domains(args: argparse.Namespace, domains: dict[str, Dataset]) -> list[str]:
    """Return the domains that the demo's backbones were pre-trained on; none for other backbones."""
    if args.model_name_or_path or args.dataset_name:
        return []
    seen = {name for name, domain in load_few_shot_domains().items() if domain.seen}
    if args.backbone == "clip":
        seen.add("fashion_mnist")  # it saw other photographs of this data set
    return [name for name in domains if name in seen]


def report(results: EpisodeResults, folder: Path) -> None:
    """Print the tables; save results and figure, unless the folder already holds those of a larger run."""
    print(
        "\n"
        + "\n\n".join(
            [*results.tables(PAIRS, [ADAPTERS.name]), results.on_common_episodes().geometry_table(), results.note]
        )
    )
    path = folder / "results.json"
    kept = EpisodeResults.load(path) if path.exists() else results
    if not (set(kept.methods) <= set(results.methods) and set(kept.domains) <= set(results.domains)):
        print(f"{path} holds other methods or domains too, so it is kept; to update it, run all of them together.")
        return
    results.save(folder)
    plot_gaps(results, folder / "gap.png")
    print(f"Results and figure in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/adapt_copa"))
    parser.add_argument("--backbone", choices=sorted(BACKBONES), default="resnet", help="one of the demo's backbones")
    parser.add_argument("--model_name_or_path", help="a backbone of your own")
    parser.add_argument("--dataset_name", nargs="+", help="data sets of your own, instead of the demo's domains")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--domains", nargs="+", help="only these domains")
    parser.add_argument("--methods", nargs="+", help="only these methods", choices=[method.name for method in METHODS])
    parser.add_argument("--episodes", type=int, help="episodes of each domain; default 300, with --tune 60")
    parser.add_argument("--ways", type=int, help="number of classes in each episode; default: it varies")
    parser.add_argument("--shots", type=int, help="support images of each class in an episode; default: it varies")
    parser.add_argument("--seed", type=int, help="seed of the episodes; default 0, with --tune 7")
    parser.add_argument("--tune", action="store_true", help="compare learning rates on the development domains")
    args = parser.parse_args()
    if args.tune and (args.dataset_name or args.model_name_or_path or args.methods):
        parser.error(
            "--tune uses the demo's development domains, the demo's backbones and methods of its own; leave out "
            "--dataset_name, --model_name_or_path and --methods."
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    model, processor = load_backbone(args)
    split = "development" if args.tune else "report"
    domains = {name: domain.images for name, domain in load_few_shot_domains(split).items()}
    if args.dataset_name:
        domains = own_domains(args.dataset_name, args.label_column)
    if unknown := set(args.domains or ()) - set(domains):
        raise SystemExit(f"There is no domain {sorted(unknown)[0]!r}; there are {', '.join(domains)}.")
    domains = {name: images for name, images in domains.items() if args.domains is None or name in args.domains}
    methods = [method for method in METHODS if args.methods is None or method.name in args.methods]
    if args.tune:
        methods = GRID + ADAPTER_GRID * (args.backbone == "resnet")
    if args.dataset_name or args.model_name_or_path:
        methods = [replace(m, settings={}) if m is ADAPTERS else m for m in methods]
    seed = (7 if args.tune else 0) if args.seed is None else args.seed
    setting = f"{args.ways or 'any'}-way-{args.shots or 'any'}-shot"
    backbone = Path(args.model_name_or_path or args.backbone).name
    folder = args.output_dir / ("tune" if args.tune else "") / backbone / setting
    results = few_shot(
        methods,
        domains,
        model,
        processor,
        folder,
        args.episodes or (60 if args.tune else 300),
        seen_domains(args, domains),
        ways=args.ways,
        shots=args.shots,
        seed=seed,
        label_column=args.label_column,
    )
    results.note = (
        f"{backbone}, {setting} episodes, seed {seed}; ± is the 95 % interval over episodes. Seconds are CPU "
        f"seconds. torch {torch.__version__}, {torch.get_num_threads()} thread(s)."
    )
    if args.tune:
        accuracies = {method.name: results.mean(results.domains, method.name)[0] for method in methods}
        against = {
            m.name: results.difference(results.domains, m.name, "CoPA, lr 0.001") for m in ADAPTER_GRID if m in methods
        }
        log = {"note": results.note, "mean accuracy": accuracies, "paired with CoPA, lr 0.001": against}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tuned.json").write_text(json.dumps(log, indent=1) + "\n")
        print(results.accuracy_table())
        return
    report(results, folder)


if __name__ == "__main__":
    main()
