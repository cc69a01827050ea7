"""Records of a training for its model card, with evaluations without and with the adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..data.head_names import same_names
from ..data.torch_sets import is_stream
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
from .measurement import Measurement


def record_training(trainer: Any, measure: bool = True, known_only: bool = False) -> TrainingRecord:
    """Return the record of a [`~peft_ncgeo.GeometryTrainer`]'s run, with evaluations with the adapter off and on.

    Call it on all processes; without measuring, any process may call it.

    Args:
        measure: False: leave evaluations out.
        known_only: True: use only evaluations that were already made with these weights, and make no new ones.

    Raises:
        TypeError: the trainer's model is not a `PeftModel`.
    """
    record, args = record_model(trainer.extractor.model), trainer.args
    callbacks = [c for c in trainer.callback_handler.callbacks if hasattr(c, "bind") or hasattr(c, "name")]
    terms = [
        trainer.classification_loss,
        *trainer.losses,
        trainer.mixing,
        *callbacks,
    ]  # only callbacks that take part in training
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
    record.multi_label = trainer.task.multi_label
    if not trainer.labelled and not is_stream(trainer.train_dataset):
        record.unlabelled = len(trainer.train_dataset)
    counts = trainer.training_counts()
    if counts is not None and record.multi_label:
        record.class_counts = counts.tolist()
    elif counts is not None:
        record.class_counts = counts.tolist()
        thresholds = tail_thresholds(counts)
        record.thresholds = list(thresholds) if isinstance(thresholds, tuple) else thresholds
    if measure:
        _measure(trainer, record, trainer.find_measurement if known_only else trainer.measure)
    return record


def _measure(trainer: Any, record: TrainingRecord, measure: Callable[..., Any]) -> None:
    model = trainer.extractor.model
    record.base_changed = change_of_base(model)
    for name, dataset in trainer.evaluation_sets.items():
        names = trainer.task.names(dataset, trainer.class_names)
        trained = same_names(names, record.class_names)
        entry: dict[str, Any] = {"size": 0, "classes": len(names), "trained": trained}  # a stream tells no size
        groups = (record.class_counts, record.thresholds) if trained else ()
        moments = {}
        with adapters_off(model):
            head = trainer.linear_head
            same_size = head is None or len(head.weight) == len(names)  # otherwise the adapter has a head of its own
            if same_size and not record.base_changed and (measured := measure(dataset, record.template)):
                moments["before"] = _moment(trainer, measured, *groups)
        if measured := measure(dataset, record.template):
            moments["after"] = _moment(trainer, measured, *groups)
            entry["size"] = measured.summary.size
            record.sets[name] = entry | {moment: metrics for moment, (metrics, _) in moments.items()}
            first = trained and record.geometry_set is None
            if report := trainer.last_report(measured) or (
                first and not record.multi_label and trainer.report_measured(measured, names)
            ):
                record.reports[name] = report.to_dict()
            if first:
                record.geometry_set, record.snapshots = name, drawable([snapshot for _, snapshot in moments.values()])


def _moment(trainer: Any, measured: Measurement, *groups: Any) -> tuple[dict[str, Any], Any]:
    """Return the metrics of the model in its current state on a set, with class means and classifier weights."""
    summary: Any = measured.summary
    metrics = summary.compute(measured.text_features, trainer.linear_head, *groups)
    if measured.own:
        metrics["own"] = measured.own
    return metrics, (summary.geometry.class_means, summary.geometry.weights)
