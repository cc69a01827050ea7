"""Train every recipe in every setting from every seed, one resumable cell at a time."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPModel, PrinterCallback, TrainerCallback, set_seed

from ..data import class_counts
from ..evaluation import evaluate_groups
from ..evaluation.metrics import accuracy
from ..training import GeometryMonitor, GeometryTrainer, GeometryTrainingArguments, Recipe

Seeded = Dataset | Callable[[int], Dataset]


@dataclass
class Task:
    """What one cell trains on and is evaluated on.

    Attributes:
        train: labelled images.
        test: sets to evaluate, each over its own class names.
        grouped: the set, with the training classes, whose accuracy is also given for classes with many, medium and
            few training images; None for no groups.
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
) -> list[dict[str, Any]]:
    """Train each recipe in each setting from each seed and evaluate it; see [`Results`] for the rows.

    Each cell is a small JSON file under `output_dir/<setting>/<recipe>`, written when it is done. A run that was
    stopped goes on with the cells that are missing; a cell that was made by another recipe or other `args` is refused.

    Args:
        recipes: settings with different names; one without a PEFT config is evaluated as it is.
        settings: name -> function of the seed.
        model: name or folder of a CLIP model, or a function that makes a fresh model.
        processor: the model's.
        output_dir: where the cells are.
        seeds: one run each.
        args: arguments of every recipe, which override its own. `batch_size` counts all processes, `template` sets
            that of a prompt adapter too.
        finish: what a protocol adds to the metrics of a cell.

    Raises:
        ValueError: two recipes of one name, or a cell made otherwise.
    """
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise ValueError(f"Recipes must have different names, got {names}.")
    rows = []
    cells = [(s, r, seed) for s in settings for r in recipes for seed in seeds]
    with tqdm(cells, unit="cell", disable=not _writes()) as bar:
        for setting, recipe, seed in bar:
            bar.set_description(f"{setting}, {recipe.name}, seed {seed}")
            path = Path(output_dir) / _slug(setting) / _slug(recipe.name) / f"seed-{seed}.json"
            made_by = _fingerprint(recipe, args or {})
            metrics = _read(path, made_by)
            if metrics is None:
                task = settings[setting](seed)
                base = CLIPModel.from_pretrained(model) if isinstance(model, str) else model()
                metrics = finish(_run(recipe, task, base, processor, path.parent, seed, args or {}))
                if _writes():
                    _write(path, made_by, metrics)
            rows.append({"setting": setting, "method": recipe.name, "seed": seed, **metrics})
    return rows


def describe(seeds: Sequence[int]) -> str:
    """What a table was run on."""
    threads = torch.get_num_threads()
    return (
        f"Seeds {', '.join(map(str, seeds))}; ± is the standard deviation over seeds. torch {torch.__version__} on "
        f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}."
    )


class _Epochs(TrainerCallback):
    """A bar over the epochs of one cell."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.num_train_epochs, unit="epoch", leave=False, disable=not args.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def _run(
    recipe: Recipe,
    task: Task,
    model: nn.Module,
    processor: Any,
    folder: Path,
    seed: int,
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    set_seed(seed)
    settings = {
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_eval_batch_size": 256,
        **recipe.args,
        **overrides,
        "seed": seed,
    }
    config: Any = recipe.config() if recipe.config else None
    if "template" in settings and hasattr(config, "template"):
        config.template = settings.pop("template")  # prompts have a template of their own
    size = settings.pop("batch_size", None)
    args = GeometryTrainingArguments(output_dir=str(folder), **settings)
    if size is not None:
        args.per_device_train_batch_size, left = divmod(size, args.world_size)
        if left or not args.per_device_train_batch_size:
            raise ValueError(f"batch_size={size} cannot be shared by {args.world_size} processes.")
    trainer = GeometryTrainer(
        model=get_peft_model(model, config) if config else model,
        args=args,
        train_dataset=task.train,
        processing_class=processor,
        losses=recipe.losses() if config else [],
        classification_loss=recipe.classification_loss(),
        callbacks=[GeometryMonitor(), _Epochs(), *recipe.callbacks()],
    )
    trainer.remove_callback(PrinterCallback)
    result: dict[str, Any] = {}
    if config:
        result["seconds"] = trainer.train().metrics["train_runtime"]
        logs = trainer.state.log_history
        result.update({key: entry[key] for entry in logs for key in entry if key.startswith(("loss/", "lambda/"))})
    for name, dataset in task.test.items():
        output = trainer.predict(dataset, metric_key_prefix=name)
        predicted = output.predictions.argmax(-1)
        result[name] = 100 * accuracy(predicted, output.label_ids)
        kept = ("nc", "text_", "modality_gap")
        result.update({k: v for k, v in output.metrics.items() if k.removeprefix(f"{name}_").startswith(kept)})
        if name == task.grouped:
            counts = class_counts(task.train, args.label_column)
            groups = evaluate_groups(predicted, output.label_ids, counts, task.thresholds)
            result.update({group: None if share is None else 100 * share for group, share in groups.items()})
            result["realised_imbalance_factor"] = float(counts.max() / counts.min())
    return result


def _writes() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _fingerprint(recipe: Recipe, args: Mapping[str, Any]) -> str:
    # through JSON, so that what was not read from a file counts by its text
    made_of = json.dumps([recipe.source, recipe.args, dict(args)], sort_keys=True, default=str)
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def _read(path: Path, made_by: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    cell = json.loads(path.read_text(encoding="utf-8"))
    if cell["made_by"] != made_by:
        raise ValueError(f"{path} was made by another recipe or other arguments; remove it or change output_dir.")
    return cell["metrics"]


def _write(path: Path, made_by: str, metrics: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")  # a run that is killed here leaves no half cell
    partial.write_text(json.dumps({"made_by": made_by, "metrics": metrics}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
