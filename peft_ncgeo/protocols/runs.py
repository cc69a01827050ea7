"""Training of every recipe in every setting from every seed, one resumable cell at a time."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModel, PrinterCallback, TrainerCallback, set_seed

from ..data import class_counts
from ..data.checks import class_names
from ..metrics.accuracy import accuracy, balanced_accuracy, evaluate_groups
from ..models.towers import reads_text
from ..training import GeometryMonitor, GeometryTrainer, GeometryTrainingArguments, Recipe, train_stages
from ..training.recipe import without_steps
from .cached_runs import cell_path, check_distinct, is_main_process
from .fingerprints import dataset_fingerprint, fingerprint, recipe_fingerprint
from .fitted_heads import FittedHead
from .results import KEYS
from .shared_cells import Cell, fill_cells

_OWN = ("seconds", "trainable", "cpu_seconds")  # columns of every row besides those of its test sets
# metrics of GeometryMonitor that a cell keeps
_GEOMETRY = ("nc", "text_", "modality_gap", "alignment", "error_exponent", "exponent", "class_exponent", "gram_")
_DEFAULTS = {
    "logging_strategy": "epoch",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_eval_batch_size": 256,
}
After = Callable[[GeometryTrainer, Callable[[], dict[str, Any]]], dict[str, Any]]


@dataclass
class Task:
    """Data of one cell: images to train on, and sets to evaluate.

    Attributes:
        train: labelled images.
        test: sets to evaluate, each over its own class names.
        grouped: name of a test set with the training classes; its accuracy is also computed for classes with many,
            medium and few training images. None: no groups.
        thresholds: see [`~peft_ncgeo.evaluation.evaluate_groups`].
    """

    train: Dataset
    test: dict[str, Dataset]
    grouped: str | None = None
    thresholds: Sequence[float] | str = "thirds"


def run_cells(
    recipes: Sequence[Recipe],
    settings: Mapping[str, Callable[[int], Task]],
    model: str | Callable[[], nn.Module],
    processor: Any,
    output_dir: str | Path,
    seeds: Sequence[int] = (1, 2, 3),
    args: Mapping[str, Any] | None = None,
    finish: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    after: After | None = None,
) -> list[dict[str, Any]]:
    """Train each recipe in each setting from each seed and evaluate it; see [`Results`] for the rows.

    A row has the metrics of the task's sets, and `cpu_seconds`, the CPU time of the whole cell. `seconds` is the time
    of training and of fitting the head; `trainable` is the number of trained values. Rows without training have no
    `trainable`, and no `seconds` unless a head was fitted.

    Each cell is a small JSON file under `output_dir/<setting>/<recipe>`, written when it is done. A run that was
    stopped continues with the missing cells; existing ones must have the same fingerprint, see [`fingerprint`]. All
    data are drawn and all recipes checked before the first cell. Several processes, also on several machines, can work
    in one folder: each cell is computed by one of them, and all return every row, see [`fill_cells`].

    Args:
        recipes: recipes with different names; one without a PEFT config or stages is evaluated without training. A
            head is fitted on the training images after training. It classifies the sets whose names it was fitted on,
            or all sets if it takes new names. The other sets are classified by the model's texts if the head reads
            texts; if not, their metrics are None.
        settings: name -> function of the seed that returns a task.
        model: name or folder of a dual encoder, such as CLIP or SigLIP, or a function that makes a new model of any
            kind; the cell's seed draws its random weights, for instance those of a new head.
        processor: the model's processor.
        output_dir: folder of the cells.
        seeds: seeds of the runs; one run for each.
        args: arguments of every recipe, which override its own. `batch_size` is the number of images in a step, over
            all processes; `template` sets the template of a prompt adapter too.
        finish: function of a run's metrics that returns the metrics of its cell.
        after: called with the trained trainer and a function that evaluates the task again; the metrics that it
            returns are added to the cell's. It may change the model, which is not used afterwards.

    Raises:
        ValueError: two cells with one name, a name that cannot be a folder's, a test set with the name of another
            column, an unknown argument, an object that has no fingerprint (see [`fingerprint`]), a recipe with a head
            for a model that reads no text, or a cell's file that is damaged or of a run with other inputs.
    """
    args = dict(args or {})
    # must come before other code asks for the process index, see GeometryTrainingArguments
    GeometryTrainingArguments(output_dir=str(output_dir), report_to="none")
    known = {f.name for f in fields(GeometryTrainingArguments) if f.init} - {"output_dir", "seed"} | {"batch_size"}
    for recipe in [*recipes, Recipe("args", args=args)]:
        recipe.check_args(known)
    cells = [(setting, seed, recipe) for setting in settings for seed in seeds for recipe in recipes]
    paths = [cell_path(output_dir, setting, recipe.name, seed) for setting, seed, recipe in cells]
    check_distinct(paths)
    fresh = (lambda: AutoModel.from_pretrained(model)) if isinstance(model, str) else model
    set_seed(0)
    of_model = fingerprint("The model", fresh()), fingerprint("The processor", processor)
    label_column = args.get("label_column", "label")
    tasks = {(setting, seed): settings[setting](seed) for setting in settings for seed in seeds}
    if taken := {name for task in tasks.values() for name in task.test} & {*KEYS, *_OWN}:
        raise ValueError(f"A test set is named {min(taken)!r}, which is the name of another column; rename the set.")
    sets = {id(d): d for task in tasks.values() for d in (task.train, *task.test.values())}  # tasks share test sets
    of_set = {key: dataset_fingerprint(dataset, label_column) for key, dataset in sets.items()}
    of_task = {key: _describe_task(task, of_set) for key, task in tasks.items()}
    of_recipe = {recipe.name: recipe_fingerprint(recipe) for recipe in recipes}
    of_arguments = fingerprint("One of args, finish and after", args, finish, after)

    def cell(setting: str, seed: int, recipe: Recipe, path: Path) -> Cell:
        def compute() -> dict[str, Any]:
            set_seed(seed)
            start, task = time.process_time(), tasks[setting, seed]
            metrics = finish(_run(recipe, task, fresh(), processor, path.parent, seed, args, after))
            return {**metrics, "cpu_seconds": time.process_time() - start}

        made_of = fingerprint("A cell", of_model, of_task[setting, seed], of_recipe[recipe.name], of_arguments)
        return Cell(path, made_of, f"{setting}, {recipe.name}, seed {seed}", compute)

    filled = fill_cells([cell(*key, path) for key, path in zip(cells, paths, strict=True)])
    rows = [
        {"setting": setting, "method": recipe.name, "seed": seed, **metrics}
        for (setting, seed, recipe), metrics in zip(cells, filled, strict=True)
    ]
    order = {recipe.name: i for i, recipe in enumerate(recipes)}
    return sorted(rows, key=lambda row: (list(settings).index(row["setting"]), order[row["method"]]))


def _describe_task(task: Task, of_set: Mapping[int, Any]) -> list[Any]:
    sets = {"": task.train, **task.test}
    return [{name: of_set[id(dataset)] for name, dataset in sets.items()}, task.grouped, task.thresholds]


def check_tails(tails: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise for a tail with arguments that protocols do not pass on to [`~peft_ncgeo.data.long_tailed`].

    Raises:
        ValueError: a tail has an unknown argument; the error names both.
    """
    for name, tail in tails.items():
        if unknown := set(tail) - {"tau", "imbalance_factor", "n_max"}:
            raise ValueError(
                f"Tail {name!r} has {sorted(unknown)[0]!r}; a tail takes tau or imbalance_factor, and n_max."
            )


def describe(seeds: Sequence[int]) -> str:
    """Return a note on the seeds and the machine of a table."""
    threads = torch.get_num_threads()
    return (
        f"Seeds {', '.join(map(str, seeds))}; ± is the standard deviation over seeds. torch {torch.__version__} on "
        f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}."
    )


class _Epochs(TrainerCallback):
    """Progress bar over the epochs of one cell; `trained` holds every parameter that its stages train."""

    def __init__(self) -> None:
        self.trained: set[nn.Parameter] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.trained.update(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.bar = tqdm(total=state.num_train_epochs, unit="epoch", leave=False, disable=not args.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()

    def count(self) -> int:
        """Return the number of trained values."""
        return sum(parameter.numel() for parameter in self.trained)


def _run(
    recipe: Recipe,
    task: Task,
    model: nn.Module,
    processor: Any,
    folder: Path,
    seed: int,
    overrides: Mapping[str, Any],
    after: After | None,
) -> dict[str, Any]:
    if recipe.head and not reads_text(model):
        raise ValueError(
            f"Recipe {recipe.name} has a head, which needs a dual encoder such as CLIP, got {type(model).__name__}."
        )
    set_seed(seed)
    if recipe.stages:
        recipe = replace(recipe, args={**_DEFAULTS, **recipe.args})
        return _run_stages(recipe, task, model, processor, folder, {**overrides, "seed": seed}, after)
    settings = {**_DEFAULTS, **without_steps(recipe.args, overrides), **overrides, "seed": seed}
    config: Any = recipe.config() if recipe.config else None
    if "template" in settings and hasattr(config, "template"):
        config.template = settings.pop("template")  # prompt adapters have a template of their own
    size = settings.pop("batch_size", None)
    args = GeometryTrainingArguments(output_dir=str(folder), **settings)
    if size is not None:
        args.share_batch(size)
    progress = _Epochs()
    trainer = GeometryTrainer(
        # no config: nothing is trained, so the model may be in half precision
        model=get_peft_model(model, config) if config else model.requires_grad_(False),
        args=args,
        train_dataset=task.train,
        processing_class=processor,
        losses=recipe.losses() if config else [],
        classification_loss=recipe.classification_loss(),
        callbacks=[GeometryMonitor(), progress, *recipe.callbacks()],
    )
    trainer.remove_callback(PrinterCallback)
    result: dict[str, Any] = {}
    if config:
        result["seconds"] = trainer.train().metrics["train_runtime"]
        result["trainable"] = progress.count()
        logs = trainer.state.log_history
        result.update({key: entry[key] for entry in logs for key in entry if key.startswith(("loss/", "lambda/"))})
    return _finish(recipe, task, trainer, result, after)


def _run_stages(
    recipe: Recipe,
    task: Task,
    model: nn.Module,
    processor: Any,
    folder: Path,
    args: Mapping[str, Any],
    after: After | None,
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    place = [mkdtemp(prefix=".stages-", dir=folder) if is_main_process() else ""]  # one for all processes
    broadcast_object_list(place)
    try:
        start, progress = time.monotonic(), _Epochs()
        stages, callbacks = replace(recipe, head=None), [GeometryMonitor(), progress]
        trainer = train_stages(stages, model, task.train, processor, place[0], args, callbacks=callbacks)
        result = {"seconds": time.monotonic() - start, "trainable": progress.count()}
        return _finish(recipe, task, trainer, result, after)
    finally:
        if is_main_process():
            shutil.rmtree(place[0], ignore_errors=True)


def _finish(
    recipe: Recipe, task: Task, trainer: GeometryTrainer, result: dict[str, Any], after: After | None
) -> dict[str, Any]:
    """Fit the head, evaluate, and return the result of the training with these metrics and the head's seconds."""

    def fit() -> FittedHead | None:
        return FittedHead(recipe.head(), trainer) if recipe.head else None

    start, head = time.monotonic(), fit()
    if head is not None:
        result["seconds"] = result.get("seconds", 0.0) + time.monotonic() - start
    result.update(_evaluate(trainer, task, head))
    if after is not None:  # the model may have changed, so the head is fitted again
        result.update(after(trainer, lambda: _evaluate(trainer, task, fit())))
    return result


def _evaluate(trainer: GeometryTrainer, task: Task, head: FittedHead | None) -> dict[str, Any]:
    result: dict[str, Any] = {}
    label_column = trainer.args.label_column
    for name, dataset in task.test.items():
        output = trainer.predict(dataset, metric_key_prefix=name)
        result.update({k: v for k, v in output.metrics.items() if k.removeprefix(f"{name}_").startswith(_GEOMETRY)})
        predicted = output.predictions.argmax(-1)
        if head is not None:
            predicted = head.predict(dataset, predicted)
        if predicted is None:
            result.update({name: None, f"{name}_balanced_accuracy": None})
            continue
        result[name] = 100 * accuracy(predicted, output.label_ids)
        result[f"{name}_balanced_accuracy"] = 100 * balanced_accuracy(predicted, output.label_ids)
        if name == task.grouped:
            counts = _counts_of(class_names(dataset, label_column), task.train, label_column)
            groups = evaluate_groups(predicted, output.label_ids, counts, task.thresholds)
            result.update({group: None if share is None else 100 * share for group, share in groups.items()})
            result["realised_imbalance_factor"] = float(counts.max() / counts.min())
    return result


def _counts_of(names: Sequence[str], train: Dataset, label_column: str) -> Any:
    """Return the numbers of training images of `names`, whose order may differ from that of training."""
    trained = class_names(train, label_column)
    strange = [name for name in names if name not in trained]
    if strange:
        raise ValueError(
            f"Class {strange[0]!r} was not trained, so it is in none of many, medium and few; evaluate without groups."
        )
    return class_counts(train, label_column)[[trained.index(name) for name in names]]
