"""`GeometryTrainer`: Transformers' Trainer for labelled images, with geometric losses added up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction

from ..data.images import ImageCollator, LabelledImages, crop_flip, input_size
from ..data.long_tails import class_counts
from ..data.sampling import label_array
from ..evaluation.metrics import accuracy, balanced_accuracy, harmonic_mean
from ..geometry.checks import DeferredChecks
from ..geometry.sphere import cosine_logits
from ..losses import CrossEntropy, GeometryBatch, Regularizer
from ..towers import linear_classifier, unwrap
from .alignment import GradientProjection
from .arguments import GeometryTrainingArguments
from .callbacks import GeometryMonitor, NewViews
from .checkpoints import CheckpointingTrainer
from .checks import check_arguments, check_losses, check_templates, check_term, check_total, list_losses
from .class_means import ClassMeans
from .gathering import batch_sizes, gather_batch
from .half_weights import HalfWeights
from .sampling import ClassBalancedSampler, count_once
from .step_features import StepFeatures
from .task import ClassificationTask
from .teacher import FrozenTeacher
from .text_gradient import TextGradient
from .towers_module import TowersModule, encode
from .view_features import LookAhead


def accuracy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`accuracy` and `balanced_accuracy` of logits (N, K) against labels (N,)."""
    predicted, labels = np.asarray(prediction.predictions).argmax(axis=-1), np.asarray(prediction.label_ids)
    return {"accuracy": accuracy(predicted, labels), "balanced_accuracy": balanced_accuracy(predicted, labels)}


class GeometryTrainer(CheckpointingTrainer):
    """Trains adapters on labelled images: a classification loss plus any number of geometric terms.

    `L = classification_loss + sum_t factor_t * losses_t`, each term on the batch of all processes. A CLIP-like model
    is trained against the texts of the data set's own class names; an image classification model through its head.
    Works with this package's configs and with PEFT's own (LoRA and others).

    Args:
        model: a `PeftModel`.
        args: [`GeometryTrainingArguments`].
        train_dataset: a `datasets.Dataset` with an image and a `ClassLabel` column.
        eval_dataset: one such set, or a dict of them; each is classified over its own names. A dict with "base" and
            "new" also gives their harmonic mean.
        processing_class: the model's processor (for a classification model: its image processor).
        losses: [`Regularizer`] terms with different names, or one.
        classification_loss: None leaves the classification term out.
        compute_metrics: default: accuracy and balanced accuracy.
        data_collator: default: the processor's pixels. On several processes it meets labels of -100 in the last batch,
            in rows that only fill it up.

    Logged while training: `loss/ce`, and for each term `loss/<name>`, `lambda/<name>` (its factor) and the scalars it
    notes itself, each the mean since the last log.

    Under gradient accumulation terms that compare samples see one micro-batch at a time.

    Raises:
        ValueError: before training starts, where model, data and losses do not fit together.
        FloatingPointError: while training, naming the term that is not finite, before the step is taken.
    """

    args: GeometryTrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: GeometryTrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        losses: Sequence[Regularizer] | Regularizer = (),
        classification_loss: nn.Module | None = CrossEntropy(),  # noqa: B008  it has no state
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        args = GeometryTrainingArguments() if args is None else args
        check_arguments(args, kwargs)
        self.losses = list_losses(losses)
        self.classification_loss = classification_loss
        self.task = ClassificationTask(model, processing_class, args)
        check_losses(model, self.losses, classification_loss)
        self.class_names = [] if train_dataset is None else self.task.names(train_dataset)
        for dataset in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            if dataset is not None:
                self.task.names(dataset, self.class_names)
        self._eval_text_features: Tensor | None = None
        self._logged: dict[str, list[Tensor]] = defaultdict(list)
        self._step_values: dict[str, list[Tensor]] = defaultdict(list)
        self._checks = DeferredChecks()
        self.towers = TowersModule(model)
        self._required = {
            field for term in [*self.losses, classification_loss] for field in getattr(term, "requires", ())
        }
        check_templates(args, self._required)
        self._templates = list(args.student_templates or []) if "template_features" in self._required else []
        self._bind_losses()
        self.class_means = ClassMeans(len(self.class_names)) if "class_means" in self._required else None
        self._text_gradient: TextGradient | None = None
        self._class_counts: Tensor | None = None
        if train_dataset is not None and "class_counts" in self._required:
            self._class_counts = torch.from_numpy(class_counts(train_dataset, args.label_column))
        self.teacher: FrozenTeacher | None = None
        if any(field.startswith("frozen_") for field in self._required):
            self.teacher = FrozenTeacher(self.towers, self.task.frozen_texts(self.class_names))
        self.features = StepFeatures(self.towers, self.teacher, self._required, args)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", None) or ImageCollator(self.task.image_processor),
            compute_metrics=compute_metrics or accuracy_metrics,
            **kwargs,
        )
        # CLIP's forward takes **kwargs, from which Trainer concludes that the loss is scaled for accumulation already.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        self.add_callback(NewViews)
        self.add_callback(LookAhead(self._look_ahead))
        for loss in self.losses:
            loss.to(self.args.device)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        augment = None
        if kwargs.get("is_training") and self.args.augmentation == "crop_flip":
            augment = partial(crop_flip, size=input_size(self.task.image_processor))
        columns = self.args.image_column, self.args.label_column
        images = LabelledImages(dataset, *columns, augment, self.args.seed, self.args.num_views)
        loader = super()._get_dataloader(images, *args, **kwargs)
        if kwargs.get("is_training"):
            count_once(loader)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.args.class_balanced_sampling:
            return super()._get_train_sampler(train_dataset)
        return ClassBalancedSampler(label_array(self.train_dataset, self.args.label_column), self.args.seed)

    # ---- training ---------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see [`~transformers.Trainer.train`]."""
        if not any(parameter.requires_grad for parameter in self.towers.parameters()):
            raise ValueError("No parameter is trainable; load an adapter with is_trainable=True to train it on.")
        texts: dict[str, Tensor] = {}
        if self.task.reads_text and self.class_names:  # read now: another adapter may have become active
            texts = dict(self.task.texts(self.class_names, self._templates).to(self.args.device))
        self.features.begin(texts)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        self._half_weights = HalfWeights(self.towers, half)
        self._logged.clear()
        self._step_values.clear()
        self._checks = DeferredChecks()
        self._bind_losses()  # to the adapter that is active now
        self._bind_callbacks()
        try:
            output = super().train(*args, **kwargs)
            self._checks.read()  # of the last step's dual ascent
            return output
        finally:
            self._text_gradient = None

    def _bind_losses(self) -> None:
        for loss in self.losses:
            loss.bind(linear_classifier(self.towers.model))

    def _bind_callbacks(self) -> None:
        callbacks: list[Any] = [c for c in self.callback_handler.callbacks if hasattr(c, "bind")]
        if callbacks and self.class_means is None:
            self.class_means = ClassMeans(len(self.class_names))
        if self.class_means is not None:
            self.class_means.forget_step()  # one that an interrupted run left unfinished
        for callback in callbacks:
            callback.bind(linear_classifier(self.towers.model), self.class_means, self.task.reads_text)
        changes = [c.project for c in callbacks if isinstance(c, GradientProjection)]
        if self.task.reads_text and (changes or self.args.gradient_accumulation_steps > 1):
            self._text_gradient = TextGradient(changes, len(self.class_names))

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if not training:
            return self.towers.model
        if model is not self.towers.model:
            return model  # wrapped by an earlier train()
        return self.accelerator.prepare_model(self.towers)

    def geometry_batch(self, model: nn.Module, inputs: dict[str, Tensor]) -> GeometryBatch:
        """One pass of the student, and of the teacher where a loss asks for it, over the batch of all processes."""
        device, sizes = inputs["labels"].device, batch_sizes(inputs["labels"])
        with self.accelerator.autocast():
            out = self.features.student(model, inputs, self.accelerator.sync_gradients)
            out |= self.features.frozen_images(inputs)
            frozen = self.features.frozen_texts(device)
        text = out.pop("text_features", None)  # the same on every process, so not gathered
        gathered: dict[str, Any] = {
            key: gather_batch(value, sizes) for key, value in {**out, "labels": inputs["labels"]}.items()
        }
        if self.class_means is not None:
            gathered["class_means"] = self.class_means.update(gathered["image_features"], gathered["labels"])
        if {"class_means", "classifier_weight"} & self._required and not self.task.reads_text:
            gathered["classifier_weight"] = linear_classifier(self.towers.model).weight
        if self._class_counts is not None:
            gathered["class_counts"] = self._class_counts.to(device)
        if text is not None:
            classes = len(self.class_names)
            if self._text_gradient is not None:
                text = self._text_gradient.watch(text, self.accelerator.sync_gradients)
            if "template_features" in self._required:
                templates = text[classes:] if self._templates else text
                gathered["template_features"] = templates.unflatten(0, (-1, classes)).transpose(0, 1)
            text = text[:classes]
            gathered["logit_scale"] = unwrap(self.towers.model).logit_scale
            gathered["logits"] = cosine_logits(gathered["image_features"], text, gathered["logit_scale"])
        return GeometryBatch(**gathered, **frozen, text_features=text, progress=self._progress)

    def _look_ahead(self, images: LabelledImages, steps: int) -> None:
        self.towers.spare_lower_layers(self.args)
        with self.accelerator.autocast():
            self.features.look_ahead(images, self.data_collator, steps)

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(1, self.state.max_steps)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        with self._checks:
            batch = self.geometry_batch(model, inputs)
            total = torch.zeros((), device=inputs["labels"].device)
            if self.classification_loss is None:
                # DDP waits for every parameter's gradient, also of a tower that no term looks at
                total = total + 0 * batch.need("logits")[0].sum()
            else:
                name = getattr(self.classification_loss, "name", "ce")
                total = total + self._note_loss(name, self.classification_loss(batch))
            for loss in self.losses:
                value = self._note_loss(loss.name, loss(batch))
                factor = loss.factor(self._progress)
                total = total + factor * value
                if loss.budget is not None:
                    self._step_values[loss.name].append(loss.constrained(value).detach())
                    loss.check_constrained(self._step_values[loss.name][-1])
                self._logged[f"lambda/{loss.name}"].append(torch.as_tensor(factor))
                for key, metric in loss.metrics.items():
                    self._logged[key].append(metric.detach())
            check_total(total.detach(), self.state.global_step + 1)
        self._checks.read()
        return (total, {"logits": batch.logits}) if return_outputs else total

    def _note_loss(self, name: str, value: Tensor) -> Tensor:
        check_term(name, value.detach(), self.state.global_step + 1)
        self._logged[f"loss/{name}"].append(value.detach())
        return value

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        with self._half_weights:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the optimiser steps next
            if self.class_means is not None:
                self.class_means.commit()
            with self._checks:  # read with those of the next step
                for regularizer in self.losses:
                    if regularizer.budget is not None:
                        value = torch.stack(self._step_values[regularizer.name]).mean()
                        regularizer.update(self.accelerator.reduce(value, "mean"))
            self._step_values.clear()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update({key: float(torch.stack(values).mean()) for key, values in self._logged.items()})
            self._logged.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Transformers' estimate counts text tokens, which these inputs do not have

    # ---- evaluation -------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Accuracy and balanced accuracy of each set over its own class names; `harmonic_mean` of base and new."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            known = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if dataset not in known:
                raise ValueError(f"No evaluation set is named {dataset!r}; there are {sorted(known)}.")
            dataset = known[dataset]
        if not isinstance(dataset, dict):
            self._read_classes(dataset)
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        base, new = (metrics.get(f"{metric_key_prefix}_{half}_accuracy") for half in ("base", "new"))
        if base is not None and new is not None:
            combined = {f"{metric_key_prefix}_harmonic_mean": harmonic_mean(base, new)}
            metrics.update(combined)
            self.log(dict(combined))
            # callbacks such as early stopping have seen each half only
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, combined)
        return metrics

    def predict(self, test_dataset: Dataset, *args: Any, **kwargs: Any) -> Any:
        """Logits (N, K) over the set's own class names, labels and metrics."""
        self._read_classes(test_dataset)
        return super().predict(test_dataset, *args, **kwargs)

    def _read_classes(self, dataset: Dataset) -> None:
        if not dataset:
            raise ValueError("There is nothing to evaluate: pass eval_dataset.")
        names = self.task.names(dataset, self.class_names)
        if self.task.reads_text:
            texts = self.task.texts(names).to(self.args.device)
            with self.accelerator.autocast():
                self._eval_text_features = encode(self.towers, **texts)["text_features"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' loop, with the metrics of each [`GeometryMonitor`] beside its own."""
        for monitor in self._monitors():
            monitor.begin()
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        for monitor in self._monitors():
            head = None if self.task.reads_text else linear_classifier(self.towers.model)
            metrics = monitor.compute(self._eval_text_features, head)
            output.metrics.update({f"{prefix}_{key}": value for key, value in metrics.items()})
        return output

    def _monitors(self) -> list[GeometryMonitor]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, GeometryMonitor)]

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with self.accelerator.autocast():
            out = encode(self.towers, pixel_values=inputs["pixel_values"])
        if self._eval_text_features is None:
            logits = out["logits"]
        else:
            scale = unwrap(self.towers.model).logit_scale
            logits = cosine_logits(out["image_features"], self._eval_text_features, scale)
        labels = inputs["labels"]
        if self._monitors():
            features, seen = self.accelerator.gather_for_metrics((out["image_features"], labels))
            for monitor in self._monitors():
                monitor.update(features, seen, logits.shape[1], self.task.reads_text)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)
