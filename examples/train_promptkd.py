"""Distillation from a tuned teacher on images without labels, as in PromptKD.

    accelerate launch examples/train_promptkd.py
        the built-in demo: the teacher is the mini-CLIP, tuned by prompts on 16 labelled images of each base class. The
        student is the untuned mini-CLIP's image tower with other prompts and a projector; it learns from unlabelled
        images of base and new classes. The script prints a table.

    accelerate launch examples/train_promptkd.py --model_name_or_path openai/clip-vit-base-patch16 \
        --teacher_name_or_path path/to/adapter --dataset_name path/to/image_folder --output_dir outputs/own
        your own student, teacher (an adapter's folder or repository, or a model) and images. The images are those of
        the part `train`; their labels are not read.

The student's rows are transductive: the student has seen images of the new classes, without their labels; the methods
of other tables have not. The demo's new images are divided: one half to train on, the other to test on.

The folder `base` beside the adapter holds the student before training, with the teacher's texts. `--recipe`
accepts any file with a config that trains `projector`; Transformers' training arguments are accepted too.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from datasets import ClassLabel, Dataset, concatenate_datasets
from own_images import load_parts
from peft import get_peft_model
from transformers import AutoModel, AutoProcessor, HfArgumentParser, PrinterCallback, set_seed

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments, ImageClassifier, ZeroShotClassifier
from peft_ncgeo.data import load_demo
from peft_ncgeo.metrics.accuracy import accuracy, harmonic_mean
from peft_ncgeo.training import Recipe, parse_with_recipe

RECIPES = Path(__file__).parent / "recipes"
MARK = "transductive: unlabelled images of all classes"


@dataclass
class ScriptArguments:
    recipe: str = field(
        default=str(RECIPES / "images" / "promptkd.yaml"), metadata={"help": "YAML file of the student."}
    )
    teacher_recipe: str = field(
        default=str(RECIPES / "demo" / "promptsrc.yaml"), metadata={"help": "YAML file of the demo's teacher."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "A CLIP. Default: the demo's."})
    teacher_name_or_path: str | None = field(default=None, metadata={"help": "An adapter, or a dual encoder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set or image folder with a test part."})
    batch_size: int = field(default=8, metadata={"help": "Training images a step, over all processes."})
    teacher_epochs: float | None = field(default=None, metadata={"help": "Epochs of the demo's teacher."})


@dataclass
class Task:
    """Models, their processors, images without labels, and the test images of each group of classes."""

    model: Any
    processor: Any
    teacher: Any
    teacher_processor: Any
    unlabelled: Dataset
    test: dict[str, Dataset]

    @property
    def names(self) -> list[str]:
        return [name for images in self.test.values() for name in images.features["label"].names]


def train(args: GeometryTrainingArguments, model: Any, recipe: Recipe, **options: Any) -> GeometryTrainer:
    trainer = GeometryTrainer(
        model=model,
        args=args,
        losses=recipe.losses(),
        classification_loss=recipe.classification_loss(),
        callbacks=recipe.callbacks(),
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def load_demo_task(script: ScriptArguments, args: GeometryTrainingArguments) -> Task:
    """Tune the demo's teacher on labelled images of base classes; return it with unlabelled images."""
    demo, recipe = load_demo(seed=args.seed), Recipe.read(script.teacher_recipe)
    settings = dict(recipe.args)
    if script.teacher_epochs is not None:
        settings["num_train_epochs"] = script.teacher_epochs
    size = settings.pop("batch_size", 60)
    options = {"save_strategy": "no", "disable_tqdm": args.disable_tqdm, "report_to": "none", "seed": args.seed}
    teacher_args = GeometryTrainingArguments(str(Path(args.output_dir) / "teacher"), **{**settings, **options})
    teacher_args.share_batch(size)
    assert recipe.config is not None
    labelled = demo.splits["train"]
    options = {"train_dataset": labelled, "processing_class": demo.processor}
    trainer = train(teacher_args, get_peft_model(demo.model, recipe.config()), recipe, **options)
    trainer.save_model()
    halves = demo.splits["new"].train_test_split(test_size=0.5, stratify_by_column="label", seed=args.seed)
    unlabelled = concatenate_datasets([part.remove_columns("label") for part in (labelled, halves["train"])])
    test = {"base": demo.splits["base"], "new": halves["test"]}
    student = load_demo()
    return Task(student.model, student.processor, trainer.model, demo.processor, unlabelled, test)


def load_own_task(script: ScriptArguments, args: GeometryTrainingArguments) -> Task:
    if script.model_name_or_path is None or script.teacher_name_or_path is None:
        raise SystemExit("--dataset_name needs --model_name_or_path and --teacher_name_or_path.")
    try:
        classifier = ZeroShotClassifier.from_pretrained(script.teacher_name_or_path)
        teacher, teacher_processor = classifier.model, classifier.processor
    except (OSError, ValueError):  # not an adapter
        teacher = AutoModel.from_pretrained(script.teacher_name_or_path)
        teacher_processor = AutoProcessor.from_pretrained(script.teacher_name_or_path)
    parts = load_parts(script.dataset_name, args.label_column)
    student = script.model_name_or_path
    return Task(
        AutoModel.from_pretrained(student),
        AutoProcessor.from_pretrained(student),
        teacher,
        teacher_processor,
        parts["train"].remove_columns(args.label_column),
        {"all": parts["test"].rename_columns({args.label_column: "label"})},
    )


def make_student(task: Task, recipe: Recipe, args: GeometryTrainingArguments) -> Any:
    """Return the student; its base model, with the teacher's texts, is saved in a folder beside the adapter."""
    base = ImageClassifier.from_backbone(
        task.model, task.names, head="cosine", init="texts", teacher=task.teacher, processor=task.teacher_processor
    )
    folder = Path(args.output_dir) / "base"
    with args.main_process_first():
        if args.should_save:
            base.save_pretrained(folder)
            task.processor.save_pretrained(folder)
    assert recipe.config is not None
    return get_peft_model(ImageClassifier.from_pretrained(folder), recipe.config())


def zero_shot(model: Any, processor: Any, task: Task) -> dict[str, float]:
    """Return the accuracy of each group of test images among the names of its own classes."""
    classifier, found = ZeroShotClassifier(model, processor), {}
    for group, images in task.test.items():
        names = images.features["label"].names
        predicted = classifier.predict(images["image"][:], names, batch_size=256)
        found[group] = accuracy([names.index(name) for name in predicted], images["label"][:])
    return found


def of_student(trainer: GeometryTrainer, task: Task) -> dict[str, float]:
    """Return the accuracy of each group of test images among the outputs of its own classes."""
    found, first = {}, 0
    for group, images in task.test.items():
        count, labels = len(images.features["label"].names), [first + label for label in images["label"][:]]
        named = images.remove_columns("label").add_column("label", labels, feature=ClassLabel(names=task.names))
        logits = trainer.predict(named).predictions[:, first : first + count]
        found[group] = accuracy(logits.argmax(-1) + first, labels)
        first += count
    return found


def row(title: str, found: dict[str, float], data: str) -> str:
    shares = [*found.values(), *([harmonic_mean(*found.values())] if len(found) == 2 else [])]
    return f"| {title} | {' | '.join(f'{100 * share:.1f}' for share in shares)} | {data} |"


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, GeometryTrainingArguments))
    parser.set_defaults(
        output_dir="outputs/promptkd", save_strategy="no", logging_strategy="epoch", per_device_eval_batch_size=256
    )
    (script, args), recipe = parse_with_recipe(parser, default=RECIPES / "images" / "promptkd.yaml")
    if recipe.config is None or "projector" not in (recipe.config().modules_to_save or []):
        raise SystemExit(
            f"Recipe {script.recipe} names no config with modules_to_save: [projector]; choose one that does."
        )
    args.share_batch(script.batch_size)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*all of them get prompts")  # the demo's tower has 4 layers

    set_seed(args.seed)
    task = (load_demo_task if script.dataset_name is None else load_own_task)(script, args)
    columns = [*task.test, *(["H"] if len(task.test) == 2 else [])]
    rows = [
        row("zero-shot", zero_shot(task.model, task.processor, task), "none"),
        row("teacher", zero_shot(task.teacher, task.teacher_processor, task), "labelled images of base classes"),
    ]
    set_seed(args.seed)
    trainer = train(
        args,
        make_student(task, recipe, args),
        recipe,
        train_dataset=task.unlabelled,
        class_names=task.names,
        processing_class=task.processor,
        teacher=task.teacher,
        teacher_processor=task.teacher_processor,
    )
    trainer.save_model()
    rows.append(row("student", of_student(trainer, task), MARK))
    if not args.should_save:
        return

    print(f"\n{recipe.name}: {len(task.unlabelled)} unlabelled images, {len(task.names)} classes")
    print(f"| accuracy in % | {' | '.join(columns)} | trained on |\n|---{'|---:' * len(columns)}|---|")
    print("\n".join(rows))
    print(f"Adapter in {args.output_dir}, its base in {Path(args.output_dir) / 'base'}")


if __name__ == "__main__":
    main()
