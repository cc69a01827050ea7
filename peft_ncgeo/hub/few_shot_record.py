"""Records of few-shot adaptations, for their cards."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset

from ..classifiers.few_shot import FewShotClassifier, HeadClassifier
from ..classifiers.heads.leave_one_out import AFTER, BEFORE
from ..classifiers.zero_shot import ZeroShotClassifier
from ..data.checks import check_dataset
from ..data.images import LabelledImages
from ..data.sampling import label_array
from ..geometry.heads import Heads
from ..geometry.sphere import modality_gap
from ..metrics.accuracy import accuracy
from ..metrics.feature_geometry import FeatureGeometry
from ..metrics.set_summary import finite
from ..models.adapters import evaluation_mode
from ..models.base_model import base_name
from .record import Component, TrainingRecord, describe, drawable, library_versions, record_model


def record_few_shot(
    classifier: FewShotClassifier,
    dataset: Dataset | None = None,
    class_counts: Sequence[int] = (),
    image_column: str = "image",
    label_column: str = "label",
) -> TrainingRecord:
    """Return the record of an adaptation to a few images.

    Its values "before" are those of the nearest-prototype classifier on the backbone's own features.

    For a head on cached features, they are those of the zero-shot classifier, and there is no geometry.

    Args:
        classifier: from [`~peft_ncgeo.adapt`], around a `PeftModel`, or with a head on cached features.
        dataset: labelled images to evaluate the classifier on, with its class names. Default: the record has no
            results.
        class_counts: number of support images of each class.

    Raises:
        TypeError, ValueError: the backbone is not a `PeftModel`, or the data set has other classes.
    """
    if isinstance(classifier, HeadClassifier):
        return _record_head(classifier, dataset, class_counts, image_column, label_column)
    record = record_model(classifier.model, classifier.adapter_name)
    record.task, record.kind = "image-classification", "few-shot"
    record.terms = [Component("adapt", dict(classifier.adaptation))] if classifier.adaptation else []
    record.leave_one_out = _leave_one_out(classifier)
    record.class_names, record.class_counts = [str(name) for name in classifier.classes], list(class_counts)
    if dataset is None:
        return record
    names = record.class_names
    images, labels = _labelled(record, dataset, image_column, label_column)
    features = classifier.features(images).to(classifier.prototypes.dtype)
    entry: dict[str, Any] = {"size": len(dataset), "classes": len(names), "trained": True}
    snapshots = []
    for moment, heads in (("before", Heads.identity(features)), ("after", classifier.heads)):
        if moment == "before" and classifier.changes_backbone:
            continue  # the frozen backbone's features are no longer known
        embedded, weights = heads.embed(features, classifier.prototypes)
        monitor = FeatureGeometry(nc4=False)
        monitor.update(embedded, labels.to(features.device), len(names), reads_text=True)
        entry[moment] = {
            "accuracy": accuracy((embedded @ weights.T).argmax(-1).cpu(), labels),
            "gap": float(modality_gap(embedded, weights)),
            **finite(monitor.compute(None, SimpleNamespace(weight=weights, bias=None))),
        }
        snapshots.append((monitor.class_means, monitor.weights))
    record.sets["test"], record.geometry_set = entry, "test"
    record.snapshots = drawable(snapshots)
    return record


def _record_head(
    classifier: HeadClassifier,
    dataset: Dataset | None,
    class_counts: Sequence[int],
    image_column: str,
    label_column: str,
) -> TrainingRecord:
    model = classifier.model
    record = TrainingRecord(
        task="image-classification",
        kind="cached",
        adapter=describe(classifier.head),
        base_model=base_name(model) or None,
        template=classifier.template,
        terms=[Component("adapt", dict(classifier.adaptation))] if classifier.adaptation else [],
        leave_one_out=_leave_one_out(classifier),
        class_names=list(classifier.classes),
        class_counts=list(class_counts),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        versions=library_versions(),
    )
    if dataset is None:
        return record
    images, labels = _labelled(record, dataset, image_column, label_column)
    with evaluation_mode(model):
        texts = ZeroShotClassifier(model, classifier.processor, classifier.template)
        zero_shot = texts.predict_proba(images, classifier.classes)
    entry: dict[str, Any] = {"size": len(dataset), "classes": len(record.class_names), "trained": True}
    for moment, found in (("before", zero_shot), ("after", classifier.predict_proba(images))):
        entry[moment] = {"accuracy": accuracy(found.argmax(-1), labels)}
    record.sets["test"] = entry
    return record


def _leave_one_out(classifier: FewShotClassifier) -> dict[str, float]:
    moments = {"before": BEFORE, "after": AFTER}
    return {moment: classifier.metrics[key] for moment, key in moments.items() if key in classifier.metrics}


def _labelled(
    record: TrainingRecord, dataset: Dataset, image_column: str, label_column: str
) -> tuple[list[Any], torch.Tensor]:
    """Return the images and labels (N,) of a data set with the record's classes.

    Raises:
        ValueError: the data set has other classes.
    """
    names = check_dataset(dataset, image_column, label_column, every_class=False)
    if names != record.class_names:
        raise ValueError(f"The data set's classes {names} are not the classifier's {record.class_names}.")
    images = LabelledImages(dataset, image_column, label_column)
    labels = torch.from_numpy(label_array(dataset, label_column))
    return [images[i]["image"] for i in range(len(images))], labels
