"""Image classification by fixed prototypes: a ViT learns features close to class vectors that are fixed in advance.

    accelerate launch examples/train_prototypes.py
        the built-in photographs, five classes of 250 images and five of 25, and the demo's ViT with vision prompts and
        ETF prototypes: accuracy on large and small classes, and the distance of the features from the prototypes'
        geometry.

    accelerate launch examples/train_prototypes.py --geometry minority_margin --ratio 100
        wider angles between the classes with few images.

    accelerate launch examples/train_prototypes.py --output_dir outputs/own --ratio 0 \
        --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name path/to/image_folder \
        --recipe examples/recipes/images/prototypes.yaml
        your own model and images, unchanged (a ratio of 0 removes nothing).

`--recipe` accepts any file with a PrototypeConfig; Transformers' training arguments are accepted too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from own_images import load_model, load_parts
from peft import get_peft_model
from transformers import HfArgumentParser, PrinterCallback, set_seed

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments, PrototypeConfig
from peft_ncgeo.data import class_counts, step_imbalanced
from peft_ncgeo.metrics.accuracy import accuracy
from peft_ncgeo.models.heads import linear_classifier
from peft_ncgeo.plots import plot_alignment
from peft_ncgeo.training import GeometryMonitor, parse_with_recipe

RECIPE = Path(__file__).parent / "recipes" / "images" / "demo" / "prototypes.yaml"


@dataclass
class ScriptArguments:
    recipe: str = field(default=str(RECIPE), metadata={"help": "YAML file with a PrototypeConfig and arguments."})
    geometry: str | None = field(default=None, metadata={"help": "etf or minority_margin. Default: the recipe's."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "An image model. Default: the demo's ViT."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set or image folder with a test part."})
    ratio: float = field(default=10.0, metadata={"help": "Images of a large class per image of a small one; 0: all."})
    batch_size: int = field(default=64, metadata={"help": "Training images a step, over all processes."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, GeometryTrainingArguments))
    parser.set_defaults(
        output_dir="outputs/prototypes", save_strategy="no", logging_strategy="epoch", per_device_eval_batch_size=256
    )
    (script, args), recipe = parse_with_recipe(parser, default=RECIPE)
    config = recipe.config() if recipe.config else None
    if not isinstance(config, PrototypeConfig):
        raise SystemExit(f"Recipe {script.recipe} names no PrototypeConfig; choose a recipe that does.")
    args.share_batch(script.batch_size)
    transformers.logging.set_verbosity_error()

    set_seed(args.seed)
    images = load_parts(script.dataset_name, args.label_column)
    train, test = images["train"], images["test"]
    if script.ratio:
        train = step_imbalanced(train, script.ratio, seed=args.seed, label_column=args.label_column)
    names, counts = train.features[args.label_column].names, class_counts(train, args.label_column)
    config = replace(config, class_counts=counts.tolist(), geometry=script.geometry or config.geometry)
    model, processor = load_model(script.model_name_or_path, names)
    monitor = GeometryMonitor()
    trainer = GeometryTrainer(
        model=get_peft_model(model, config),
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        losses=recipe.losses(),
        classification_loss=recipe.classification_loss(),
        callbacks=[monitor, *recipe.callbacks()],
    )
    trainer.remove_callback(PrinterCallback)

    def measure() -> tuple[dict[str, float], torch.Tensor]:
        output = trainer.predict(test)
        right = output.predictions.argmax(-1) == output.label_ids
        large = counts[output.label_ids] == counts.max()
        shown = {"test images": accuracy(output.predictions.argmax(-1), output.label_ids)}
        if not large.all():
            shown |= {"of large classes": right[large].mean(), "of small classes": right[~large].mean()}
        geometry = {
            "distance from the geometry": output.metrics["test_gram_distance"],
            "alignment with the prototypes": output.metrics["test_alignment"],
            "NC1": output.metrics["test_nc1"],
        }
        return {**shown, **geometry}, monitor.class_means

    before, means_before = measure()
    trainer.train()
    after, means_after = measure()
    trainer.save_model()
    if not args.should_save:
        return

    print(f"\n{recipe.name}, {config.geometry}: {len(train)} images, {max(counts)} to {min(counts)} a class")
    print("| | before | after |\n|---|---|---|")
    for title in before:
        print(f"| {title} | {before[title]:.3f} | {after[title]:.3f} |")
    prototypes = linear_classifier(trainer.model).weight.detach().cpu()
    figure = Path(args.output_dir) / "prototypes.png"
    plot_alignment((means_before, prototypes), (means_after, prototypes), figure, names)
    print(f"Adapter and figure in {args.output_dir}")


if __name__ == "__main__":
    main()
