"""Records of a training for its model card, with evaluations with the adapter off and on."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data.head_names import same_names
from ..data.torch_sets import count_classes, is_stream, is_torch_set
from ..hub.record import (
    TrainingRecord,
    describe,
    describe_arguments,
    describe_teacher,
    drawable,
    record_model,
)
from ..models.adapters import adapters_off, change_of_base


def record_training(trainer: Any, measure: bool = True) -> TrainingRecord:
    """Return the record of a [`~peft_ncgeo.GeometryTrainer`]'s run, with evaluations with the adapter off and on.

    Call it on all processes; without measuring, any process may call it.

    Raises:
        TypeError: the trainer's model is not a `PeftModel`.
    """
    record, args = record_model(trainer.extractor.model), trainer.args
    callbacks = [c for c in trainer.callback_handler.callbacks if hasattr(c, "bind") or hasattr(c, "name")]
    terms = [trainer.classification_loss, *trainer.losses, *callbacks]  # only callbacks that take part in training
    record.terms = [describe(term) for term in terms if term is not None]
    record.arguments, record.changed = describe_arguments(args)
    record.seed, record.processes, record.device = args.seed, args.world_size, args.device.type
    record.steps, record.epochs = trainer.state.global_step, float(trainer.state.epoch or 0)
    if trainer.task.reads_text:
        record.template = trainer.task.template
        record.class_texts = {name: list(texts) for name, texts in trainer.task.class_texts.items()}
    if trainer.teacher is not None:
        record.teacher = describe_teacher(trainer.teacher.extractor.model)
    record.class_names = list(trainer.class_names)
    counts = _known_counts(trainer)
    if not trainer.labelled and not is_stream(trainer.train_dataset):
        record.unlabelled = len(trainer.train_dataset)
    if counts is not None:
        record.class_counts = counts.tolist()
        if counts.max() >= 2 * counts.min():  # otherwise the classes have no tail
            record.thresholds = [20, 100] if counts.max() > 100 else "thirds"
    if measure:
        _measure(trainer, record)
    return record


def _known_counts(trainer: Any) -> np.ndarray | None:
    """Return the number of training images of each class (K,); None where it is not known."""
    dataset, given = trainer.train_dataset, trainer.given_counts
    if dataset is None or not trainer.labelled or (given is None and is_torch_set(dataset)):
        return None
    return count_classes(dataset, trainer.args.label_column, given, trainer.class_names)


def _measure(trainer: Any, record: TrainingRecord) -> None:
    model = trainer.extractor.model
    record.base_changed = change_of_base(model)
    for name, dataset in trainer.evaluation_sets.items():
        names = trainer.task.names(dataset, trainer.class_names)
        trained = same_names(names, record.class_names)
        entry: dict[str, Any] = {"size": 0, "classes": len(names), "trained": trained}  # a stream tells no size
        snapshots = []
        groups = (record.class_counts, record.thresholds) if trained else ()
        with adapters_off(model):
            head = trainer.linear_head
            same_size = head is None or len(head.weight) == len(names)  # otherwise the adapter has a head of its own
            if same_size and not record.base_changed:
                entry["before"], moment, _ = _moment(trainer, dataset, record.template, *groups)
                snapshots.append(moment)
        entry["after"], moment, entry["size"] = _moment(trainer, dataset, record.template, *groups)
        snapshots.append(moment)
        record.sets[name] = entry
        if trained and record.geometry_set is None:
            record.geometry_set, record.snapshots = name, drawable(snapshots)


def _moment(trainer: Any, dataset: Any, template: str | None, *groups: Any) -> tuple[dict[str, Any], Any, int]:
    """Return metrics on a set, class means and classifier weights, and the number of images, of the model now."""
    measured = trainer.measure(dataset, template)
    metrics = measured.summary.compute(measured.text_features, trainer.linear_head, *groups)
    geometry = measured.summary.geometry
    return metrics, (geometry.class_means, geometry.weights), measured.summary.size
