"""A training on all classes of a set of images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import transformers
import typer
from datasets import DatasetDict
from peft import get_peft_model
from peft.utils import CONFIG_NAME
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...classifiers.image_classifier import ImageClassifier
from ...data import few_shot, load_demo, long_tailed, split_validation
from ...data.checks import class_names
from ...data.sampling import label_array
from ...hub.record import TrainingRecord
from ...loading.load import HEAD_FOLDER
from ...markdown import table
from ...models.towers import reads_text
from ...protocols.fitted_heads import FittedHead
from ...reports import Report
from ...training import GeometryTrainer, GeometryTrainingArguments, Recipe, train_stages
from ...tuners.prototype import PrototypeConfig
from .arguments import parse
from .models import DEMO, empty_model, load_model
from .parts import load_parts

_DEFAULTS = {
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "logging_strategy": "epoch",
    "per_device_eval_batch_size": 64,
}
_IN_CARD = """
## Head on the tuned features

After the training, {head} was fitted on the features of the training images; it is in the folder `{place}`. With it:
{found}. This loads adapter and head:

```python
classifier = peft_ncgeo.FewShotClassifier.from_pretrained("{folder}")
```
"""
# title of a row -> metric of the record
_ROWS = {
    "accuracy": "accuracy",
    "balanced accuracy": "balanced_accuracy",
    "accuracy, classes with many images": "many",
    "accuracy, classes with a medium number": "medium",
    "accuracy, classes with few images": "few",
}


class Length(TrainerCallback):
    """Callback that prints the length of a training before its first step, and the step that a resumed one is at."""

    def __init__(self, images: int) -> None:
        self.images = images

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        begun = f", going on from step {state.global_step:,}" if state.global_step else ""
        typer.echo(
            f"Training: {self.images:,} images, batch {batch:,}, {state.max_steps:,} steps "
            f"({state.num_train_epochs:,} epochs){begun}."
        )


@dataclass
class TrainOptions:
    """Options of the command, and those that recipes for image classifiers hold."""

    recipe: str | None = None
    model: str | None = None
    shots: int | None = None
    batch_size: int | None = None
    validation_share: float = 0.1
    head: str | None = None
    init: str | None = None
    projected: bool = True
    imbalance_factor: float = 0.0


def train(words: Sequence[str], resume: bool) -> None:
    """Train, print accuracy before and after, and save adapter, processor and card."""
    options, args, data, recipe = parse(TrainOptions, words, _DEFAULTS, _default_recipe(words))
    assert recipe is not None  # there is a default
    if data is not None and options.model is None:
        raise ValueError(
            "Images of your own need --model, such as --model openai/clip-vit-base-patch16; --model demo takes the "
            "built-in mini-CLIP."
        )
    quiet()
    folder = Path(str(args.output_dir))
    _check_folder(folder, resume)
    if options.batch_size is not None and not any(w.startswith("--per_device_train_batch_size") for w in words):
        args.share_batch(options.batch_size)
    set_seed(args.seed)
    with args.main_process_first():
        parts = _load(data, options, args)
    model, processor = load_model(options.model or DEMO)
    if args.should_save:
        _announce(data, options, recipe, parts, args.label_column)
    text = reads_text(model) and not _needs_head(recipe, options)
    if recipe.head:
        _check_feature_head(recipe, args, text)
    if not text:
        model = _with_head(model, processor, parts, options, args, resume)
    trainer = _trained(replace(recipe, head=None), model, processor, parts, args, resume)
    trainer.eval_dataset = {name: parts[name] for name in ("validation", "test") if name in parts}
    record = trainer.record()  # with the adapter off and on, on all processes
    report = _report(trainer)
    trainer.save_model()
    if args.should_save:
        typer.echo(f"\n{_results(record, 'zero-shot' if text else 'before')}")
        if report is not None:
            report.save(folder / "report")
            typer.echo(f"\n{report.to_markdown()}\n\nIt is in {folder / 'report'}, with its tables.")
        if recipe.head:
            _fit_head(FittedHead(recipe.head(), trainer), trainer, folder)
        typer.echo(f"\nAdapter, processor and card are in {folder}.")


def _check_feature_head(recipe: Recipe, args: GeometryTrainingArguments, text: bool) -> None:
    """Refuse what a head on cached features cannot have, before any training."""
    if not text:
        recipe.refuse_head("it needs a dual encoder that is tuned with its texts, such as CLIP under LoRA")
    if args.push_to_hub:
        raise ValueError(
            f"--push_to_hub does not upload the head of recipe {recipe.name}; leave it out, and upload the whole "
            "folder with `hf upload`."
        )


def _fit_head(fitted: FittedHead, trainer: GeometryTrainer, folder: Path) -> None:
    """Save a head on the tuned model's features beside the adapter, and print its accuracy."""
    fitted.classifier.save_pretrained(folder / HEAD_FOLDER)
    found = []
    for name, images in trainer.evaluation_sets.items():
        predicted = fitted.predict(images)
        assert predicted is not None  # the names are those of the training
        right = (predicted == label_array(images, trainer.args.label_column)).mean()
        found.append(f"{name} accuracy {right:.3f}")
    name, told = type(fitted.classifier.head).__name__, ", ".join(found) or "no images to test it on"
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write(_IN_CARD.format(head=name, place=HEAD_FOLDER, found=told, folder=folder.resolve().name))
    typer.echo(f"\nWith the head {name}, in {folder / HEAD_FOLDER}: {told}.")


def _report(trainer: GeometryTrainer) -> Report | None:
    """Return the report on the test images, with a temperature from the validation images; None without either set."""
    known = trainer.evaluation_sets
    if "test" in known:
        return trainer.report("test", "validation" if "validation" in known else None)
    return trainer.report("validation") if "validation" in known else None


def _default_recipe(words: Sequence[str]) -> str:
    """Return the default recipe of a command line, which depends on the model."""
    given = {name: value for name, _, value in (word.partition("=") for word in words)}
    name = given.get("--model", DEMO)
    if "--recipe" in given:
        return given["--recipe"]
    if "--head" in given:
        return "images/lora"
    if name == DEMO:
        return "demo/budget"
    return "budget" if reads_text(empty_model(name)) else "images/lora"


def quiet() -> None:
    """Leave out messages about the loading of models and images."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*all of them get prompts")  # towers may have fewer layers
    warnings.filterwarnings("ignore", message=".*passed 100: the budget")  # while a budget is still being reached


def _check_folder(folder: Path, resume: bool) -> None:
    held = (folder / CONFIG_NAME).exists() or any(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    if held and not resume:
        raise ValueError(f"{folder} holds a training; --resume goes on with it, or name another --output_dir.")


def _load(data: str | None, options: TrainOptions, args: GeometryTrainingArguments) -> DatasetDict:
    column = args.label_column
    if data is None:
        splits = load_demo(shots=options.shots or 16, seed=args.seed).splits
        parts = DatasetDict(train=splits["train"], validation=splits["validation"], test=splits["base"])
    else:
        parts = load_parts(data, args)
        if "validation" not in parts and options.validation_share:
            parts = split_validation(parts, options.validation_share, args.seed, column)
        if options.shots is not None:
            parts["train"] = few_shot(parts["train"], options.shots, args.seed, column)
    if options.imbalance_factor:
        parts["train"] = long_tailed(
            parts["train"], imbalance_factor=options.imbalance_factor, seed=args.seed, label_column=column
        )
    return parts


def _announce(data: str | None, options: TrainOptions, recipe: Recipe, parts: DatasetDict, column: str) -> None:
    names = class_names(parts["train"], column)
    sizes = ", ".join(f"{name} {len(parts[name])}" for name in ("train", "validation", "test") if name in parts)
    source = "the built-in demo (drawings of 30 things)" if data is None else data
    model = "the built-in mini-CLIP" if options.model in (None, DEMO) else options.model
    typer.echo(f"Training {model} on {source}, recipe {recipe.name}: {len(names)} classes; images: {sizes}.")


def _needs_head(recipe: Recipe, options: TrainOptions) -> bool:
    """Return True if the command or the recipe asks for an image classifier, even if the model reads texts."""
    config: Any = recipe.config() if recipe.config else None
    trains_head = "classifier" in (getattr(config, "modules_to_save", None) or ())
    return options.head is not None or trains_head or isinstance(config, PrototypeConfig)


def _with_head(
    model: Any,
    processor: Any,
    parts: DatasetDict,
    options: TrainOptions,
    args: GeometryTrainingArguments,
    resume: bool,
) -> Any:
    """Return an image classifier of the model's image tower, saved in the folder `base` beside the adapter.

    Raises:
        ValueError: a training is resumed, but the folder holds another classifier.
    """
    init = options.init or ("texts" if reads_text(model) else "means")
    base = ImageClassifier.from_backbone(
        model,
        class_names(parts["train"], args.label_column),
        head=options.head or "cosine",
        init=init,
        processor=processor,
        projected=options.projected,
        dataset=parts["train"] if init == "means" else None,
        image_column=args.image_column,
        label_column=args.label_column,
    )
    folder = Path(str(args.output_dir)).absolute() / "base"
    if resume and (folder / "config.json").is_file():
        return _check_same(ImageClassifier.from_pretrained(folder), base, folder)
    with args.main_process_first():
        if args.should_save:
            base.save_pretrained(folder)
            processor.save_pretrained(folder)
    return ImageClassifier.from_pretrained(folder)  # so that the adapter names the folder as its base


def _check_same(held: Any, made: Any, folder: Path) -> Any:
    weights, new = held.state_dict(), made.state_dict()
    same = held.config.id2label == made.config.id2label and weights.keys() == new.keys()
    if not same or not all(w.shape == new[k].shape and w.allclose(new[k], 1e-3, 1e-3) for k, w in weights.items()):
        raise ValueError(
            f"{folder} holds another model, head or set of images than this command's; --resume needs those of the "
            "training that it goes on with. Or name another --output_dir."
        )
    return held


def _trained(
    recipe: Recipe, model: Any, processor: Any, parts: DatasetDict, args: GeometryTrainingArguments, resume: bool
) -> GeometryTrainer:
    evaluated, length = parts.get("validation"), Length(len(parts["train"]))
    if recipe.stages:
        own = {name: getattr(args, name) for name in ("seed", "data_seed", *_DEFAULTS)}
        place = str(args.output_dir)
        return train_stages(recipe, model, parts["train"], processor, place, own, evaluated, [length], resume)
    if recipe.config is None:
        raise ValueError(
            f"Recipe {recipe.name} has no 'peft' config, so there is nothing to train; add one, or fit a head alone "
            "with adapt."
        )
    config: Any = recipe.config()
    if not reads_text(model) and not isinstance(config, PrototypeConfig) and not config.modules_to_save:
        config.modules_to_save = ["classifier"]  # the head is new
    trainer = GeometryTrainer(
        model=get_peft_model(model, config),
        args=args,
        train_dataset=parts["train"],
        eval_dataset=evaluated,
        processing_class=processor,
        losses=recipe.losses(),
        classification_loss=recipe.classification_loss(),
        callbacks=[*recipe.callbacks(), length],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def _results(record: TrainingRecord, before: str) -> str:
    """Return a table of every set's metrics with the adapter off and on."""
    rows = []
    for name, found in record.sets.items():
        for title, key in _ROWS.items():
            values = [found.get(moment, {}).get(key) for moment in ("before", "after")]
            if any(value is not None for value in values):
                rows.append([f"{name} {title}", *("" if value is None else f"{value:.3f}" for value in values)])
    return table(["", before, "tuned"], rows)
