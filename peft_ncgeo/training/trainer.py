"""`GeometryTrainer`: Transformers' Trainer for labelled images with geometric losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers.trainer_utils import enable_full_determinism, set_seed

from ..data.class_prompts import list_names
from ..data.class_texts import ClassTexts, check_entries
from ..data.crops import check_crops
from ..data.mixing import Mixing
from ..data.torch_sets import count_classes
from ..geometry.checks import DeferredChecks
from ..geometry.sphere import cosine_logits
from ..losses import CrossEntropy, GeometryBatch, Regularizer
from ..models.feature_extractor import FeatureExtractor
from ..models.heads import linear_classifier
from ..models.precision import hold_in_float32
from ..models.towers import logit_bias, logit_scale
from .arguments import GeometryTrainingArguments
from .callbacks.alignment import GradientProjection
from .callbacks.epochs import EpochSetter
from .callbacks.look_ahead import LookAhead
from .checks import (
    check_arguments,
    check_losses,
    check_metric_inputs,
    check_mixing,
    check_teacher,
    check_templates,
    check_trainable,
    check_weights,
    find_label_reader,
    make_collator,
)
from .evaluating import accuracy_metrics, multi_label_metrics
from .features.half_weights import HalfWeights, autocast_dtype
from .features.mixed import MixedBatch
from .features.step import StepFeatures
from .features.teacher import FrozenTeacher
from .features.teacher_model import TeacherModel
from .gathering import batch_sizes, gather_batch, step_sizes
from .label_kinds import check_multi_label, check_multi_label_callbacks, reads_lists
from .logit_bias import choose_logit_bias
from .measurement import Measurements
from .metric_names import with_class_names
from .model_maker import ModelMaker
from .objective import objective
from .reporting import ReportingTrainer
from .set_checks import check_sets
from .state.accumulation import Accumulation
from .state.class_means import ClassMeans
from .state.fresh_start import CallbackStates, LossFactory
from .state.text_gradient import TextGradient
from .task import ClassificationTask


class GeometryTrainer(ReportingTrainer):
    """Trainer of adapters on labelled images: a classification loss plus any number of geometric terms.

    The loss is `L = classification_loss + sum_t factor_t * losses_t`, with each term computed on the batch of all
    processes. A CLIP-like model is trained against the texts of the data set's own class names, an image
    classification model through its head. The trainer works with this package's configs and with PEFT's own (LoRA and
    others).

    Args:
        model: a `PeftModel`, or a model for `peft_config`. It may be the name or folder of a dual encoder or of an
            image classifier; the classifier gets a new head, unless it already has one output for each class.
        args: [`GeometryTrainingArguments`].
        train_dataset: a `datasets.Dataset` with an image and a `ClassLabel` column; for
            [`~peft_ncgeo.losses.MultiLabelLoss`], lists of `ClassLabel`, or of K numbers 0 and 1, see `class_names`.
            Or a stream (`IterableDataset` of `datasets` or torch; with `max_steps`) or a torch data set, whose samples
            are dicts with these columns or pairs (image, label); their class names come from the column, from the
            attribute `classes`, or from `class_names`.
        eval_dataset: one set of these kinds, or a dict of sets; each is classified among its own names. A dict with
            "base" and "new" also gives their harmonic mean. A head can only be evaluated on the classes of training,
            in the same order.
        processing_class: the model's processor (for a classification model: its image processor). Default: the one
            found where the model was loaded from.
        losses: [`Regularizer`] terms with different names, or one term.
        classification_loss: classification loss; None leaves the classification term out.
        compute_metrics: function of an `EvalPrediction`; if it has a parameter `class_names`, it gets the names of the
            evaluated set. Default: accuracy and balanced accuracy; for multi-label sets, mean average precision and
            F1.
        model_init: function that replaces `model`: it makes a new model for each training, and so for each trial of
            `hyperparameter_search`. It may take the trial, which is None outside a search. `losses` and
            `classification_loss` may then be functions of this kind too; if they are objects, each training gets
            copies (`trainer.losses`). Callbacks begin each training with their initial state.
        data_collator: Default: a collator that makes the processor's pixels. [`~peft_ncgeo.data.MixUp`] or
            [`~peft_ncgeo.data.CutMix`] mixes the images in training. On several processes, a collator of your own gets
            labels of -100 in the last batch, in padding rows.
        class_names: class names for a training set without labels, with rows of 0 and 1, or without names of its own.
            If no term reads labels (`classification_loss=None` and terms such as
            [`~peft_ncgeo.losses.Distillation`]), the label column may be absent, or hold -1 or None for some images.
            Evaluation sets need labels.
        class_counts: number of images of each class, for a loss that reads it, if the training set is a stream or a
            torch data set. Other sets are counted: there it must be left out.
        class_texts: texts of some classes, such as descriptions, as a dict from a name to a list; "{}" in a text
            stands for the name. The feature of a class is the mean of its normalised text features, normalised again.
            Prompts stand before all words of these texts. Other classes use the template. Default: the texts that the
            adapter was trained with.
        teacher: another model whose logits on the training images a loss reads, for the same class names: a larger
            CLIP, one with adapters, or an image classifier of the same classes. It is moved to the device, never
            trained, and not saved; a checkpoint resumes only with the same teacher. Fixed views (see `num_views`) are
            passed through it once.
        teacher_processor: the teacher's processor. Default: the one found where the teacher was loaded from. If its
            pixels differ from the student's, images are processed for both.
        peft_config: config of the adapter that the model gets, or each model that `model_init` makes.

    Logs of training hold the classification loss (`loss/ce` for [`CrossEntropy`]) and, for each term, `loss/<name>`,
    `lambda/<name>` (its factor) and the scalars that the term records, each as the mean since the last log. Training
    writes the class names of a head into `model.config`, and keeps the trained weights of adapters in float32.

    Under gradient accumulation, a micro-batch is weighted by its number of images, so terms that are means over images
    have the value and gradient of one large batch; terms that read only texts keep their value and gradient. Terms
    that compare samples, or divide by another number of a batch, see one micro-batch at a time; so does a trained
    batch norm.

    Raises:
        TypeError: `args`, a loss, the teacher, `peft_config` or a data set is of another type.
        OSError: a model cannot be loaded by its name.
        NotImplementedError: it is not known how the model reads texts or images.
        ValueError: model, data and losses do not fit together; or, before an optimizer step, an input is not finite.
        FloatingPointError: before an optimizer step, a term is not finite; the message names it.
    """

    args: GeometryTrainingArguments

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: GeometryTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        losses: Sequence[Regularizer] | Regularizer | Callable[..., Any] = (),
        classification_loss: nn.Module | Callable[..., Any] | None = CrossEntropy(),  # noqa: B008  it has no state
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        model_init: Callable[..., Any] | None = None,
        class_names: Sequence[str] | None = None,
        class_counts: Sequence[int] | None = None,
        class_texts: ClassTexts | None = None,
        teacher: nn.Module | None = None,
        teacher_processor: Any = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = GeometryTrainingArguments() if args is None else args
        self.mixing = kwargs.pop("data_collator") if isinstance(kwargs.get("data_collator"), Mixing) else None
        source = {"model": model, "model_init": model_init, "class_names": class_names, "train_dataset": train_dataset}
        check_arguments(args, {**source, "eval_dataset": eval_dataset, "compute_metrics": compute_metrics, **kwargs})
        check_sets(args, train_dataset, eval_dataset, class_counts)
        self.args, self.processing_class = args, processing_class
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self._given_names = None if class_names is None else list_names(class_names)
        self.given_counts, self._class_texts = class_counts, class_texts
        self._given_teacher: tuple[Any, Any] = teacher, teacher_processor
        self._checks = DeferredChecks()
        copied = model_init is not None
        self._given_losses = LossFactory(losses, classification_loss, copied, args.label_smoothing_factor)
        self._callback_states = CallbackStates()
        self._make_model = ModelMaker(peft_config, args, train_dataset, self._given_names)
        enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
        if model is None:
            self.model_init: Any = model_init
            model = self.call_model_init()
        else:
            model = self._make_model(model)
            self._adopt(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.processing_class,
            data_collator=make_collator(
                kwargs.pop("data_collator", None), self.task.image_processor, self.teacher, self.task.multi_label
            ),
            compute_metrics=with_class_names(
                compute_metrics or (multi_label_metrics if self.task.multi_label else accuracy_metrics),
                lambda: self._measurement.class_names,
            ),
            **kwargs,
        )
        self.model_init = model_init  # Trainer would have called it once more
        # CLIP's forward takes **kwargs, from which Trainer concludes that the loss is scaled for accumulation already.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False
        self.add_callback(EpochSetter)
        self.add_callback(LookAhead(self._look_ahead))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = self._make_model(super().call_model_init(trial))
        self._adopt(model, trial)
        return model

    def _adopt(self, model: nn.Module, trial: Any = None) -> None:
        """Create everything that belongs to one model, including its losses."""
        args = self.args
        self.losses, self.classification_loss = self._given_losses.for_trial(trial)
        terms = [*self.losses, *([] if self.classification_loss is None else [self.classification_loss])]
        if self.processing_class is None:
            self.processing_class = self._make_model.find_processor(model)
        self.task = ClassificationTask(model, self.processing_class, args, reads_lists(terms), self._class_texts)
        if args.num_test_views > 1:
            check_crops(self.task.image_processor)
        hold_in_float32(model)
        check_weights(model)
        check_losses(model, self.losses, self.classification_loss)
        check_multi_label(args, model, terms, self.task.multi_label)
        check_metric_inputs(args, self.task.reads_text)
        check_teacher(*self._given_teacher, terms)
        check_mixing(self.mixing, terms)
        self.class_names, self.labelled = [], True
        if self.train_dataset is not None:
            reader = find_label_reader(args, terms)
            self.class_names, self.labelled = self.task.training_names(self.train_dataset, self._given_names, reader)
        names = list(self.class_names)
        for dataset in self.evaluation_sets.values():
            names += self.task.names(dataset, self.class_names)
        if self._class_texts and names:
            check_entries(self.task.class_texts, names)
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
            given = self.given_counts, self.class_names
            self._class_counts = torch.from_numpy(count_classes(self.train_dataset, args.label_column, *given))
        self.frozen: FrozenTeacher | None = None
        if any(field.startswith("frozen_") for field in self._required):
            self.frozen = FrozenTeacher(self.extractor, self.task.frozen_texts(self.class_names))
        self.teacher: TeacherModel | None = None
        if self._given_teacher[0] is not None and self.class_names:
            self.teacher = TeacherModel(*self._given_teacher, self.task, self.class_names, args)
        self.features = StepFeatures(self.extractor, self.frozen, self.teacher, self._required, args)

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
        self.check_replaced()
        hold_in_float32(self.extractor.model)  # another adapter may have become active, or the model been cast
        bias = choose_logit_bias(self.task, self.extractor, self.train_dataset, self.class_names)
        self.task.write_names(self.class_names, bias)
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
        check_multi_label_callbacks(self.callback_handler.callbacks, self.task.multi_label)
        callbacks: list[Any] = [c for c in self.callback_handler.callbacks if hasattr(c, "bind")]
        if callbacks and not self.labelled:
            raise ValueError(f"{type(callbacks[0]).__name__} reads labels, which not all images have; leave it out.")
        check_mixing(self.mixing, callbacks)
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
        """Return the input of the losses on the batch of all processes: features of student and, if read, teacher."""
        device = inputs["labels"].device
        sizes = inputs["sizes"] if "sizes" in inputs else batch_sizes(inputs["labels"])
        mixed = MixedBatch(self.mixing, inputs, sizes, (self.args.seed, self.state.global_step))
        inputs = mixed.inputs
        with self.accelerator.autocast():
            out = self.features.student(model, inputs, self.accelerator.sync_gradients)
            out |= self.features.frozen_images(inputs) | self.features.teacher_logits(inputs)
            frozen = self.features.frozen_texts(device)
        text = out.pop("text_features", None)  # the same on every process, so not gathered
        if self.labelled:
            out["multi_hot" if self.task.multi_label else "labels"] = inputs["labels"]
        gathered: dict[str, Any] = {key: gather_batch(value, sizes) for key, value in out.items()}
        mixed.mix_labels(gathered, len(self.class_names))
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

    def _look_ahead(self, images: Any, steps: int) -> None:
        self.extractor.spare_lower_layers(self.args)
        with self.accelerator.autocast():
            self.features.look_ahead(images, self.data_collator, steps if self.mixing is None else 0)

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
        of_step = [
            {**b, "sizes": size, "micro_batch": i} for i, (b, size) in enumerate(zip(batches, sizes, strict=True))
        ]
        return of_step, sum(map(sum, sizes))

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
