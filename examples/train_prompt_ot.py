"""Prompt-OT from base to new classes, beside zero-shot CLIP, CoOp, deep prompts without transport, and ours.

    accelerate launch examples/train_prompt_ot.py
        trains on the built-in demo (minutes on two CPU cores), prints a table and saves every adapter.

    accelerate launch examples/train_prompt_ot.py \
        --model_name_or_path openai/clip-vit-base-patch16 --dataset_name path/to/image_folder
        does the same on your own model and data (a Hub data set or an image folder), with the paper's recipe.
        `--all_classes` trains and tests on all classes; a folder of two or three classes needs it.

    accelerate launch examples/train_prompt_ot.py --recipe examples/recipes/demo/ot_budget.yaml
        trains a recipe; other arguments of the command line override it.

Transformers' training arguments are accepted too; `--help` lists them.
"""

from __future__ import annotations

import json
import math
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, load_dataset
from peft import PeftConfig, get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    AutoProcessor,
    HfArgumentParser,
    PreTrainedModel,
    PrinterCallback,
    ProcessorMixin,
    TrainerCallback,
    set_seed,
)

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments, NPTConfig, ZeroShotClassifier
from peft_ncgeo.classifiers.heads import FeatureHead
from peft_ncgeo.data import base_new_split, few_shot, load_demo, load_images
from peft_ncgeo.data.sampling import label_array
from peft_ncgeo.files import file_name, write_whole
from peft_ncgeo.loading.load import HEAD_FOLDER
from peft_ncgeo.losses import CrossEntropy, OTPreservation, Regularizer
from peft_ncgeo.metrics.accuracy import accuracy, balanced_accuracy, harmonic_mean
from peft_ncgeo.protocols.fitted_heads import FittedHead
from peft_ncgeo.training import Recipe, parse_with_recipe, train_stages

# Chosen on the demo's development split, since the mini-CLIP with AdamW differs much from the paper's setting.
DEMO = {
    "num_train_epochs": 15,
    "batch_size": 60,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.0,
}
# arXiv 2503.08906; evaluated at the last epoch instead of epoch 31
PAPER = {
    "num_train_epochs": 40,
    "batch_size": 4,
    "learning_rate": 0.005,
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "weight_decay": 5e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1 / 40,
    "augmentation": "crop_flip",
}


@dataclass
class ScriptArguments:
    recipe: str | None = field(default=None, metadata={"help": "YAML file to train instead of --methods."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "CLIP, SigLIP, ... Default: the demo's."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set or image folder."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, if it has several."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to draw the shots from."})
    test_split: str = field(default="test", metadata={"help": "Split to evaluate."})
    kept_dataset_name: str | None = field(
        default=None, metadata={"help": "Another data set, to measure how much knowledge is kept."}
    )
    demo_split: str = field(default="report", metadata={"help": "'development' to choose hyper-parameters."})
    batch_size: int = field(default=60, metadata={"help": "Training images a step, over all processes."})
    shots: int = field(default=16, metadata={"help": "Training images of each trained class."})
    all_classes: bool = field(default=False, metadata={"help": "Train and test on all classes, not on half of them."})
    seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds; each method runs once with each."}
    )
    methods: list[str] | None = field(
        default=None,
        metadata={"help": "Rows of the table: zero-shot, coop, deep, ot-weight, ot-budget; lora-budget on the demo."},
    )
    ot_weight: float = field(
        default=10.0, metadata={"help": "Weight of the transport term, for ot-weight; the paper's is 10."}
    )
    ot_budget: float = field(default=0.05, metadata={"help": "Limit of the features' drift (0 to 4), for ot-budget."})
    lora_epochs: float = field(
        default=10, metadata={"help": "Epochs of lora-budget. Its recipe has 60; 10 keep the demo short."}
    )


@dataclass
class Method:
    title: str
    config: Callable[[], PeftConfig] | None
    losses: Callable[[], list[Regularizer]] = list
    classification_loss: Callable[[], nn.Module | None] = CrossEntropy
    callbacks: Callable[[], list[TrainerCallback]] = list
    head: Callable[[], FeatureHead] | None = None
    stages: Recipe | None = None
    args: dict[str, Any] = field(default_factory=dict)  # of every stage, in place of the recipe's

    @classmethod
    def from_recipe(cls, title: str, recipe: Recipe, **args: Any) -> Method:
        first, stages = (recipe.stages[0], replace(recipe, head=None)) if recipe.stages else (recipe, None)
        parts = (first.config, recipe.losses, recipe.classification_loss, recipe.callbacks)
        return cls(title, *parts, recipe.head, stages, args)

    def epochs(self, default: float) -> float:
        """Return the epochs of one run, over all stages; `default` for a method without arguments of its own."""
        if self.stages is None:
            return default if self.config is not None else 0
        settings = [{**self.stages.args, **stage.args, **self.args} for stage in self.stages.stages]
        return sum(own.get("num_train_epochs", default) for own in settings)


@dataclass
class Task:
    model: PreTrainedModel
    processor: ProcessorMixin
    train: Dataset
    eval_sets: dict[str, Dataset]


class EpochBar(TrainerCallback):
    """Progress bar over the epochs of all runs."""

    def __init__(self, total: int, disable: bool) -> None:
        self.bar = tqdm(total=total, unit="epoch", disable=disable)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.bar.update(1)


def methods(script: ScriptArguments) -> dict[str, Method]:
    deep = NPTConfig.prompt_ot
    lora = Recipe.read("demo/lora_budget")
    return {
        "zero-shot": Method("zero-shot", None),
        "coop": Method("CoOp", NPTConfig.coop),
        "deep": Method("deep prompts", deep),
        "ot-weight": Method(
            f"deep prompts + OT, weight {script.ot_weight:g}", deep, lambda: [OTPreservation(weight=script.ot_weight)]
        ),
        "ot-budget": Method(
            f"deep prompts + OT, budget {script.ot_budget:g}", deep, lambda: [OTPreservation(budget=script.ot_budget)]
        ),
        "lora-budget": Method.from_recipe(
            f"LoRA on a budget ({script.lora_epochs:g} epochs), Tip-Adapter-F",
            lora,
            num_train_epochs=script.lora_epochs,
        ),
    }


def read_images(name: str, config: str | None, split: str, label_column: str) -> Dataset:
    if Path(name).is_dir():
        return load_images(name, split, label_column=label_column)
    return load_dataset(name, config, split=split)


def load_task(script: ScriptArguments, label_column: str, seed: int) -> Task:
    """Return a new model, the shots of this seed, and the sets to evaluate on."""
    if script.dataset_name is None:
        demo = load_demo(script.demo_split, shots=script.shots, seed=seed)
        eval_sets = {"base": demo.splits["base"], "new": demo.splits["new"], "kept": demo.splits["fashion_mnist"]}
        if script.all_classes:  # the demo has training images only of these
            eval_sets = {"all": demo.splits["base"], "kept": demo.splits["fashion_mnist"]}
        model, processor, train = demo.model, demo.processor, demo.splits["train"]
    else:
        train_set, test_set = (
            read_images(script.dataset_name, script.dataset_config, split, label_column)
            for split in (script.train_split, script.test_split)
        )
        if not script.all_classes:
            train_set = base_new_split(train_set, label_column)["base"]
        train = few_shot(train_set, script.shots, seed, label_column)
        eval_sets = {"all": test_set} if script.all_classes else dict(base_new_split(test_set, label_column))
        if script.kept_dataset_name:
            eval_sets["kept"] = read_images(script.kept_dataset_name, None, script.test_split, label_column)
        model = processor = None
    if script.model_name_or_path is not None:
        model = AutoModel.from_pretrained(script.model_name_or_path)
        processor = AutoProcessor.from_pretrained(script.model_name_or_path)
    elif model is None:
        demo = load_demo()
        model, processor = demo.model, demo.processor
    return Task(model, processor, train, eval_sets)


def run(method: Method, task: Task, args: GeometryTrainingArguments, seed: int, bar: EpochBar) -> dict[str, float]:
    """Train one method from one seed, save its adapter, and evaluate it."""
    set_seed(seed)
    args.seed, args.data_seed = seed, seed
    if method.stages is not None:
        return run_stages(method, task, args, seed, bar)
    model = task.model if method.config is None else get_peft_model(task.model, method.config())
    trainer = GeometryTrainer(
        model=model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.eval_sets,
        processing_class=task.processor,
        losses=method.losses(),
        classification_loss=method.classification_loss(),
        callbacks=[bar, *method.callbacks()],
    )
    trainer.remove_callback(PrinterCallback)
    seconds = 0.0
    if method.config is not None:
        seconds = trainer.train().metrics["train_runtime"]
        trainer.save_model()
    return finish(method, trainer, task, seconds)


def run_stages(
    method: Method, task: Task, args: GeometryTrainingArguments, seed: int, bar: EpochBar
) -> dict[str, float]:
    """Train a recipe of several stages with its own arguments, save its adapter, and evaluate it."""
    start = time.monotonic()
    own = {name: getattr(args, name) for name in ("save_strategy", "per_device_eval_batch_size", "disable_tqdm")}
    own |= {**method.args, "seed": seed, "data_seed": seed}
    trainer = train_stages(
        method.stages, task.model, task.train, task.processor, args.output_dir, own, task.eval_sets, [bar]
    )
    return finish(method, trainer, task, time.monotonic() - start)


def finish(method: Method, trainer: GeometryTrainer, task: Task, seconds: float) -> dict[str, float]:
    """Fit and save the head of a method that has one, and evaluate."""
    start, head = time.monotonic(), None
    if method.head is not None:
        head = FittedHead(method.head(), trainer)
        if trainer.args.should_save:
            head.classifier.save_pretrained(Path(str(trainer.args.output_dir)) / HEAD_FOLDER)
        seconds += time.monotonic() - start
    return {**evaluate(trainer, task, head), "seconds": seconds}


def predict(trainer: GeometryTrainer, images: Dataset, head: FittedHead | None) -> np.ndarray | None:
    """Return the classes (N,) that the head predicts, or the class texts where no head knows the set's names."""
    if head is not None and head.knows(images):
        return head.predict(images)
    by_texts = trainer.predict(images).predictions.argmax(-1)
    return by_texts if head is None else head.predict(images, by_texts)


def evaluate(trainer: GeometryTrainer, task: Task, head: FittedHead | None) -> dict[str, float]:
    found = {}
    for name, images in task.eval_sets.items():
        predicted = predict(trainer, images, head)
        if predicted is not None:
            labels = label_array(images, trainer.args.label_column)
            found[name] = 100 * accuracy(predicted, labels)
            if name == "all":
                found["balanced"] = 100 * balanced_accuracy(predicted, labels)
    if {"base", "new"} <= found.keys():
        found["H"] = harmonic_mean(found["base"], found["new"])
    return found


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Return a Markdown table of mean and standard deviation over seeds."""
    columns = ["all", "balanced", "base", "new", "H", "kept", "seconds"]
    columns = [c for c in columns if any(c in r for rows in results.values() for r in rows)]
    titles = {"all": "accuracy", "balanced": "balanced accuracy", "kept": "knowledge kept"}
    lines = ["| method | " + " | ".join(titles.get(c, c) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for title, rows in results.items():
        cells = []
        for column in columns:
            values = [row[column] for row in rows]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 and column != "seconds" else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}" if any(values) or column != "seconds" else "")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show_examples(folder: Path, images: Dataset, args: GeometryTrainingArguments) -> None:
    """Print what a saved adapter predicts for ten test images, and how often it is right on all test images."""
    names = images.features[args.label_column].names
    k = min(3, math.ceil(len(names) / 4))  # one of three names would be right by chance
    found = ZeroShotClassifier.from_pretrained(folder).top_k(images[args.image_column][:], names, k=k)
    truth = [names[label] for label in images[args.label_column]]
    hits = [[i for i, row in enumerate(found) if (truth[i] in dict(row)) == hit] for hit in (True, False)]
    shares = [sum(true == row[0][0] for true, row in zip(truth, found, strict=True)), len(hits[0])]
    first, among = (100 * count / len(images) for count in shares)
    print(f"\nAdapter loaded from {folder}: test images, and the {k} most probable of {len(names)} names.")
    print("Ten random images, with the same share of right ones as among all test images:")
    counts, rng = (round(among / 10), 10 - round(among / 10)), random.Random(0)
    for rows, count, word in zip(hits, counts, ("right", "wrong"), strict=True):
        for i in rng.sample(rows, min(count, len(rows))):
            said = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found[i])
            print(f"  {word}  {truth[i]}: {said}")
    more = f", one of the {k} for {among:.0f} %" if k > 1 else ""
    print(f"Over all {len(images):,} test images the first name is right for {first:.0f} %{more}.")


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, GeometryTrainingArguments))
    own = any(a.startswith(("--model_name_or_path", "--dataset_name")) for a in sys.argv)
    parser.set_defaults(
        **(PAPER if own else DEMO),
        output_dir="outputs/prompt_ot",
        save_strategy="no",
        logging_strategy="epoch",
        per_device_eval_batch_size=256,
        disable_tqdm=True,
    )
    (script, args), recipe = parse_with_recipe(parser, takes_head=True)
    for argument in ("--per_device_train_batch_size", "--resume_from_checkpoint"):
        if any(given.split("=")[0] == argument for given in sys.argv):
            raise SystemExit(
                f"{argument} is not supported: runs are not resumed, and --batch_size, which counts all processes, "
                "sets the batch."
            )
    args.share_batch(script.batch_size)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*all of them get prompts")  # the demo's towers have 3 and 4 layers
    rows = methods(script)
    if recipe is not None:
        rows[recipe.name] = Method.from_recipe(recipe.name, recipe)
        if rows[recipe.name].config is None:
            raise SystemExit(f"Recipe {script.recipe} names no peft config; choose a recipe with the key peft.")
        script.methods = ["zero-shot", recipe.name]
    if script.methods is None:  # the last row's settings are for the demo's model
        with_ot = ["ot-weight", "ot-budget"] if own else ["ot-budget", "lora-budget"]
        script.methods = ["zero-shot", "coop", "deep", *with_ot]
    unknown = set(script.methods) - rows.keys()
    if unknown:
        raise SystemExit(f"Unknown methods {sorted(unknown)}; choose among {', '.join(rows)}.")

    output = Path(args.output_dir)
    trained = [name for name in script.methods if rows[name].config is not None]
    epochs = sum(rows[name].epochs(args.num_train_epochs) for name in script.methods)
    bar = EpochBar(int(len(script.seeds) * epochs), disable=not args.should_save)
    results: dict[str, list[dict[str, float]]] = {}
    for name in script.methods:
        for seed in script.seeds:
            bar.bar.set_description(f"{rows[name].title}, seed {seed}")
            found = results.setdefault(rows[name].title, [])
            if found and rows[name].config is None:  # a seed draws training images only
                found.append(found[0])
                continue
            args.output_dir = str(output / file_name(name, "a recipe") / f"seed-{seed}")
            task = load_task(script, args.label_column, seed)
            found.append(run(rows[name], task, args, seed, bar))
    bar.bar.close()
    if not args.should_save:
        return

    model = script.model_name_or_path or "mini-CLIP"
    data = script.dataset_name or f"the demo's {script.demo_split} split"
    note = (
        f"{model} on {data}: {script.shots} shots, {args.num_train_epochs:g} epochs, batch {script.batch_size}, seeds "
        f"{', '.join(map(str, script.seeds))}; ± is the standard deviation over seeds. torch {torch.__version__} on "
        f"{args.device} ({platform.machine()}), {args.world_size} process(es) of {torch.get_num_threads()} thread(s)."
    )
    print(f"\n{table(results)}\n\n{note}")
    write_whole(output / "results.md", f"{table(results)}\n\n{note}\n")
    write_whole(output / "results.json", json.dumps({"note": note, "results": results}, indent=1) + "\n")

    if trained:
        folder = output / trained[-1] / f"seed-{script.seeds[-1]}"
        show_examples(folder, task.eval_sets["all" if script.all_classes else "new"], args)


if __name__ == "__main__":
    main()
