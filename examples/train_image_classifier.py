"""An image classifier from any image tower, tuned with LoRA; by default CLIP's, with a head that starts from texts.

    accelerate launch examples/train_image_classifier.py
        the built-in demo's mini-CLIP on 30 concepts, 16 images each: accuracy before (zero-shot) and after tuning. It
        takes a minute.

    accelerate launch examples/train_image_classifier.py --init random --head linear
        the same tower with a new linear head.

    accelerate launch examples/train_image_classifier.py --output_dir outputs/own \
        --model_name_or_path facebook/dinov2-small --dataset_name path/to/image_folder --init means
        your own backbone and images; the head starts at the class means of the training images.

    accelerate launch examples/train_image_classifier.py --output_dir outputs/lift \
        --model_name_or_path openai/clip-vit-base-patch16 --dataset_name path/to/image_folder \
        --recipe examples/recipes/images/lift_imagenet_lt.yaml
        LIFT: bottleneck adapters, logit adjustment, and five crops of each test image; there is a recipe for each data
        set. `--imbalance_factor 100` draws a long tail from balanced images, as for CIFAR-100-LT.

The folder `base` beside the adapter holds the classifier before training; `load_adapter` and `PeftModel` put the
adapter on it. Transformers' training arguments are accepted too.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from own_images import LOSS_HELP, choose_loss, load_parts
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoProcessor, HfArgumentParser, PrinterCallback, set_seed

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments, ImageClassifier, NPTConfig
from peft_ncgeo.data import load_demo, long_tailed
from peft_ncgeo.training import Recipe, parse_with_recipe

ADAPTERS = {
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear", exclude_modules=["projection", "classifier"]),
    "prompts": lambda: NPTConfig.vpt(vision_depth=12),
}


@dataclass
class ScriptArguments:
    model_name_or_path: str | None = field(default=None, metadata={"help": "Any image model. Default: the demo's."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set or image folder with a test part."})
    head: str = field(default="cosine", metadata={"help": "linear or cosine."})
    init: str = field(
        default="texts",
        metadata={"help": "Start of the head: random, texts (of a dual encoder) or class means (means)."},
    )
    projected: bool = field(default=True, metadata={"help": "Take a CLIP's feature after its projection."})
    adapter: str = field(default="lora", metadata={"help": "lora or prompts; a recipe's adapter is used instead."})
    recipe: str | None = field(default=None, metadata={"help": "YAML file with adapter, losses and arguments."})
    imbalance_factor: float = field(
        default=0.0, metadata={"help": "Size of the largest class over the smallest; 0: all images."}
    )
    loss: str | None = field(default=None, metadata={"help": LOSS_HELP})
    batch_size: int = field(default=60, metadata={"help": "Training images a step, over all processes."})


def load(script: ScriptArguments, label_column: str) -> tuple[Any, Any, Any]:
    """Load the parts `train` and `test`, the backbone, and its processor."""
    demo = load_demo() if script.dataset_name is None or script.model_name_or_path is None else None
    parts: Any
    if script.dataset_name is not None:
        parts = load_parts(script.dataset_name, label_column)
    else:
        parts = {"train": demo.splits["train"], "test": demo.splits["base"]}
    if script.model_name_or_path is None:
        return parts, demo.model, demo.processor
    model = AutoModel.from_pretrained(script.model_name_or_path)
    return parts, model, AutoProcessor.from_pretrained(script.model_name_or_path)


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, GeometryTrainingArguments))
    parser.set_defaults(
        output_dir="outputs/image_classifier",
        num_train_epochs=10,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_strategy="epoch",
        per_device_eval_batch_size=256,
    )
    (script, args), recipe = parse_with_recipe(parser)
    recipe = recipe or Recipe(script.adapter, ADAPTERS.get(script.adapter))
    if recipe.config is None:
        raise SystemExit(
            f"--adapter {recipe.name} must be one of {', '.join(ADAPTERS)}; or pass --recipe with a peft config."
        )
    args.share_batch(script.batch_size)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*all of them get prompts")  # the demo's tower has 4 layers

    set_seed(args.seed)
    parts, backbone, processor = load(script, args.label_column)
    if script.imbalance_factor:
        tail = {"imbalance_factor": script.imbalance_factor, "seed": args.seed, "label_column": args.label_column}
        parts["train"] = long_tailed(parts["train"], **tail)
    base = ImageClassifier.from_backbone(
        backbone,
        parts["train"].features[args.label_column].names,
        head=script.head,
        init=script.init,
        processor=processor,
        projected=script.projected,
        dataset=parts["train"] if script.init == "means" else None,
        label_column=args.label_column,
    )
    folder = Path(args.output_dir) / "base"
    with args.main_process_first():
        if args.should_save:
            base.save_pretrained(folder)
            processor.save_pretrained(folder)
    base = ImageClassifier.from_pretrained(folder)  # so that the adapter names the folder as its base
    config = recipe.config()
    config.modules_to_save = ["classifier"]
    trainer = GeometryTrainer(
        model=get_peft_model(base, config),
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=processor,
        losses=recipe.losses(),
        classification_loss=choose_loss(script.loss, recipe, parts["train"], args.label_column),
        callbacks=recipe.callbacks(),
    )
    trainer.remove_callback(PrinterCallback)
    with trainer.model.disable_adapter():
        before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model()
    if not args.should_save:
        return

    print(f"\n{script.head} head from {script.init}, {recipe.name}: {len(parts['train'])} images")
    print("| | before | after |\n|---|---|---|")
    for title, key in {"accuracy": "eval_accuracy", "balanced accuracy": "eval_balanced_accuracy"}.items():
        print(f"| {title} | {before[key]:.3f} | {after[key]:.3f} |")
    print(f"Adapter in {args.output_dir}, its base in {folder}")


if __name__ == "__main__":
    main()
