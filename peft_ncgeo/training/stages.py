"""Training in stages: first an adapter, then a row of weights for each class on the frozen result."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LNTuningConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainerState, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..classifiers.fixed_classes import fixed_classifier, refuse_vision_prompts
from ..classifiers.zero_shot import ZeroShotClassifier
from ..data.checks import class_names
from ..data.head_names import same_names
from ..files import read_json, write_whole
from ..geometry.sphere import l2_normalize
from ..loading.load import load_adapter
from ..models.adapters import evaluation_mode, unwrap
from ..models.text_setting import remember_text_setting, text_setting
from ..models.towers import reads_text
from .arguments import GeometryTrainingArguments
from .recipe import Recipe, without_steps
from .state.checkpoints import last_resumable
from .trainer import GeometryTrainer

_STATEMENT = "stages.json"  # in the output folder: the recipe and the arguments of the run


def train_stages(
    recipe: Recipe,
    model: nn.Module,
    train_dataset: Dataset,
    processing_class: Any,
    output_dir: str | Path,
    args: Mapping[str, Any] | None = None,
    eval_dataset: Dataset | dict[str, Dataset] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
) -> GeometryTrainer:
    """Train a recipe of several stages on a dual encoder, such as 2SFS.

    The first stage trains an adapter. A later stage trains it further, or, with `rows: texts`, trains a row of weights
    `w_k` (d) for each class while the tuned towers are frozen. The rows start as the tuned model's texts, and the
    logits are `exp(logit_scale) cos(f, w_k)`. Each stage has its own losses, arguments, optimiser and schedule.

    With `fraction: a` beside `rows`, the rows of the result lie between the unit texts t_k and the unit trained rows,
    `(1 - a) t_k + a w_k`, as WiSE-FT mixes a linear classifier (arXiv 2109.01903).

    Afterwards, wherever this package classifies (in the trainer, in [`~peft_ncgeo.ZeroShotClassifier`] and in
    exports), the rows are used for the classes of the training, and texts for any other name. The rows are saved
    beside the adapter.

    Args:
        recipe: a recipe with `stages`.
        model: a CLIP-like model without adapters.
        train_dataset, processing_class, eval_dataset: see [`GeometryTrainer`]. While rows are trained, only sets with
            the classes of the training are evaluated.
        output_dir: a new folder; stage i writes its checkpoints into `output_dir/stage-i`, and the result is saved
            in `output_dir`.
        args: arguments of every stage, which override the recipe's; `batch_size` counts all processes.
        callbacks: callbacks of every stage, in addition to the recipe's.
        resume: True: continue a run that was stopped in any stage, with the same recipe and arguments.

    Returns:
        The first stage's trainer, whose model has the result of all stages: `evaluate()`, `record()` and
        `push_to_hub()` work as after one training.

    Raises:
        FileExistsError: the folder is not empty, and `resume` is False or the folder holds no run of stages.
        ValueError: the recipe has no stages, or a head; the model is not a dual encoder; the adapter has vision
            prompts, beside which rows cannot be trained; the run to resume has another recipe or other arguments; a
            stage that trains rows has an eval_strategy, but no set has the training's classes; or [`GeometryTrainer`]
            raises an error.

    Reference: M. Farina et al., CVPR 2025, arXiv 2503.11609.

    Example:

    ```python
    recipe = Recipe.read("examples/recipes/two_stages.yaml")
    trainer = train_stages(recipe, model, train, processor, "outputs/two_stages")
    ZeroShotClassifier(trainer.model, processor).predict(images, ["a class of the training", "another class"])
    ```
    """
    if not recipe.stages:
        raise ValueError(f"Recipe {recipe.name} has no stages; train it with GeometryTrainer.")
    recipe.refuse_head("leave it out, and fit it on the trained model with adapt")
    if not reads_text(model) or isinstance(model, PeftModel):
        raise ValueError(
            f"train_stages needs a dual encoder without adapters, such as CLIPModel, got {type(model).__name__}."
        )
    folder, number = Path(output_dir), range(1, len(recipe.stages) + 1)
    places = [folder / f"stage-{i}" for i in number]
    arguments = [
        _arguments(recipe, stage, place, args or {}) for stage, place in zip(recipe.stages, places, strict=True)
    ]
    of_rows = _sets_of_rows(recipe, arguments, train_dataset, eval_dataset)
    if arguments[0].should_save:
        _claim(folder, recipe, args or {}, resume)
    tuned = _first_adapter(recipe, model, places, arguments[0])
    common = {"train_dataset": train_dataset, "processing_class": processing_class}
    first: Any = None
    for stage, place, own in zip(recipe.stages, places, arguments, strict=True):
        set_seed(own.seed)
        if stage.rows:
            _train_rows(first, stage, place, own, {**common, "eval_dataset": of_rows}, callbacks)
            continue
        trainer = _trainer(stage, own, callbacks, model=tuned, eval_dataset=eval_dataset, **common)
        _train_or_restore(trainer, place)
        first = first or trainer
    first.args.output_dir = str(folder)
    first.save_model()
    return first


def _arguments(recipe: Recipe, stage: Recipe, place: Path, given: Mapping[str, Any]) -> GeometryTrainingArguments:
    settings = {"report_to": "none", **without_steps({**recipe.args, **stage.args}, given), **given}
    size = settings.pop("batch_size", None)
    arguments = GeometryTrainingArguments(output_dir=str(place), **settings)
    if size is not None:
        arguments.share_batch(size)
    return arguments


def _sets_of_rows(
    recipe: Recipe,
    arguments: Sequence[GeometryTrainingArguments],
    train_dataset: Dataset,
    eval_dataset: Dataset | dict[str, Dataset] | None,
) -> Dataset | dict[str, Dataset] | None:
    """Return the evaluation sets that have the classes of the training, which have rows; None if there are none."""
    column = arguments[0].label_column

    def has_rows(dataset: Dataset) -> bool:
        return same_names(*(class_names(part, column, "train_stages") for part in (dataset, train_dataset)))

    found: Any = None
    if isinstance(eval_dataset, dict):
        found = {name: part for name, part in eval_dataset.items() if has_rows(part)} or None
    elif eval_dataset is not None and has_rows(eval_dataset):
        found = eval_dataset
    for stage, own in zip(recipe.stages, arguments, strict=True):
        if stage.rows and own.eval_strategy != "no" and found is None:
            raise ValueError(
                f"{stage.name}: its eval_strategy needs an evaluation set with the classes of "
                "the training, since only these have rows; pass one as eval_dataset, or set eval_strategy='no'."
            )
    return found


def _claim(folder: Path, recipe: Recipe, args: Mapping[str, Any], resume: bool) -> None:
    """Write a description of the run into the folder, or check that the folder holds this run."""
    content = json.dumps(
        {"recipe": recipe.source, "args": {name: repr(args[name]) for name in sorted(args)}}, indent=1
    )
    statement = folder / _STATEMENT
    if not folder.is_dir() or not any(folder.iterdir()):
        write_whole(statement, content)
    elif not statement.is_file():
        raise FileExistsError(f"{folder} is not empty and holds no run of stages; pass a new folder.")
    elif not resume:
        raise FileExistsError(
            f"{folder} is not empty; pass a new folder, or resume=True to continue its run of stages."
        )
    elif read_json(statement) != json.loads(content):
        raise ValueError(
            f"{folder} holds a run of another recipe or other arguments; pass a new folder, or those of that run."
        )


def _first_adapter(
    recipe: Recipe, model: nn.Module, places: Sequence[Path], arguments: GeometryTrainingArguments
) -> PeftModel:
    """Return the model with the adapter of the last finished stage, or with a new adapter, ready to be trained."""
    finished = [
        place for stage, place in zip(recipe.stages, places, strict=True) if not stage.rows and _is_done(place)
    ]
    if finished:
        tuned = load_adapter(finished[-1], model)
        tuned.peft_config[tuned.active_adapter].inference_mode = False
        tuned.set_adapter(tuned.active_adapter)  # makes its weights trainable
    else:
        set_seed(arguments.seed)
        assert recipe.stages[0].config is not None  # a recipe is checked when it is read
        tuned = get_peft_model(model, recipe.stages[0].config())
    if any(stage.rows for stage in recipe.stages):
        refuse_vision_prompts(tuned)
    return tuned


def _is_done(place: Path) -> bool:
    return (place / CONFIG_NAME).is_file()  # the last file of a stage


def _trainer(
    stage: Recipe, arguments: GeometryTrainingArguments, callbacks: Sequence[TrainerCallback], **parts: Any
) -> GeometryTrainer:
    trainer = GeometryTrainer(
        args=arguments,
        losses=stage.losses(),
        classification_loss=stage.classification_loss(),
        callbacks=[*stage.callbacks(), *callbacks],
        **parts,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train_or_restore(trainer: GeometryTrainer, place: Path) -> None:
    """Train a stage from its last checkpoint or from the start, or restore the state of a finished stage."""
    if _is_done(place):
        trainer.state = TrainerState.load_from_json(str(place / TRAINER_STATE_NAME))
        return
    begun = any(place.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    trainer.train(resume_from_checkpoint=last_resumable(place) if begun else None)
    trainer.save_state()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()


def _train_rows(
    first: GeometryTrainer,
    stage: Recipe,
    place: Path,
    arguments: GeometryTrainingArguments,
    common: Mapping[str, Any],
    callbacks: Sequence[TrainerCallback],
) -> None:
    """Train a row for each class on the frozen image tower, and store the rows with the adapter."""
    tuned: Any = first.extractor.model
    names, adapter = first.class_names, tuned.active_adapter
    with evaluation_mode(tuned):
        texts = ZeroShotClassifier(tuned, common["processing_class"]).text_features(names)
        frozen = fixed_classifier(unwrap(tuned), names, l2_normalize(texts), keep=True)
    if _is_done(place):
        head: Any = load_adapter(place, frozen)
    else:
        with warnings.catch_warnings():  # PEFT cannot find the head's widths, and does not need them
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            head = get_peft_model(
                frozen, LNTuningConfig(target_modules=["classifier"])
            )  # LN tuning trains a copy of the module, of any kind
    _train_or_restore(_trainer(stage, arguments, callbacks, model=head, **common), place)
    rows = head.base_model.model.classifier.ln_tuning_layers[head.active_adapter].weight.detach().clone()
    if stage.fraction != 1:
        rows = torch.lerp(l2_normalize(texts).to(rows), l2_normalize(rows), stage.fraction)
    setting = text_setting(tuned.peft_config[adapter])
    remember_text_setting(tuned, replace(setting, class_names=tuple(names), rows=rows), [adapter])
