"""Records of a training for its model card, with evaluations with the adapter off and on."""

from __future__ import annotations

from typing import Any

from ..data.head_names import same_names
from ..data.long_tails import class_counts
from ..hub.record import (
    TrainingRecord,
    describe,
    describe_arguments,
    describe_teacher,
    drawable,
    record_model,
)
from ..metrics.accuracy import tail_thresholds
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
    if trainer.teacher is not None:
        record.teacher = describe_teacher(trainer.teacher.extractor.model)
    record.class_names = list(trainer.class_names)
    if not trainer.labelled:
        record.unlabelled = len(trainer.train_dataset)
    elif trainer.train_dataset is not None:
        counts = class_counts(trainer.train_dataset, args.label_column)
        record.class_counts = counts.tolist()
        thresholds = tail_thresholds(counts)
        record.thresholds = list(thresholds) if isinstance(thresholds, tuple) else thresholds
    if measure:
        _measure(trainer, record)
    return record


def _measure(trainer: Any, record: TrainingRecord) -> None:
    model = trainer.extractor.model
    record.base_changed = change_of_base(model)
    for name, dataset in trainer.evaluation_sets.items():
        names = list(dataset.features[trainer.args.label_column].names)
        trained = same_names(names, record.class_names)
        entry: dict[str, Any] = {"size": len(dataset), "classes": len(names), "trained": trained}
        snapshots = []
        groups = (record.class_counts, record.thresholds) if trained else ()
        with adapters_off(model):
            head = trainer.linear_head
            same_size = head is None or len(head.weight) == len(names)  # otherwise the adapter has a head of its own
            if same_size and not record.base_changed:
                measured = trainer.measure(dataset, record.template)
                entry["before"], moment = _moment(trainer, measured, *groups)
                snapshots.append(moment)
        measured = trainer.measure(dataset, record.template)
        entry["after"], moment = _moment(trainer, measured, *groups)
        snapshots.append(moment)
        record.sets[name] = entry
        report = trainer.last_report(measured)
        if report is None and trained and record.geometry_set is None:
            report = trainer.report_measured(measured, names)
        if report is not None:
            record.reports[name] = report.to_dict()
        if trained and record.geometry_set is None:
            record.geometry_set, record.snapshots = name, drawable(snapshots)


def _moment(trainer: Any, measured: Any, *groups: Any) -> tuple[dict[str, Any], Any]:
    """Return the metrics of a measurement, and its class means and classifier weights."""
    metrics = measured.summary.compute(measured.text_features, trainer.linear_head, *groups)
    return metrics, (measured.summary.geometry.class_means, measured.summary.geometry.weights)
