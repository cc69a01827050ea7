"""`GeometryTrainer`: Transformers' Trainer for labelled images with geometric losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.trainer_utils import enable_full_determinism, set_seed

from ..data.class_prompts import list_names
from ..data.crops import check_crops, five_crops
from ..data.images import ImageCollator, LabelledImages, crop_flip
from ..data.long_tails import class_counts
from ..data.processors import input_size
from ..data.sampling import label_array
from ..geometry.checks import DeferredChecks
from ..geometry.sphere import cosine_logits
from ..losses import CrossEntropy, GeometryBatch, Regularizer
from ..models.feature_extractor import FeatureExtractor, trained_batch_norms
from ..models.heads import linear_classifier
from ..models.precision import hold_in_float32
from ..models.towers import logit_bias, logit_scale
from .arguments import GeometryTrainingArguments
from .callbacks.alignment import GradientProjection
from .callbacks.epochs import EpochSetter
from .callbacks.look_ahead import LookAhead
from .checks import (
    CheckedCollator,
    check_arguments,
    check_losses,
    check_metric_inputs,
    check_teacher,
    check_templates,
    check_trainable,
    check_weights,
    find_label_reader,
)
from .evaluating import accuracy_metrics
from .features.half_weights import HalfWeights, autocast_dtype
from .features.step import StepFeatures
from .features.teacher import FrozenTeacher
from .features.teacher_model import TeacherModel
from .gathering import batch_sizes, gather_batch, step_sizes
from .measurement import Measurements
from .objective import objective
from .reporting import ReportingTrainer
from .sampling import ClassBalancedSampler, check_batches, count_samples_once, drop_last_only
from .state.accumulation import Accumulation
from .state.class_means import ClassMeans
from .state.fresh_start import CallbackStates, LossFactory
from .state.text_gradient import TextGradient
from .task import ClassificationTask


class GeometryTrainer(ReportingTrainer):
    """Trainer of adapters on labelled images: a classification loss plus any number of geometric terms.

    `L = classification_loss + sum_t factor_t * losses_t`, each term on the batch of all processes. A CLIP-like model
    is trained against the texts of the data set's own class names; an image classification model through its head.
    Works with this package's configs and with PEFT's own (LoRA and others).

    Args:
        model: a `PeftModel`.
        args: [`GeometryTrainingArguments`].
        train_dataset: a `datasets.Dataset` with an image and a `ClassLabel` column.
        eval_dataset: one such set, or a dict of them; each is classified over its own names. A dict with "base" and
            "new" also gives their harmonic mean. A head is evaluated on the classes of training only, in their order.
        processing_class: the model's processor (for a classification model: its image processor).
        losses: [`Regularizer`] terms with different names, or one.
        classification_loss: None leaves the classification term out.
        compute_metrics: default: accuracy and balanced accuracy.
        model_init: in place of `model`, a function that makes one for each training, so for each trial of
            `hyperparameter_search` too; it may take the trial, None outside a search. `losses` and
            `classification_loss` may then be such functions; where they are given as they are, each training gets
            copies (`trainer.losses`). Callbacks begin each training with the state that they had at first.
        data_collator: default: the processor's pixels. On several processes it meets labels of -100 in the last batch,
            in rows that only fill it up.
        class_names: class names for a training set without labels. Where no term reads labels
            (`classification_loss=None` and terms such as [`~peft_ncgeo.losses.Distillation`]), the label column may
            be absent, or hold -1 or None for some images. Evaluation sets need labels.
        teacher: another model whose logits on the training images a loss reads, over the same class names: a larger
            CLIP, one with adapters, or an image classifier of the same classes. It is moved to the device, never
            trained, and not saved; a checkpoint resumes with the same teacher only. Views that come again (see
            `num_views`) pass through it once.
        teacher_processor: its processor. Default: the one found where it was loaded from. Where its pixels differ from
            the student's, images are processed for both.

    Logged while training: `loss/ce`, and for each term `loss/<name>`, `lambda/<name>` (its factor) and the scalars it
    notes itself, each the mean since the last log.

    Training writes the class names of a head into `model.config`, and holds what adapters train in float32.

    Under gradient accumulation a micro-batch counts by its images, so terms that are means over images have the value
    and gradient of one large batch, and terms on texts alone theirs. Terms that compare samples, or divide by anything
    else of a batch, see one micro-batch at a time; so does a batch norm that is trained.

    Raises:
        ValueError: before training starts, where model, data and losses do not fit together.
        FloatingPointError: while training, naming the term that is not finite, before the step is taken.
    """

    args: GeometryTrainingArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        args: GeometryTrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        losses: Sequence[Regularizer] | Regularizer | Callable[..., Any] = (),
        classification_loss: nn.Module | Callable[..., Any] | None = CrossEntropy(),  # noqa: B008  it has no state
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        model_init: Callable[..., Any] | None = None,
        class_names: Sequence[str] | None = None,
        teacher: nn.Module | None = None,
        teacher_processor: Any = None,
        **kwargs: Any,
    ) -> None:
        args = GeometryTrainingArguments() if args is None else args
        source = {"model": model, "model_init": model_init, "class_names": class_names, "train_dataset": train_dataset}
        check_arguments(args, {**source, "eval_dataset": eval_dataset, "compute_metrics": compute_metrics, **kwargs})
        self.args, self.processing_class = args, processing_class
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self._given_names = None if class_names is None else list_names(class_names)
        self._given_teacher: tuple[Any, Any] = teacher, teacher_processor
        self._checks = DeferredChecks()
        self._given_losses = LossFactory(losses, classification_loss, copied=model_init is not None)
        self._callback_states = CallbackStates()
        if model is None:
            self.model_init: Any = model_init
            enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
            model = self.call_model_init()
        else:
            self._adopt(model)
        collator, teachers = kwargs.pop("data_collator", None), self.teacher and self.teacher.image_processor
        if collator and teachers:
            raise ValueError("data_collator gives no pixels of the teacher, whose processor is another; leave it out.")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=CheckedCollator(collator)
            if collator
            else ImageCollator(self.task.image_processor, teachers),
            compute_metrics=compute_metrics or accuracy_metrics,
            **kwargs,
        )
        self.model_init = model_init  # Trainer would have called it once more
        # CLIP's forward takes **kwargs, from which Trainer concludes that the loss is scaled for accumulation already.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        self.add_callback(EpochSetter)
        self.add_callback(LookAhead(self._look_ahead))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model: nn.Module = super().call_model_init(trial)
        self._adopt(model, trial)
        return model

    def _adopt(self, model: nn.Module, trial: Any = None) -> None:
        """Create everything that belongs to one model, including its losses."""
        args = self.args
        self.task = ClassificationTask(model, self.processing_class, args)
        if args.num_test_views > 1:
            check_crops(self.task.image_processor)
        hold_in_float32(model)
        check_weights(model)
        self.losses, self.classification_loss = self._given_losses.for_trial(trial)
        check_losses(model, self.losses, self.classification_loss)
        check_metric_inputs(args, self.task.reads_text)
        terms = [*self.losses, *([] if self.classification_loss is None else [self.classification_loss])]
        check_teacher(*self._given_teacher, terms)
        self.class_names, self.labelled = [], True
        if self.train_dataset is not None:
            reader = find_label_reader(args, terms)
            self.class_names, self.labelled = self.task.training_names(self.train_dataset, self._given_names, reader)
        for dataset in self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]:
            if dataset is not None:
                self.task.names(dataset, self.class_names)
        self._measurements = Measurements()
        self.extractor = FeatureExtractor(model, args.text_batch_size)
        self._required = {field for term in terms for field in getattr(term, "requires", ())}
        check_templates(args, self._required)
        self._templates = list(args.student_templates or []) if "template_features" in self._required else []
        for loss in self.losses:
            loss.to(args.device)
        self._bind_losses()
        self.class_means = ClassMeans(len(self.class_names)) if "class_means" in self._required else None
        self._text_gradient: TextGradient | None = None
        self._half_weights = HalfWeights(self.extractor, None)
        self._accumulation = Accumulation(self.losses)
        self._class_counts: Tensor | None = None
        if self.train_dataset is not None and "class_counts" in self._required:
            self._class_counts = torch.from_numpy(class_counts(self.train_dataset, args.label_column))
        self.frozen: FrozenTeacher | None = None
        if any(field.startswith("frozen_") for field in self._required):
            self.frozen = FrozenTeacher(self.extractor, self.task.frozen_texts(self.class_names))
        self.teacher: TeacherModel | None = None
        if self._given_teacher[0] is not None and self.class_names:
            self.teacher = TeacherModel(*self._given_teacher, self.task, self.class_names, args)
        self.features = StepFeatures(self.extractor, self.frozen, self.teacher, self._required, args)

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        augment, is_training = None, kwargs.get("is_training", False)
        if is_training and self.args.augmentation == "crop_flip":
            augment = partial(crop_flip, size=input_size(self.task.image_processor))
        columns = self.args.image_column, self.args.label_column if self.labelled or not is_training else None
        crop = None
        if not is_training and self.args.num_test_views > 1:
            crop = partial(five_crops, size=input_size(self.task.image_processor))
        images = LabelledImages(dataset, *columns, augment, self.args.seed, self.args.num_views, crop)
        images.show_teacher(is_training)
        with drop_last_only(self.args, is_training):
            loader = super()._get_dataloader(images, *args, **kwargs)
        if is_training:
            count_samples_once(loader)
            least = 2 if trained_batch_norms(self.extractor) else 1
            drop_last = self.args.dataloader_drop_last
            check_batches(loader, self._train_batch_size, self.args.world_size, least, drop_last)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.args.class_balanced_sampling:
            return super()._get_train_sampler(train_dataset)
        return ClassBalancedSampler(label_array(self.train_dataset, self.args.label_column), self.args.seed)

    # ---- training ---------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see [`~transformers.Trainer.train`]."""
        if self.model_init is not None:
            self._callback_states.begin(self.callback_handler.callbacks)
        try:
            output = super().train(*args, **kwargs)
            self._checks.read()  # of the last step's dual ascent
            return output
        finally:
            self._half_weights.__exit__()  # where a step was stopped while it put the weights back
            self._text_gradient = None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Start a training; `auto_find_batch_size` calls this again after memory ran out."""
        check_trainable(self.extractor.model)
        hold_in_float32(self.extractor.model)  # another adapter may have become active, or the model been cast
        self.task.write_names(self.class_names)
        texts: dict[str, Tensor] = {}
        if self.task.reads_text and self.class_names:  # read now: another adapter may have become active
            texts = dict(self.task.texts(self.class_names, self._templates).to(self.args.device))
        self.features.begin(texts)
        self._half_weights = HalfWeights(self.extractor, autocast_dtype(self.accelerator))
        self._checks = DeferredChecks()
        self._bind_losses()  # to the adapter that is active now
        self._bind_callbacks()
        parts = (self.features, self.class_means, self._text_gradient)
        self._accumulation = Accumulation(self.losses, [part for part in parts if part is not None])
        return super()._inner_training_loop(*args, **kwargs)

    def _bind_losses(self) -> None:
        for loss in self.losses:
            loss.bind(linear_classifier(self.extractor.model))

    def _bind_callbacks(self) -> None:
        callbacks: list[Any] = [c for c in self.callback_handler.callbacks if hasattr(c, "bind")]
        if callbacks and not self.labelled:
            raise ValueError(f"{type(callbacks[0]).__name__} reads labels, which not all images have; leave it out.")
        if callbacks and self.class_means is None:
            self.class_means = ClassMeans(len(self.class_names))
        for callback in callbacks:
            callback.bind(linear_classifier(self.extractor.model), self.class_means, self.task.reads_text)
        changes = [c.project for c in callbacks if isinstance(c, GradientProjection)]
        if self.task.reads_text and (changes or self.args.gradient_accumulation_steps > 1):
            self._text_gradient = TextGradient(changes, len(self.class_names))

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if not training:
            return self.extractor.model
        if model is not self.extractor.model:
            return model  # wrapped by an earlier train()
        return self.accelerator.prepare_model(self.extractor)

    def geometry_batch(self, model: nn.Module, inputs: dict[str, Any]) -> GeometryBatch:
        """Return one pass of the student, and of the teacher if a loss asks for it, on the batch of all processes."""
        device = inputs["labels"].device
        sizes = inputs["sizes"] if "sizes" in inputs else batch_sizes(inputs["labels"])
        with self.accelerator.autocast():
            out = self.features.student(model, inputs, self.accelerator.sync_gradients)
            out |= self.features.frozen_images(inputs) | self.features.teacher_logits(inputs)
            frozen = self.features.frozen_texts(device)
        text = out.pop("text_features", None)  # the same on every process, so not gathered
        if self.labelled:
            out["labels"] = inputs["labels"]
        gathered: dict[str, Any] = {key: gather_batch(value, sizes) for key, value in out.items()}
        if self.class_means is not None:
            gathered["class_means"] = self.class_means.update(gathered["image_features"], gathered["labels"])
        if {"class_means", "classifier_weight"} & self._required and not self.task.reads_text:
            gathered["classifier_weight"] = linear_classifier(self.extractor.model).weight
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
            scale, bias = logit_scale(self.extractor.model), logit_bias(self.extractor.model)
            gathered["logit_scale"] = scale
            gathered["logits"] = cosine_logits(gathered["image_features"], text, scale, bias)
        return GeometryBatch(**gathered, **frozen, text_features=text, progress=self._progress)

    def _look_ahead(self, images: LabelledImages, steps: int) -> None:
        self.extractor.spare_lower_layers(self.args)
        with self.accelerator.autocast():
            self.features.look_ahead(images, self.data_collator, steps)

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(1, self.state.max_steps)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], int]:
        """Return a step's micro-batches, each with its images on every process, and the step's number of images."""
        if self.state.global_step >= self.state.max_steps:  # resumed from the last checkpoint of a training that ended
            self.control.should_training_stop = True
            return [], 0
        batches, _ = super().get_batch_samples(*args, **kwargs)
        self._accumulation.begin()
        sizes = step_sizes([batch["labels"] for batch in batches])
        return [{**batch, "sizes": size} for batch, size in zip(batches, sizes, strict=True)], sum(map(sum, sizes))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        with self._checks:
            batch = self.geometry_batch(model, inputs)
            value = objective(batch, self.classification_loss, self.losses, self.state.global_step + 1)
            logits: Any = batch.logits
            images = len(logits)
            step_images = num_items_in_batch or images
            self._accumulation.add(value.noted, value.constrained, images / step_images)
        self._checks.read()
        total = value.total
        if num_items_in_batch:  # a mean over the step's images, after Trainer has divided by the micro-batches
            total = total * (images * self.current_gradient_accumulation_steps / num_items_in_batch)
        return (total, {"logits": batch.logits}) if return_outputs else total

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        with self._half_weights:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the optimiser steps next
            with self._checks:  # read with those of the next step
                self._accumulation.end()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._accumulation.read_log())
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Transformers' estimate counts text tokens, which these inputs do not have
