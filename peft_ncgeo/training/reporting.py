"""Reports on a trained model next to cheap baselines: `trainer.report()`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from .. import reports
from ..data.crops import split_views
from ..data.head_names import same_names
from ..data.multi_label import multi_hot
from ..data.torch_sets import count_classes, is_stream, is_torch_set, known_names
from ..metrics.accuracy import accuracy, balanced_accuracy
from ..metrics.set_summary import SetSummary
from ..models.adapters import adapters_off, change_of_base
from ..models.feature_extractor import extract_features
from ..models.image_encoder import image_inputs
from ..models.templates import spelled
from ..reports.tables import SCORES, TUNED
from ..validation import short_repr
from .loading import LoadingTrainer
from .measurement import Embedding, Measurement, Reported

if TYPE_CHECKING:
    from ..reports import Report

BASELINES = ("zero-shot", "nearest class mean", "linear probe")


class ReportingTrainer(LoadingTrainer):
    """Trainer that reports the quality of its model."""

    given_counts: Sequence[int] | None

    def report(
        self,
        dataset: Dataset | str | None = None,
        validation: Dataset | str | None = None,
        baselines: Sequence[str] = BASELINES,
    ) -> Report:
        """Return scores of each class, confusions, calibration and baselines on a labelled set.

        Baselines use frozen features, those of the model with its adapters off. "zero-shot" classifies by the texts of
        the class names, for a dual encoder. For "nearest class mean" and "linear probe", fitted on the training images
        without augmentation, see [`~peft_ncgeo.reports.nearest_class_mean`] and
        [`~peft_ncgeo.reports.linear_probe`]. Every training and evaluation image is encoded once. The report names the
        baselines that the tuned model does not beat, and those that are missing, with the reason.

        The report on an evaluation set of the trainer is also part of the model card, until the model changes. Call
        this on all processes.

        Args:
            dataset: labelled images, or the name of an evaluation set. Default: the only evaluation set.
            validation: a labelled set of the same classes, or its name, to fit a temperature on; see
                [`~peft_ncgeo.reports.fit_temperature`]. The calibration is then shown without and with the
                temperature. If it is the reported set itself, the report says so.
            baselines: baselines to compute, out of the three; `()` for none.

        Raises:
            ValueError: there is no such set, or there are several and none is chosen; images have several labels; the
                validation set has other classes; or a baseline is unknown.

        Example:

        ```python
        report = trainer.report()
        print(report.to_markdown())
        report.save("outputs/report")
        ```
        """
        unknown = [name for name in baselines if name not in BASELINES]
        if unknown:
            raise ValueError(f"baselines holds {short_repr(unknown[0])}; there are {', '.join(BASELINES)}.")
        if self.task.multi_label:
            raise ValueError(
                "A report needs images with one label each; for several labels, evaluate() gives the scores, and "
                "peft_ncgeo.metrics.per_class_scores those of each class."
            )
        reported, fitted = self._named_set(dataset), None if validation is None else self._named_set(validation)
        names = self.task.names(reported, self.class_names)
        if fitted is not None and not same_names(self.task.names(fitted, self.class_names), names):
            raise ValueError("The validation set must have the classes of the reported set, in the same order.")
        measured = self.measure(reported, keep=fitted is not None)
        report = self.report_measured(measured, names)
        if fitted is not None:
            held_out = _summary(self.measure(fitted, keep=True))
            words = "the images of this report themselves" if fitted is reported else "validation images"
            logits = _summary(measured).rows("logits"), held_out.rows("logits")
            report = reports.scale_temperature(report, *logits, held_out.rows("labels"), words)
        if baselines:
            report = self._with_baselines(report, reported, baselines)
        if self._is_kept(reported):
            views = self.args.num_test_views
            self._measurements.keep(Reported(reported, self.extractor.model, measured.template, report, views))
        return report

    def report_measured(self, measured: Measurement, names: Sequence[str]) -> Report:
        """Return the report of a measurement without baselines, over class names in the order of its labels."""
        found = _summary(measured)
        counts = self.training_counts() if same_names(names, self.class_names) else None
        predicted, confidences, labels = map(found.rows, ("predicted", "confidences", "labels"))
        return reports.report_of_predictions(predicted, confidences, labels, names, counts)

    def training_counts(self) -> np.ndarray | None:
        """Return the number of training images of each class (K,); for multi-label sets, the number of its labels.

        Return None if there are no labels, or if a stream or a torch data set does not give their number.
        """
        dataset, given = self.train_dataset, self.given_counts
        if dataset is None or not self.labelled or (given is None and is_torch_set(dataset)):
            return None
        self.check_replaced()
        if self.task.multi_label:
            return multi_hot(dataset, self.args.label_column).sum(0, dtype=int)
        return count_classes(dataset, self.args.label_column, given, self.class_names)

    def check_replaced(self) -> None:
        """Check that a training set that has replaced the first one has the same classes.

        Raises:
            ValueError: its labels mean other classes.
        """
        known = known_names(self.train_dataset, self.args.label_column)
        if known and self.class_names and known != self.class_names:
            raise ValueError(
                f"trainer.train_dataset has the classes {short_repr(known)}, but the trainer was made for "
                f"{short_repr(self.class_names)}, in this order; make a new trainer."
            )

    def last_report(self, measured: Measurement) -> Report | None:
        """Return the result of [`report`] on a set with the model in its current state; None if it was not called."""
        settings = measured.template, self.args.num_test_views
        found = self._measurements.find(Reported, measured.dataset, self.extractor.model, *settings)
        return None if found is None else found.report

    def _named_set(self, dataset: Any) -> Any:
        """Return a set that is given as an object or by its name; for None, the only evaluation set."""
        known = self.evaluation_sets
        if dataset is None and len(known) == 1:
            return next(iter(known.values()))
        if dataset is None or isinstance(dataset, str):
            if dataset not in known:
                asked = (
                    "No dataset is given" if dataset is None else f"No evaluation set is named {short_repr(dataset)}"
                )
                raise ValueError(f"{asked}; pass a labelled set, or one of the names {sorted(known)}.")
            return known[dataset]
        return dataset

    def _with_baselines(self, report: Report, dataset: Any, asked: Sequence[str]) -> Report:
        changed, notes = change_of_base(self.extractor.model), list(report.notes)
        if changed:
            return replace(report, notes=(*notes, f"There are no baselines: {changed}."))
        template, found = self.task.template if self.task.reads_text else None, dict[str, np.ndarray]()
        with adapters_off(self.extractor.model):
            head = self.linear_head
            frozen: SetSummary | Embedding
            if head is None or len(head.weight) == len(report.class_names):
                frozen = _summary(self.measure(dataset, template, keep=True))  # which the card shows as before
                features = frozen.rows("features")
                if self.task.reads_text and "zero-shot" in asked:
                    found["zero-shot"] = frozen.rows("predicted")
            else:  # the adapter has a head of its own
                features = self._embed(dataset).features
            known, note = None, ""
            if set(asked) - {"zero-shot"}:
                known, note = self._training_features(report.class_names)
        if note:
            notes.append(note)
        if known is not None:
            if "nearest class mean" in asked:
                found["nearest class mean"] = reports.nearest_class_mean(*known, features)
            if "linear probe" in asked:
                found["linear probe"], how = reports.linear_probe(*known, features)
                notes.append(how)
        rows = {name: _scores(predicted, report) for name, predicted in found.items()}
        rows[TUNED] = [getattr(report, name) for name in SCORES]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=list(SCORES))
        return replace(report, baselines=table, notes=tuple(notes))

    def _training_features(self, names: Sequence[str]) -> tuple[tuple[np.ndarray, np.ndarray] | None, str]:
        """Return features (N, d) and labels (N,) of these classes' training images, and a note on missing ones."""
        missing = "Nearest class mean and linear probe are missing:"
        if self.train_dataset is None or not self.labelled or is_stream(self.train_dataset):
            return None, f"{missing} there are no labelled training images, or they are a stream."
        self.check_replaced()
        places = {spelled(name): k for k, name in enumerate(names)}
        index = np.array([places.get(spelled(name), -1) for name in self.class_names])
        few = f"{missing} fewer than two of these classes have training images."
        if (index >= 0).sum() < 2:
            return None, few
        embedded = self._embed(self.train_dataset)
        labels = index[embedded.labels]
        trained = len(set(labels[labels >= 0].tolist()))
        if trained < 2:
            return None, few
        lacking = f"{len(names) - trained} of the {len(names)} classes have no training images, so"
        note = f"{lacking} nearest class mean and linear probe never predict them." if trained < len(names) else ""
        return (embedded.features[labels >= 0], labels[labels >= 0]), note

    @torch.no_grad()
    def _embed(self, dataset: Any) -> Embedding:
        """Return a set's unnormalized features by the model in its current state; keep those of the trainer's sets."""
        model, views = self.extractor.model, self.args.num_test_views
        known = self._measurements.find(Embedding, dataset, model, views)
        if known is not None:
            return known
        loader, parts = self.get_test_dataloader(dataset), list[tuple[Tensor, Tensor]]()
        for batch in tqdm(loader, desc="Encoding", disable=self.args.disable_tqdm, leave=False):
            inputs = self._prepare_inputs(batch)
            with self.accelerator.autocast():
                shown = split_views(image_inputs(inputs))
                found = [extract_features(self.extractor, **view)["image_features"] for view in shown]
            means, labels = self.accelerator.gather_for_metrics((torch.stack(found).mean(0), inputs["labels"]))
            parts.append((means.flatten(1).float().cpu(), labels.cpu()))
        features, labels = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        embedded = Embedding(dataset, model, features, labels, views)
        if self._is_kept(dataset):
            self._measurements.keep(embedded)
        return embedded


def _summary(measured: Measurement) -> SetSummary:
    assert measured.summary is not None  # `measure` collects one
    return measured.summary


def _scores(predicted: np.ndarray, report: Report) -> list[float]:
    """Return accuracy, balanced accuracy and macro F1 of other predictions on a report's images."""
    return [
        accuracy(predicted, report.labels),
        balanced_accuracy(predicted, report.labels),
        reports.macro_f1(predicted, report.labels),
    ]
