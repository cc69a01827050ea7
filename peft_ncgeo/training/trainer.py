"""`GeometryTrainer`: Transformers' Trainer for labelled images, with geometric losses added up."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import BatchEncoding, EvalPrediction, Trainer

from ..data.checks import check_dataset
from ..data.class_prompts import class_prompts
from ..data.images import ImageCollator, LabelledImages, crop_flip, input_size
from ..evaluation.metrics import accuracy, balanced_accuracy, harmonic_mean
from ..losses import CrossEntropy, GeometryBatch, Regularizer
from ..templates import placeholder_ids
from ..towers import classification_head, clip_logits, reads_text, text_positions, unwrap
from ..tuners.prompt_config import active_prompt_config
from .arguments import GeometryTrainingArguments
from .callbacks import NewViews
from .gathering import batch_sizes, gather_batch
from .state import load_state, save_state
from .teacher import FrozenTeacher
from .towers_module import TowersModule, encode

DEFAULT_TEMPLATE = "a photo of a {}."
# GeometryBatch fields that a loss may require of this trainer
_OFFERED = {"frozen_image_features", "frozen_text_features", "text_features", "logits", "logit_scale"}


def accuracy_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`accuracy` and `balanced_accuracy` of logits (N, K) against labels (N,)."""
    predicted, labels = np.asarray(prediction.predictions).argmax(axis=-1), np.asarray(prediction.label_ids)
    return {"accuracy": accuracy(predicted, labels), "balanced_accuracy": balanced_accuracy(predicted, labels)}


class GeometryTrainer(Trainer):
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
        losses: [`Regularizer`] terms with different names.
        classification_loss: None leaves the classification term out.
        compute_metrics: default: accuracy and balanced accuracy.

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
        args: GeometryTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        losses: Sequence[Regularizer] = (),
        classification_loss: nn.Module | None = CrossEntropy(),  # noqa: B008  it has no state
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise ValueError("GeometryTrainer needs processing_class, the model's processor.")
        self.losses, self.classification_loss = list(losses), classification_loss
        self.towers = TowersModule(model)
        self.tokenizer: Any = getattr(processing_class, "tokenizer", None)
        self.image_processor = getattr(processing_class, "image_processor", processing_class)
        self.template = self._resolve_template(model, args)
        self._check_losses(model)
        for dataset in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            if dataset is not None:
                self._class_names(dataset, args, every_class=False)
        self.class_names = [] if train_dataset is None else self._class_names(train_dataset, args, every_class=True)
        self._texts: dict[str, Tensor] = {}
        self._eval_text_features: Tensor | None = None
        self._logged: dict[str, list[Tensor]] = defaultdict(list)
        self._step_values: dict[str, list[Tensor]] = defaultdict(list)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", None) or ImageCollator(self.image_processor),
            compute_metrics=compute_metrics or accuracy_metrics,
            **kwargs,
        )
        # CLIP's forward takes **kwargs, from which Trainer concludes that the loss is scaled for accumulation already.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        self.add_callback(NewViews)
        for loss in self.losses:
            loss.to(self.args.device)
        self._required = {field for loss in self.losses for field in getattr(loss, "requires", ())}
        self.teacher: FrozenTeacher | None = None
        if any(field.startswith("frozen_") for field in self._required):
            self.teacher = FrozenTeacher(self.towers, self.tokenizer, args.frozen_templates or [self.template])
        if reads_text(model) and self.class_names:
            self._texts = dict(self._class_texts(self.class_names).to(self.args.device))

    # ---- what goes in -----------------------------------------------------------------------------------------

    def _resolve_template(self, model: nn.Module, args: GeometryTrainingArguments) -> str:
        config = active_prompt_config(model)
        if config is None:
            return args.template or DEFAULT_TEMPLATE
        if args.template not in (None, config.template):
            raise ValueError(
                f"args.template={args.template!r} differs from the adapter's own template={config.template!r}; "
                "set it in the adapter's config only."
            )
        return config.template

    def _check_losses(self, model: nn.Module) -> None:
        names = [loss.name for loss in self.losses]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"Two losses have the name {name!r}; give one of them another with name=...")
        if not self.losses and self.classification_loss is None:
            raise ValueError("Nothing to train: pass losses or a classification_loss.")
        if not reads_text(model) and classification_head(model) is None:
            raise ValueError(
                f"{type(unwrap(model)).__name__} has neither a text tower nor a classification head; train "
                "CLIPModel or an ...ForImageClassification model."
            )
        for loss in self.losses:
            for field in getattr(loss, "requires", ()):
                if field not in _OFFERED:
                    raise ValueError(f"{loss.name} requires {field}, which GeometryTrainer does not fill.")
                if "text" in field and not reads_text(model):
                    raise ValueError(
                        f"{loss.name} requires {field}, but {type(unwrap(model)).__name__} reads no text; use a "
                        "modality without text."
                    )

    def _class_names(self, dataset: Any, args: GeometryTrainingArguments, every_class: bool) -> list[str]:
        """Check one data set against columns, tokenizer and head, and return its class names."""
        names = check_dataset(dataset, args.image_column, args.label_column, every_class)
        model = self.towers.model
        if reads_text(model):
            if self.tokenizer is None:
                raise ValueError("processing_class has no tokenizer to read class names with; pass the CLIPProcessor.")
            self._class_texts(names)
        else:
            outputs = unwrap(model).config.num_labels
            if outputs != len(names):
                raise ValueError(f"The model's head has {outputs} outputs, the data set {len(names)} classes.")
        return names

    def _class_texts(self, names: Sequence[str]) -> BatchEncoding:
        model = self.towers.model
        config = active_prompt_config(model)
        slots = config.num_text_tokens if config else 0
        if config and slots and not config.placeholder_ids:  # the adapter was made without a tokenizer
            config.placeholder_ids = placeholder_ids(self.template, slots, self.tokenizer)
        return class_prompts(names, self.template, slots, self.tokenizer, max_length=text_positions(model))

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        augment = None
        if kwargs.get("is_training") and self.args.augmentation == "crop_flip":
            augment = partial(crop_flip, size=input_size(self.image_processor))
        images = LabelledImages(dataset, self.args.image_column, self.args.label_column, augment, self.args.seed)
        return super()._get_dataloader(images, *args, **kwargs)

    # ---- training ---------------------------------------------------------------------------------------------

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if not training:
            return self.towers.model
        if model is not self.towers.model:
            return model  # wrapped by an earlier train()
        return self.accelerator.prepare_model(self.towers)

    def geometry_batch(self, model: nn.Module, inputs: dict[str, Tensor]) -> GeometryBatch:
        """One pass of the student, and of the teacher where a loss asks for it, over the batch of all processes."""
        pixel_values, sizes = inputs["pixel_values"], batch_sizes(inputs["labels"])
        with self.accelerator.autocast():
            out = model(pixel_values=pixel_values, **self._texts)
            frozen_text = None
            if self.teacher is not None and "frozen_image_features" in self._required:
                out["frozen_image_features"] = self.teacher.image_features(pixel_values)
            if self.teacher is not None and "frozen_text_features" in self._required:
                frozen_text = self.teacher.text_features(self.class_names, pixel_values.device)
        text = out.pop("text_features", None)  # the same on every process, so not gathered
        gathered = {key: gather_batch(value, sizes) for key, value in {**out, "labels": inputs["labels"]}.items()}
        if text is not None:
            gathered["logit_scale"] = unwrap(self.towers.model).logit_scale
            gathered["logits"] = clip_logits(gathered["image_features"], text, gathered["logit_scale"])
        return GeometryBatch(**gathered, text_features=text, frozen_text_features=frozen_text)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        batch = self.geometry_batch(model, inputs)
        progress = self.state.global_step / max(1, self.state.max_steps)
        total = torch.zeros((), device=inputs["pixel_values"].device)
        if self.classification_loss is not None:
            name = getattr(self.classification_loss, "name", "ce")
            total = total + self._note(f"loss/{name}", self.classification_loss(batch))
        for loss in self.losses:
            value = self._note(f"loss/{loss.name}", loss(batch))
            self._step_values[loss.name].append(value.detach())
            factor = loss.factor(progress)
            total = total + factor * value
            self._note(f"lambda/{loss.name}", torch.tensor(factor))
            for key, metric in loss.metrics.items():
                self._note(key, metric)
        return (total, {"logits": batch.logits}) if return_outputs else total

    def _note(self, key: str, value: Tensor) -> Tensor:
        if key.startswith("loss/") and not torch.isfinite(value):
            step = self.state.global_step + 1
            raise FloatingPointError(f"{key} is {value.item()} at step {step}; no step was taken.")
        self._logged[key].append(value.detach())
        return value

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the optimiser steps next
            for regularizer in self.losses:
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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_state(self.losses, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(self.losses, checkpoint)

    # ---- evaluation -------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Accuracy and balanced accuracy of each set over its own class names; `harmonic_mean` of base and new."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str) and isinstance(self.eval_dataset, dict):
            dataset = self.eval_dataset[dataset]
        if not isinstance(dataset, dict):
            self._read_classes(dataset)
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        scores = [metrics.get(f"{metric_key_prefix}_{half}_accuracy", math.nan) for half in ("base", "new")]
        if not any(map(math.isnan, scores)):
            metrics[f"{metric_key_prefix}_harmonic_mean"] = harmonic_mean(*scores)
            self.log({f"{metric_key_prefix}_harmonic_mean": harmonic_mean(*scores)})
        return metrics

    def predict(self, test_dataset: Dataset, *args: Any, **kwargs: Any) -> Any:
        """Logits (N, K) over the set's own class names, labels and metrics."""
        self._read_classes(test_dataset)
        return super().predict(test_dataset, *args, **kwargs)

    def _read_classes(self, dataset: Dataset) -> None:
        if dataset is None:
            raise ValueError("There is nothing to evaluate: pass eval_dataset.")
        names = self._class_names(dataset, self.args, every_class=False)
        if reads_text(self.towers.model):
            texts = self._class_texts(names).to(self.args.device)
            with self.accelerator.autocast():
                self._eval_text_features = encode(self.towers, **texts)["text_features"]

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
            logits = clip_logits(out["image_features"], self._eval_text_features, scale)
        labels = inputs["labels"]
        loss = nn.functional.cross_entropy(logits.float(), labels)
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)
