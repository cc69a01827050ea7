"""What a training changed: evaluations with the adapter off and on, for a model card."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from ..data.head_names import same_names
from ..data.long_tails import class_counts
from ..hub.record import TrainingRecord, _drawable, _finite, describe, describe_arguments, record_model
from ..metrics.accuracy import accuracy, balanced_accuracy, evaluate_groups
from ..models.adapters import adapters_off, change_of_base
from ..models.heads import linear_classifier
from .callbacks.monitor import GeometryMonitor


def record_training(trainer: Any, measure: bool = True) -> TrainingRecord:
    """A run of a [`~peft_ncgeo.GeometryTrainer`], with every evaluation set evaluated with the adapter off and on.

    To be called on all processes; without the measuring on any.

    Raises:
        TypeError: the trainer's model is no `PeftModel`.
    """
    record, args = record_model(trainer.towers.model), trainer.args
    callbacks = [c for c in trainer.callback_handler.callbacks if hasattr(c, "bind") or hasattr(c, "name")]
    terms = [trainer.classification_loss, *trainer.losses, *callbacks]  # callbacks with a part in training
    record.terms = [describe(term) for term in terms if term is not None]
    record.arguments, record.changed = describe_arguments(args)
    record.seed, record.processes, record.device = args.seed, args.world_size, args.device.type
    record.steps, record.epochs = trainer.state.global_step, float(trainer.state.epoch or 0)
    if trainer.task.reads_text:
        record.template = trainer.task.template
    if trainer.train_dataset is not None:
        counts = class_counts(trainer.train_dataset, args.label_column)
        record.class_names, record.class_counts = list(trainer.class_names), counts.tolist()
        if counts.max() >= 2 * counts.min():  # else there is no tail to speak of
            record.thresholds = [20, 100] if counts.max() > 100 else "thirds"
    if measure:
        _measure(trainer, record)
    return record


def _measure(trainer: Any, record: TrainingRecord) -> None:
    given: Any = trainer.eval_dataset
    sets = given if isinstance(given, dict) else {"test": given} if given is not None else {}
    monitor = GeometryMonitor(nc4=False)
    # the frozen model reads the same template; accuracy is ours, whatever metrics are the user's
    changed = {"compute_metrics": None, "preprocess_logits_for_metrics": None}
    kept = {name: getattr(trainer, name) for name in changed}
    arguments = {"template": record.template, "prediction_loss_only": False, "eval_do_concat_batches": True}
    kept_arguments = {name: getattr(trainer.args, name) for name in arguments}
    callbacks, model = trainer.callback_handler.callbacks, trainer.towers.model
    record.base_changed = change_of_base(model)
    trainer.callback_handler.callbacks = [c for c in callbacks if not isinstance(c, GeometryMonitor)] + [monitor]
    vars(trainer).update(changed)
    vars(trainer.args).update(arguments)
    try:
        for name, dataset in sets.items():
            names = list(dataset.features[trainer.args.label_column].names)
            trained = same_names(names, record.class_names)
            entry: dict[str, Any] = {"size": len(dataset), "classes": len(names), "trained": trained}
            moments = []
            with adapters_off(model):
                head = None if trainer.task.reads_text else linear_classifier(model)
                same_size = head is None or len(head.weight) == len(names)  # else an adapter brought another head
                if same_size and not record.base_changed:
                    entry["before"] = _metrics(trainer, dataset, record, trained)
                    moments.append((monitor.class_means, monitor.weights))
            entry["after"] = _metrics(trainer, dataset, record, trained)
            moments.append((monitor.class_means, monitor.weights))
            record.sets[name] = entry
            if trained and record.geometry_set is None:
                record.geometry_set, record.moments = name, _drawable(moments)
    finally:
        vars(trainer).update(kept)
        vars(trainer.args).update(kept_arguments)
        trainer.callback_handler.callbacks = callbacks


def _metrics(trainer: Any, dataset: Dataset, record: TrainingRecord, trained: bool) -> dict[str, Any]:
    out = trainer.predict(dataset, metric_key_prefix="card")
    speeds = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    geometry = {key.removeprefix("card_"): value for key, value in (out.metrics or {}).items()}
    predictions, labels = np.asarray(out.predictions).argmax(-1), np.asarray(out.label_ids)
    metrics: dict[str, Any] = {
        "accuracy": accuracy(predictions, labels),
        "balanced_accuracy": balanced_accuracy(predictions, labels),
        **_finite({key: value for key, value in geometry.items() if key not in speeds}),
    }
    if record.thresholds is not None and trained:
        metrics.update(evaluate_groups(predictions, labels, record.class_counts, record.thresholds))
    return metrics
