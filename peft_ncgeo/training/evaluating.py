"""Evaluation of labelled images: each set over its own class names, with the geometry of its features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction

from ..data.crops import split_views
from ..geometry.sphere import cosine_logits
from ..metrics.accuracy import accuracy, balanced_accuracy, harmonic_mean
from ..metrics.set_summary import SetSummary
from ..models.adapters import trained_outside
from ..models.feature_extractor import FeatureExtractor, extract_features
from ..models.heads import linear_classifier
from ..models.image_encoder import image_inputs
from ..models.text_setting import active_text_setting
from ..models.towers import logit_bias, logit_scale
from .arguments import GeometryTrainingArguments
from .callbacks.monitor import GeometryMonitor
from .measurement import Measurement, Measurements
from .state.checkpoints import CheckpointingTrainer
from .task import ClassificationTask


def accuracy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return `accuracy` and `balanced_accuracy` of logits (N, K) against labels (N,)."""
    logits, labels = (
        np.concatenate(value) if isinstance(value, list) else np.asarray(value)  # eval_do_concat_batches=False
        for value in (prediction.predictions, prediction.label_ids)
    )
    predicted = logits.argmax(axis=-1)
    return {"accuracy": accuracy(predicted, labels), "balanced_accuracy": balanced_accuracy(predicted, labels)}


class EvaluatingTrainer(CheckpointingTrainer):
    """Transformers' Trainer whose evaluations classify images over the class names of their data set."""

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
        """Return accuracy and balanced accuracy of each set over its own class names, and the `harmonic_mean`."""
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
        """Return logits (N, K) over the set's own class names, labels and metrics."""
        self._begin(test_dataset, summary=self._kept_summary(test_dataset))
        return super().predict(test_dataset, *args, **kwargs)

    def measure(self, dataset: Dataset, template: str | None = None, keep: bool = False) -> Measurement:
        """Return predictions and geometry on a set by the model in its present state.

        An evaluation set of the trainer that was evaluated with the same weights is not predicted again. Call this
        on all processes.

        Args:
            template: text around a class name. Default: the task's template.
            keep: keep features and logits of all images too.
        """
        if self.task.reads_text:
            template = template or self.task.template
        views = self.args.num_test_views
        known = self._measurements.find(Measurement, dataset, self.extractor.model, template, views)
        if known is not None and (not keep or (known.summary is not None and known.summary.keep)):
            return known
        self._begin(dataset, template, summary=SetSummary(keep))
        output = self._loop([], self.get_test_dataloader(dataset), "Measuring", prediction_loss_only=True)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        return self._measurement

    def _is_kept(self, dataset: Any) -> bool:
        """Return True for a set of the trainer and a model that trains adapters alone, which a snapshot knows."""
        of_trainer = any(dataset is given for given in (*self.evaluation_sets.values(), self.train_dataset))
        return of_trainer and self.model is not None and not trained_outside(self.extractor.model)

    def _kept_summary(self, dataset: Any) -> SetSummary | None:
        """Return a summary to collect a pass in that is kept for a card; None if it is not kept."""
        return SetSummary() if self._is_kept(dataset) else None

    def _begin(self, dataset: Dataset, template: str | None = None, *, summary: SetSummary | None) -> None:
        """Start a pass over a set: read its class names; a summary collects its results."""
        if not dataset:
            raise ValueError("There is nothing to evaluate: pass eval_dataset.")
        if self.model is None:
            raise ValueError("A search keeps no model; set its best values on trainer.args and call train() first.")
        names, features = self.task.names(dataset, self.class_names), None
        if self.task.reads_text:
            template = template or self.task.template
            texts = self.task.texts(names, template=template).to(self.args.device)
            with self.accelerator.autocast():
                features = extract_features(self.extractor, **texts)["text_features"]
            features = active_text_setting(self.extractor.model).put_rows(features, names)
        model, views = self.extractor.model, self.args.num_test_views
        self._measurement = Measurement(dataset, model, template, features, summary, views)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run Transformers' loop, and add the metrics of each [`GeometryMonitor`]."""
        monitors = [c for c in self.callback_handler.callbacks if isinstance(c, GeometryMonitor)]
        output = self._loop(monitors, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        for monitor in monitors:
            metrics = monitor.compute(self._measurement.text_features, self.linear_head)
            output.metrics.update({f"{prefix}_{key}": value for key, value in metrics.items()})
        return output

    def _loop(self, monitors: Sequence[GeometryMonitor], *args: Any, **kwargs: Any) -> Any:
        """Run Transformers' loop; these monitors see its batches, and results on an evaluation set are kept."""
        self._monitors = monitors
        for monitor in monitors:
            monitor.begin()
        output = super().evaluation_loop(*args, **kwargs)
        if self._is_kept(self._measurement.dataset):
            self._measurements.keep(self._measurement)
        return output

    @property
    def evaluation_sets(self) -> dict[str, Dataset]:
        """Evaluation sets of the trainer by name; one without a name is "test"."""
        given: Any = self.eval_dataset
        return given if isinstance(given, dict) else {} if given is None else {"test": given}

    @property
    def linear_head(self) -> Any:
        """Linear layer that classifies images; None for a CLIP-like model, or if the head is not one such layer."""
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
        summary = self._measurement.summary
        if summary is not None or self._monitors:
            sure = logits.float().softmax(-1).amax(-1)
            found = (torch.stack(features).mean(0), logits.argmax(-1), sure, labels)
            kept = (logits,) if summary is not None and summary.keep else ()
            means, predicted, sure, seen, *kept = self.accelerator.gather_for_metrics((*found, *kept))
            if summary is not None:
                summary.update(means, predicted, sure, seen, classes, self.task.reads_text, *kept)
            for monitor in self._monitors:
                monitor.update(means, seen, classes, self.task.reads_text)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)
