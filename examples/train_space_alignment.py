"""Long-tailed image classification with space alignment: a ViT whose head is aligned with the class means.

    accelerate launch examples/train_space_alignment.py
        the built-in photographs at imbalance factor 100 (250 images of the largest class, 2 of the smallest), and the
        demo's ViT with LoRA and a balanced loss: accuracy and alignment before and after, and a figure. It takes a
        minute.

    accelerate launch examples/train_space_alignment.py --loss ce
        the same with cross-entropy; here alignment makes up for a part of the missing balance.

    accelerate launch examples/train_space_alignment.py --align slerp
        the same with one of the paper's three methods during training: reg, slerp or proj.

    accelerate launch examples/train_space_alignment.py --output_dir outputs/own \
        --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name path/to/image_folder \
        --recipe examples/recipes/images/space_alignment.yaml --imbalance_factor 0
        your own model and images, unchanged (an imbalance factor of 0 draws no tail).

`--recipe` accepts any PEFT config that trains the head; Transformers' training arguments are accepted too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from own_images import LOSS_HELP, choose_loss, load_model, load_parts
from peft import get_peft_model
from transformers import HfArgumentParser, PrinterCallback, set_seed

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments
from peft_ncgeo.data import class_counts, long_tailed
from peft_ncgeo.evaluation import evaluate_groups
from peft_ncgeo.losses import SpaceAlignment
from peft_ncgeo.plots import plot_alignment
from peft_ncgeo.training import (
    GeometryMonitor,
    GradientProjection,
    SlerpAlignment,
    align_classifier,
    parse_with_recipe,
    sweep_alignment,
)

RECIPE = Path(__file__).parent / "recipes" / "images" / "demo" / "vit_lora.yaml"
ALIGNMENTS: dict[str, Callable[[], dict[str, list]]] = {
    "none": dict,
    "reg": lambda: {"losses": [SpaceAlignment(weight=1.0)]},
    "slerp": lambda: {"callbacks": [SlerpAlignment()]},
    "proj": lambda: {"callbacks": [GradientProjection()]},
}


@dataclass
class ScriptArguments:
    recipe: str = field(default=str(RECIPE), metadata={"help": "YAML file with adapter, losses and arguments."})
    align: str = field(default="none", metadata={"help": "Alignment during training: none, reg, slerp or proj."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "An image model. Default: the demo's ViT."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set or image folder with a test part."})
    imbalance_factor: float = field(
        default=100.0, metadata={"help": "Size of the largest class over the smallest; 0: all images."}
    )
    n_max: int | None = field(default=None, metadata={"help": "Images of the largest class. Default: all."})
    loss: str | None = field(default=None, metadata={"help": LOSS_HELP})
    metric: str = field(
        default="balanced_accuracy",
        metadata={"help": "Validation metric that chooses the fraction: balanced_accuracy or accuracy."},
    )
    batch_size: int = field(default=64, metadata={"help": "Training images a step, over all processes."})


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, GeometryTrainingArguments))
    parser.set_defaults(
        output_dir="outputs/space_alignment_run",
        save_strategy="no",
        logging_strategy="epoch",
        per_device_eval_batch_size=256,
    )
    (script, args), recipe = parse_with_recipe(parser, default=RECIPE)
    if recipe.config is None:
        raise SystemExit(f"Recipe {script.recipe} names no peft config; choose a recipe with the key peft.")
    if script.align not in ALIGNMENTS:
        raise SystemExit(f"--align {script.align} must be one of {', '.join(ALIGNMENTS)}.")
    if script.n_max and not script.imbalance_factor:
        raise SystemExit("--n_max needs a tail; pass --imbalance_factor too.")
    args.share_batch(script.batch_size)
    transformers.logging.set_verbosity_error()

    set_seed(args.seed)
    images = load_parts(script.dataset_name, args.label_column)
    if script.imbalance_factor:
        tail = {"imbalance_factor": script.imbalance_factor, "n_max": script.n_max, "shuffle_classes": True}
        images["train"] = long_tailed(images["train"], **tail, seed=args.seed, label_column=args.label_column)
    names = images["train"].features[args.label_column].names
    model, processor = load_model(script.model_name_or_path, names)
    extra = ALIGNMENTS[script.align]()
    trainer = GeometryTrainer(
        model=get_peft_model(model, recipe.config()),
        args=args,
        train_dataset=images["train"],
        eval_dataset=images["test"],
        processing_class=processor,
        losses=[*recipe.losses(), *extra.get("losses", [])],
        classification_loss=choose_loss(script.loss, recipe, images["train"], args.label_column),
        callbacks=[GeometryMonitor(), *recipe.callbacks(), *extra.get("callbacks", [])],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    counts = class_counts(images["train"], args.label_column)

    def measure() -> dict[str, float | None]:
        output = trainer.predict(images["test"])
        groups = evaluate_groups(output.predictions.argmax(-1), output.label_ids, counts, "thirds")
        shown = ("accuracy", "alignment", "nc1", "nc2", "nc3", "exponent_ratio")
        return {**{key: output.metrics.get(f"test_{key}") for key in shown}, **groups}

    columns = {"trained": measure()}
    columns_of = {"image_column": args.image_column, "label_column": args.label_column}
    sweep = sweep_alignment(
        trainer.model,
        images["train"],
        images["validation"],
        processing_class=processor,
        metric=script.metric,
        **columns_of,
    )
    aligned = align_classifier(trainer.model, images["train"], sweep, processor, images["validation"], **columns_of)
    columns[f"aligned by {sweep.fraction:g}"] = measure()
    trainer.save_model()  # saves the aligned head
    if not args.should_save:
        return

    size = f"{len(images['train'])} images, {max(counts)} to {min(counts)} a class"
    print(f"\n{recipe.name}, --align {script.align}: {size}")
    print(f"| test images | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for key in columns["trained"]:
        cells = ["-" if column[key] is None else f"{column[key]:.3f}" for column in columns.values()]
        print(f"| {key} | {' | '.join(cells)} |")
    print(f"Validation accuracy {aligned.accuracy_before:.3f}, aligned {aligned.accuracy_after:.3f}.")
    print(f"The fraction {sweep.fraction:g} was {sweep.basis}:")
    print(", ".join(f"{row['fraction']:g}: {row[script.metric]:.3f}" for row in sweep))
    figure = Path(args.output_dir) / "alignment.png"
    plot_alignment((aligned.means, aligned.original), (aligned.means, aligned.weight), figure, names)
    print(f"Adapter and figure in {args.output_dir}")


if __name__ == "__main__":
    main()
