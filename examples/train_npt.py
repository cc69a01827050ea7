"""NPT on a long tail: prompts that move texts and images to one simplex ETF, and how this changes the features.

    accelerate launch examples/train_npt.py
        the built-in demo at tau = 0.06 (16 images of the largest class, 1 of the smallest). It takes about a minute.

    accelerate launch examples/train_npt.py --output_dir outputs/own \
        --model_name_or_path openai/clip-vit-base-patch16 --dataset_name path/to/image_folder \
        --recipe examples/recipes/npt_v2.yaml
        your own model and images, with the paper's recipe. `--all_classes` trains and tests on all classes, not
        on half of them; a folder of two or three classes needs it.

`--recipe` accepts any other method of examples/recipes; Transformers' training arguments are accepted too.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import transformers
from datasets import Dataset, load_dataset
from own_images import LOSS_HELP, choose_loss
from peft import get_peft_model
from transformers import AutoModel, AutoProcessor, HfArgumentParser, PrinterCallback, set_seed

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments
from peft_ncgeo.data import base_new_split, class_counts, load_demo, load_images, long_tailed
from peft_ncgeo.evaluation import evaluate_groups
from peft_ncgeo.training import GeometryMonitor, parse_with_recipe

RECIPE = Path(__file__).parent / "recipes" / "demo" / "npt_v2.yaml"


@dataclass
class ScriptArguments:
    recipe: str = field(default=str(RECIPE), metadata={"help": "YAML file with prompts, losses and arguments."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "CLIP, SigLIP, ... Default: the demo's."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set or image folder."})
    tau: float = field(default=0.06, metadata={"help": "Size of the smallest class over the largest; 1: balanced."})
    shots: int = field(default=16, metadata={"help": "Training images of the largest class."})
    loss: str | None = field(default=None, metadata={"help": LOSS_HELP})
    all_classes: bool = field(default=False, metadata={"help": "Train and test on all classes, not on half of them."})
    batch_size: int = field(default=60, metadata={"help": "Training images a step, over all processes."})


def load_sets(script: ScriptArguments, seed: int, label_column: str) -> tuple[Dataset, dict[str, Dataset]]:
    """Load a long tail of the base classes, and test images of base and new classes; or both of all classes."""
    if script.dataset_name is None:
        splits = load_demo(shots=script.shots, seed=seed).splits
        train, test = splits["train"], {"base": splits["base"], "new": splits["new"]}
        if script.all_classes:  # the demo has training images only of these
            test = {"all": splits["base"]}
    else:
        read = partial(load_images, label_column=label_column) if Path(script.dataset_name).is_dir() else load_dataset
        train, test = (read(script.dataset_name, split=part) for part in ("train", "test"))
        if script.all_classes:
            test = {"all": test}
        else:
            train, test = base_new_split(train, label_column)["base"], dict(base_new_split(test, label_column))
    tail = {"tau": script.tau, "n_max": script.shots, "shuffle_classes": True}
    return long_tailed(train, **tail, seed=seed, label_column=label_column), test


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, GeometryTrainingArguments))
    parser.set_defaults(
        output_dir="outputs/npt", save_strategy="no", logging_strategy="epoch", per_device_eval_batch_size=256
    )
    (script, args), recipe = parse_with_recipe(parser, default=RECIPE)
    if recipe.config is None:
        raise SystemExit(f"Recipe {script.recipe} names no peft config; choose a recipe with the key peft.")
    args.share_batch(script.batch_size)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*all of them get prompts")  # the demo's towers have 3 and 4 layers

    set_seed(args.seed)
    train, test = load_sets(script, args.seed, args.label_column)
    if script.model_name_or_path is None:
        demo = load_demo()
        model, processor = demo.model, demo.processor
    else:
        model = AutoModel.from_pretrained(script.model_name_or_path)
        processor = AutoProcessor.from_pretrained(script.model_name_or_path)
    trainer = GeometryTrainer(
        model=get_peft_model(model, recipe.config()),
        args=args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=processor,
        losses=recipe.losses(),
        classification_loss=choose_loss(script.loss, recipe, train, args.label_column),
        callbacks=[GeometryMonitor(), *recipe.callbacks()],
    )
    trainer.remove_callback(PrinterCallback)
    with trainer.model.disable_adapter():
        before = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    after = trainer.evaluate()
    trained = "all" if script.all_classes else "base"
    output = trainer.predict(test[trained])  # all processes must call it
    if not args.should_save:
        return

    counts = class_counts(train, args.label_column)
    print(f"\n{recipe.name}: {len(train)} images, {max(counts)} to {min(counts)} a class")
    rows = {
        f"{trained} accuracy": f"{trained}_accuracy",
        f"{trained} balanced accuracy": f"{trained}_balanced_accuracy",
        "new accuracy": "new_accuracy",
        "harmonic mean": "harmonic_mean",
        f"text NC2, {trained}": f"{trained}_text_nc2",
        f"class means NC2, {trained}": f"{trained}_nc2",
        f"alignment of texts and means, {trained}": f"{trained}_nc3_cosine",
        f"modality gap, {trained}": f"{trained}_modality_gap",
    }
    print("| | zero-shot | tuned |\n|---|---|---|")
    for title, key in rows.items():
        if f"eval_{key}" in after:
            print(f"| {title} | {before[f'eval_{key}']:.3f} | {after[f'eval_{key}']:.3f} |")
    groups = evaluate_groups(output.predictions.argmax(-1), output.label_ids, counts, "thirds")
    shown = ", ".join(f"{group} {'-' if share is None else format(share, '.3f')}" for group, share in groups.items())
    print(f"Tuned, thirds of the {trained} classes by count: " + shown)
    print(f"Adapter in {args.output_dir}")


if __name__ == "__main__":
    main()
