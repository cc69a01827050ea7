"""Model cards, one for each method, of adapters trained on the built-in images: `hub_cards/<method>/`.

    python examples/make_cards.py
        writes every card from its record, and first trains the methods that have no record (about a quarter of an hour
        for all of them).

    python examples/make_cards.py --train npt copa
        trains these methods again, from three seeds, and writes new records and figures.

A record holds the content of a card as JSON; the figure is drawn after training.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import transformers
from peft import get_peft_model
from transformers import AutoModel, PrinterCallback, set_seed

from peft_ncgeo import CoPAConfig, GeometryTrainer, GeometryTrainingArguments, PrototypeConfig, adapt
from peft_ncgeo.data import (
    class_counts,
    few_shot,
    load_demo,
    load_few_shot_domains,
    load_image_demo,
    long_tailed,
    step_imbalanced,
)
from peft_ncgeo.hub import create_card, draw_geometry
from peft_ncgeo.plots import plot_alignment  # noqa: F401  without matplotlib, fails here, not after training
from peft_ncgeo.training import Recipe, SlerpAlignment, TrainingRecord, record_few_shot

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "examples" / "recipes"
SEEDS = (1, 2, 3)


class Card(NamedTuple):
    """Training of a card's adapter, and card arguments that the record does not hold."""

    train: Callable[[int], TrainingRecord]
    base: str
    data: str
    language: str | None = "en"


def train_clip(recipe_name: str, seed: int) -> TrainingRecord:
    """Train a recipe of the demo on a tail of 16 images down to 1 of 30 concepts; 30 others are new."""
    splits, processor, model = load_demo(seed=seed)
    tail = long_tailed(splits["train"], tau=0.06, shuffle_classes=True, seed=seed)
    test = {"base": splits["base"], "new": splits["new"]}
    return train(Recipe.read(RECIPES / "demo" / f"{recipe_name}.yaml"), model, processor, tail, test, seed)


def train_space_alignment(seed: int) -> TrainingRecord:
    """Train LoRA on the demo's ViT and photographs, 200 down to 2 of a class, and rotate the head during training."""
    splits, processor, model = load_image_demo()
    tail = long_tailed(splits["train"], imbalance_factor=100, n_max=200, shuffle_classes=True, seed=seed)
    recipe = Recipe.read(RECIPES / "images" / "demo" / "vit_lora.yaml")
    recipe.callbacks = lambda: [SlerpAlignment()]
    return train(recipe, model, processor, tail, {"test": splits["test"]}, seed)


def train_prototypes(seed: int) -> TrainingRecord:
    """Train with fixed prototypes on the demo's photographs; half of the classes have a tenth of the images."""
    splits, processor, model = load_image_demo()
    images = step_imbalanced(splits["train"], 10, seed=seed)
    recipe = Recipe.read(RECIPES / "images" / "demo" / "prototypes.yaml")
    config: Any = recipe.config() if recipe.config else None
    assert isinstance(config, PrototypeConfig)
    recipe.config = lambda: replace(config, class_counts=class_counts(images).tolist())
    return train(recipe, model, processor, images, {"test": splits["test"]}, seed)


def train(recipe: Recipe, model: Any, processor: Any, images: Any, test: Any, seed: int) -> TrainingRecord:
    set_seed(seed)
    options = dict(recipe.args)
    with TemporaryDirectory() as folder:
        args = GeometryTrainingArguments(
            output_dir=folder,
            seed=seed,
            data_seed=seed,
            per_device_train_batch_size=options.pop("batch_size"),
            per_device_eval_batch_size=256,
            save_strategy="no",
            report_to="none",
            **options,
        )
        trainer = GeometryTrainer(
            model=get_peft_model(model, recipe.config() if recipe.config else None),
            args=args,
            train_dataset=images,
            eval_dataset=test,
            processing_class=processor,
            losses=recipe.losses(),
            classification_loss=recipe.classification_loss(),
            callbacks=recipe.callbacks(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.record()


def adapt_copa(seed: int) -> TrainingRecord:
    """Adapt heads to five images of each handwritten digit; the demo's ResNet was pre-trained without digits."""
    images = load_few_shot_domains()["mnist"].images
    rows = images.add_column("row", np.arange(len(images)))
    support = few_shot(rows, 5, seed)
    rest = images.select(np.setdiff1d(np.arange(len(images)), support["row"][:]))
    names = images.features["label"].names
    model = get_peft_model(AutoModel.from_pretrained(demo_folder("mini_resnet")), CoPAConfig())
    classifier = adapt(model, support["image"][:], [names[label] for label in support["label"]])
    record = record_few_shot(classifier, rest, class_counts(support).tolist())
    record.seed = seed
    return record


def demo_folder(name: str) -> str:
    from peft_ncgeo.data.demo import ASSETS

    return str(ASSETS / name)


EMOJI = "drawings of 30 concepts, the peft_ncgeo demo"
PHOTOGRAPHS = "Fashion-MNIST, the slice of the peft_ncgeo demo"
CARDS = {
    "npt": Card(lambda seed: train_clip("npt_v2", seed), "user/mini-clip", EMOJI),
    "cpt": Card(lambda seed: train_clip("cpt", seed), "user/mini-clip", EMOJI),
    "prompt_ot": Card(lambda seed: train_clip("prompt_ot", seed), "user/mini-clip", EMOJI),
    "budget": Card(lambda seed: train_clip("budget", seed), "user/mini-clip", EMOJI),
    "space_alignment": Card(train_space_alignment, "user/mini-vit", PHOTOGRAPHS),
    "prototypes": Card(train_prototypes, "user/mini-vit", PHOTOGRAPHS),
    "copa": Card(adapt_copa, "user/mini-resnet", "MNIST, 2,000 of its images", language=None),
}


def make_record(name: str, folder: Path) -> None:
    """Train from every seed; write the first record, with the rows of all seeds, and its figure."""
    records = []
    for seed in SEEDS:
        print(f"{name}, seed {seed}", flush=True)
        records.append(CARDS[name].train(seed))
    first = records[0]
    first.base_model, first.runs = CARDS[name].base, [record.row() for record in records]
    folder.mkdir(parents=True, exist_ok=True)
    draw_geometry(first, folder)
    (folder / "record.json").write_text(json.dumps(first.to_dict(), indent=1) + "\n", encoding="utf-8")


def render(name: str, folder: Path) -> str:
    """Return the card's Markdown, from the record in its folder."""
    record = TrainingRecord.from_dict(json.loads((folder / "record.json").read_text(encoding="utf-8")))
    card = create_card(
        record=record,
        repo_id=f"user/{name.replace('_', '-')}-demo",
        license="apache-2.0",
        dataset_name=CARDS[name].data,
        language=CARDS[name].language,
        figure="geometry.png" if (folder / "geometry.png").exists() else None,
    )
    return str(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", nargs="*", choices=list(CARDS), default=[], help="methods to train again")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "hub_cards")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*all of them get prompts")  # the demo's towers have 3 and 4 layers
    for name in CARDS:
        folder = args.output_dir / name
        if name in args.train or not (folder / "record.json").exists():
            make_record(name, folder)
        (folder / "README.md").write_text(render(name, folder), encoding="utf-8")
    print(f"{len(CARDS)} cards in {args.output_dir}")


if __name__ == "__main__":
    main()
