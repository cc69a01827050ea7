"""Evaluation of labelled images: each set among its own class names, with the geometry of its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction

from .. import metrics
from ..data.crops import split_views
from ..geometry.sphere import cosine_logits
from ..metrics.accuracy import accuracy, balanced_accuracy, harmonic_mean
from ..metrics.set_summary import MultiLabelSummary, SetSummary
from ..models.adapters import trained_outside
from ..models.feature_extractor import FeatureExtractor, extract_features
from ..models.heads import linear_classifier
from ..models.image_encoder import image_inputs
from ..models.text_setting import active_text_setting
from ..models.towers import logit_bias, logit_scale
from .arguments import GeometryTrainingArguments
from .callbacks.monitor import GeometryMonitor
from .features.text_share import class_features
from .label_kinds import check_multi_label_callbacks
from .measurement import Measurement, Measurements
from .metric_names import without_prefix
from .state.checkpoints import CheckpointingTrainer
from .task import ClassificationTask

_OF_TRAINER = ("loss", "model_preparation_time")  # metrics that Trainer adds to those of `compute_metrics`


def accuracy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return `accuracy` and `balanced_accuracy` of logits (N, K) against labels (N,)."""
    logits, labels = _whole(prediction)
    if labels.ndim > 1:
        raise ValueError("accuracy reads one label per image, but these have several; leave compute_metrics out.")
    predicted = logits.argmax(axis=-1)
    return {"accuracy": accuracy(predicted, labels), "balanced_accuracy": balanced_accuracy(predicted, labels)}


def multi_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return [`~peft_ncgeo.metrics.multi_label.multi_label_scores`] of logits and labels (N, K)."""
    logits, labels = _whole(prediction)
    return metrics.multi_label_scores(torch.from_numpy(logits).double().sigmoid().numpy(), labels)


def _whole(prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = (
        np.concatenate(value) if isinstance(value, list) else np.asarray(value)  # eval_do_concat_batches=False
        for value in (prediction.predictions, prediction.label_ids)
    )
    return logits, labels


class EvaluatingTrainer(CheckpointingTrainer):
    """Transformers' Trainer whose evaluations classify images among the class names of their data set."""

    args: GeometryTrainingArguments
    task: ClassificationTask
    extractor: FeatureExtractor
    class_names: list[str]
    labelled: bool
    _measurement: Measurement
    _measurements: Measurements
    _monitors: Sequence[GeometryMonitor]

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return accuracy and balanced accuracy of each set among its own class names, and the `harmonic_mean`."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            known = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if dataset not in known:
                raise ValueError(f"No evaluation set is named {dataset!r}; there are {sorted(known)}.")
            dataset = known[dataset]
        if not isinstance(dataset, dict):
            self._begin(dataset, summary=self._kept_summary(dataset))
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        base, new = (metrics.get(f"{metric_key_prefix}_{half}_accuracy") for half in ("base", "new"))
        if base is not None and new is not None:
            combined = {f"{metric_key_prefix}_harmonic_mean": harmonic_mean(base, new)}
            metrics.update(combined)
            self.log(dict(combined))
            # callbacks such as early stopping have seen only each half
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, combined)
        return metrics

    def predict(self, test_dataset: Dataset, *args: Any, **kwargs: Any) -> Any:
        """Return logits (N, K) of the set's own class names, labels and metrics."""
        self._begin(test_dataset, summary=self._kept_summary(test_dataset))
        return super().predict(test_dataset, *args, **kwargs)

    def measure(self, dataset: Dataset, template: str | None = None, keep: bool = False) -> Measurement:
        """Return the predictions of the model in its current state on a set, and their geometry.

        The result on an evaluation set of the trainer is reused if the set was evaluated with the same weights. Call
        this on all processes.

        Args:
            template: text around a class name. Default: the task's template.
            keep: True: also keep features and logits of all images.
        """
        known = self.find_measurement(dataset, template)
        if known is not None and (not keep or (known.summary is not None and known.summary.keep)):
            return known
        self._begin(dataset, template, summary=self._new_summary(keep))
        output = self._loop(
            [],
            self.get_test_dataloader(dataset),
            "Measuring",
            prediction_loss_only=None if self._has_own_metrics else True,
        )
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        return self._measurement

    def find_measurement(self, dataset: Dataset, template: str | None = None) -> Measurement | None:
        """Return the known results on an evaluation set with these weights, or None; see [`measure`]."""
        if self.task.reads_text:
            template = template or self.task.template
        settings = template, self.args.num_test_views
        return self._measurements.find(Measurement, dataset, self.extractor.model, *settings)

    def _is_kept(self, dataset: Any) -> bool:
        """Return True for a set of the trainer and a model that trains only adapters, as snapshots hold no more."""
        of_trainer = any(dataset is given for given in (*self.evaluation_sets.values(), self.train_dataset))
        return of_trainer and self.model is not None and not trained_outside(self.extractor.model)

    def _kept_summary(self, dataset: Any) -> SetSummary | None:
        """Return a summary that collects a pass and is kept for a card, or None if it is not kept."""
        return self._new_summary() if self._is_kept(dataset) else None

    def _new_summary(self, keep: bool = False) -> SetSummary:
        return MultiLabelSummary(keep) if self.task.multi_label else SetSummary(keep)

    def _begin(self, dataset: Dataset, template: str | None = None, *, summary: SetSummary | None) -> None:
        """Start a pass over a set: read its class names; `summary` collects its results."""
        if not dataset:
            raise ValueError("There is nothing to evaluate: pass eval_dataset.")
        if self.model is None:
            raise ValueError(
                "hyperparameter_search keeps no model; set its best values on trainer.args and call train() first."
            )
        check_multi_label_callbacks(self.callback_handler.callbacks, self.task.multi_label)
        names, features = self.task.names(dataset, self.class_names), None
        if self.task.reads_text:
            template = template or self.task.template
            texts = self.task.texts(names, template=template)
            with self.accelerator.autocast():
                features = class_features(self.extractor, texts, self.args.device)
            features = active_text_setting(self.extractor.model).put_rows(features, names)
        views = self.args.num_test_views
        self._measurement = Measurement(dataset, names, self.extractor.model, template, features, summary, views)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run Transformers' evaluation loop, and add the metrics of each [`GeometryMonitor`]."""
        monitors = [c for c in self.callback_handler.callbacks if isinstance(c, GeometryMonitor)]
        output = self._loop(monitors, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        for monitor in monitors:
            metrics = monitor.compute(self._measurement.text_features, self.linear_head)
            output.metrics.update({f"{prefix}_{key}": value for key, value in metrics.items()})
        return output

    def _loop(self, monitors: Sequence[GeometryMonitor], *args: Any, **kwargs: Any) -> Any:
        """Run Transformers' evaluation loop; pass its batches to the monitors, and keep results on evaluation sets."""
        self._monitors = monitors
        for monitor in monitors:
            monitor.begin()
        output = super().evaluation_loop(*args, **kwargs)
        if self._has_own_metrics:
            found = without_prefix(output.metrics or {}, kwargs.get("metric_key_prefix", "eval"))
            self._measurement.own = {name: value for name, value in found.items() if name not in _OF_TRAINER}
        if self._is_kept(self._measurement.dataset):
            self._measurements.keep(self._measurement)
        return output

    @property
    def _has_own_metrics(self) -> bool:
        return self.compute_metrics not in (None, accuracy_metrics, multi_label_metrics)

    @property
    def evaluation_sets(self) -> dict[str, Dataset]:
        """Evaluation sets of the trainer by name; one without a name is "test"."""
        given: Any = self.eval_dataset
        return given if isinstance(given, dict) else {} if given is None else {"test": given}

    @property
    def linear_head(self) -> Any:
        """Linear layer that classifies images; None for a CLIP-like model, or if the head is not one linear layer."""
        return None if self.task.reads_text else linear_classifier(self.extractor.model)

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, text = self._prepare_inputs(inputs), self._measurement.text_features
        with self.accelerator.autocast():
            views = [extract_features(self.extractor, **view) for view in split_views(image_inputs(inputs))]
        features = [view["image_features"] for view in views]
        if text is None:
            scores = [view["logits"] for view in views]
        else:
            base = self.extractor.model
            scores = [cosine_logits(own, text, logit_scale(base), logit_bias(base)) for own in features]
        logits = torch.stack(scores).mean(0)
        labels, classes = inputs["labels"], logits.shape[1]
        summary, lists = self._measurement.summary, self.task.multi_label
        if summary is not None or self._monitors:
            chances = logits.float()
            sure = chances.sigmoid() if lists else chances.softmax(-1).amax(-1)
            found = (torch.stack(features).mean(0), logits.argmax(-1), sure, labels)
            kept = (logits,) if summary is not None and summary.keep else ()
            means, predicted, sure, seen, *kept = self.accelerator.gather_for_metrics((*found, *kept))
            if summary is not None:
                summary.update(means, predicted, sure, seen, classes, self.task.reads_text, *kept)
            for monitor in self._monitors:
                monitor.update(means, seen, classes, self.task.reads_text)
        if lists:
            loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float())
        else:
            loss = nn.functional.cross_entropy(logits.float(), labels)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)
