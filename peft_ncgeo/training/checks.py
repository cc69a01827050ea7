"""Checks before training, that model, losses and arguments fit together, and checks of each term's value."""

from __future__ import annotations

import inspect
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import HubStrategy

from ..data.images import FILLER, ImageCollator
from ..geometry.checks import refuse_unless
from ..losses import CrossEntropy, GeometryBatch, Regularizer
from ..models.adapters import adapter_layers, check_adapter_weights, unwrap
from ..models.devices import check_movable
from ..models.heads import classification_head, linear_classifier, saved_head
from ..models.precision import HALF
from ..models.templates import check_template
from ..models.towers import reads_text
from ..validation import short_repr
from .arguments import GeometryTrainingArguments
from .label_kinds import reads_one_label

# arguments of Transformers' Trainer that would do nothing here or fail once training has begun -> why, and the mend
NO_PLACE = {
    "remove_unused_columns": "would drop the image column; leave it at False",
    "neftune_noise_alpha": "adds noise to embeddings of a language model, which is not what is trained; leave it out",
    "use_liger_kernel": "replaces layers of language models, which is not what is trained; leave it at False",
}


def check_arguments(args: Any, options: dict[str, Any]) -> None:
    """Raise an error for arguments that GeometryTrainer would ignore, or that would fail after training has started.

    Args:
        options: the trainer's other arguments.
    """
    if not isinstance(args, GeometryTrainingArguments):
        raise TypeError(f"args must be GeometryTrainingArguments, got {type(args).__name__}.")
    for name, reason in NO_PLACE.items():
        if value := getattr(args, name):
            raise ValueError(f"{name}={short_repr(value)} {reason}.")
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs; start one process each with `accelerate launch`, or choose one with "
            "CUDA_VISIBLE_DEVICES."
        )
    if (args.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16") and args.device.type == "cpu":
        raise ValueError("fp16=True needs a GPU: no autocast to float16 runs on a CPU; set bf16=True or neither.")
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise ValueError("dispatch_batches=True is not supported; every process reads its own images.")
    if args.world_size > 1 and not getattr(args.accelerator_config, "even_batches", True):
        raise ValueError(
            "even_batches=False is not supported on several processes, since some would wait for others; leave it at "
            "True, with which each image still counts once."
        )
    if getattr(args, "train_sampling_strategy", "random") == "group_by_length":
        raise ValueError("train_sampling_strategy='group_by_length' sorts texts by length; images have none.")
    if (options.get("model") is None) == (options.get("model_init") is None):
        raise ValueError("GeometryTrainer takes either a model, or model_init, which makes one for each training.")
    if options.get("model_init") is not None and any(options.get("optimizers") or ()):
        raise ValueError(
            "optimizers belong to one model; with model_init, choose them by optim or optimizer_cls_and_kwargs."
        )
    if args.num_test_views > 1 and options.get("data_collator") is not None:
        raise ValueError("num_test_views cuts images before the collator; leave out num_test_views or data_collator.")
    strategy = HubStrategy(args.hub_strategy).value
    if args.push_to_hub and strategy in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            f"hub_strategy={strategy!r} would publish pickled states that hold paths of this machine; "
            "use 'end' or 'every_save'."
        )
    if options.get("class_names") is not None and options.get("train_dataset") is None:
        raise ValueError(
            "class_names belong to a train_dataset without labels; pass train_dataset, or leave class_names out."
        )
    if options.get("compute_loss_func") is not None:
        raise ValueError("compute_loss_func is not read here; pass losses and classification_loss.")
    _check_metrics(args, options)


def _check_metrics(args: GeometryTrainingArguments, options: dict[str, Any]) -> None:
    """Raise an error for metric arguments that would fail at the end of the first evaluation."""
    if args.batch_eval_metrics and options.get("compute_metrics") is None:
        raise ValueError(
            "batch_eval_metrics=True needs a compute_metrics(prediction, compute_result) of your own; accuracy and "
            "balanced accuracy are computed from a whole set."
        )
    metric, sets = args.metric_for_best_model, options.get("eval_dataset")
    if metric is None or args.eval_strategy == "no" or not isinstance(sets, dict):
        return
    name = metric.removeprefix("eval_")
    of_halves = name == "harmonic_mean" and {"base", "new"} <= sets.keys()
    if not of_halves and not name.startswith(tuple(f"{key}_" for key in sets)):
        raise ValueError(
            f"metric_for_best_model={metric!r} does not say which evaluation set is meant; put one of "
            f"{', '.join(map(repr, sets))} in front, as in {next(iter(sets), 'base') + '_accuracy'!r}."
        )


def check_metric_inputs(args: GeometryTrainingArguments, reads_text: bool) -> None:
    """Raise an error if metrics ask for a CLIP's texts as inputs, since batches hold images."""
    if reads_text and "inputs" in args.include_for_metrics:
        raise ValueError(
            "include_for_metrics=['inputs'] asks for the model's 'input_ids', but batches hold images; leave it out "
            "and read them from the data set."
        )


def check_weights(model: nn.Module) -> None:
    """Raise an error for weights that cannot be trained on their device, or would be trained in half precision."""
    check_adapter_weights(model)
    check_movable(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in HALF:
            raise ValueError(
                f"{name} would be trained in {parameter.dtype}, which rounds small steps to zero; load the model "
                "with dtype=torch.float32, or train an adapter and freeze the rest."
            )


def check_templates(args: GeometryTrainingArguments, required: set[str]) -> None:
    """Check that templates have a place for the class name, and that a loss reads them."""
    for name, reader in (("student_templates", "template_features"), ("frozen_templates", "frozen_text_features")):
        templates = getattr(args, name) or []
        if not isinstance(templates, list | tuple):
            raise ValueError(f"{name}={short_repr(templates)} must be a list of templates.")
        for i, template in enumerate(templates):
            check_template(template, f"{name}[{i}]")
        if templates and reader not in required:
            raise ValueError(
                f"{name} is given, but no loss reads it; leave it out, or add a loss that reads {reader}."
            )


def check_teacher(teacher: Any, teacher_processor: Any, terms: Sequence[Any]) -> None:
    """Check that a teacher is given if a loss reads its logits, and only then."""
    readers = [term.name for term in terms if "teacher_logits" in getattr(term, "requires", ())]
    if readers and teacher is None:
        raise ValueError(
            f"{readers[0]} requires teacher_logits; pass a model that gives them to GeometryTrainer as teacher."
        )
    if not readers and (teacher is not None or teacher_processor is not None):
        given = "teacher" if teacher is not None else "teacher_processor"
        raise ValueError(f"{given} is given, but no loss reads teacher_logits; add Distillation to losses.")
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a model, got {type(teacher).__name__}; load it first.")


def find_label_reader(args: GeometryTrainingArguments, terms: Sequence[Any]) -> str:
    """Return the name of a term or argument that reads labels, or an empty text if none does."""
    readers = [getattr(term, "name", "ce") for term in terms if reads_one_label(term)]
    return next(iter([*readers, *(["class_balanced_sampling"] if args.class_balanced_sampling else [])]), "")


def check_mixing(mixing: Any, owners: Iterable[Any]) -> None:
    """Raise an error for losses and callbacks that cannot read the shares of two classes, if images are mixed."""
    for owner in owners if mixing is not None else ():
        of_classes = {"labels", "class_means", "multi_hot"}.intersection(getattr(owner, "requires", ()))
        if of_classes or (getattr(owner, "reads_labels", True) and not getattr(owner, "reads_targets", False)):
            raise ValueError(
                f"{type(owner).__name__} needs the labels of single images, but data_collator={mixing!r} mixes two "
                "images; leave one of them out."
            )


def list_losses(losses: Any) -> list[Any]:
    """Return losses as a list; accept a single term too."""
    if isinstance(losses, Regularizer):
        return [losses]
    if not isinstance(losses, Iterable):
        raise TypeError(f"losses must be a list of Regularizer terms, got {short_repr(losses)}.")
    return list(losses)


def check_losses(model: nn.Module, losses: Sequence[Regularizer], classification_loss: nn.Module | None) -> None:
    """Check kinds and names of losses, and that trainer and model have the fields that each loss requires."""
    for loss in losses:
        if not isinstance(loss, Regularizer):
            place = f"; {type(loss).__name__} belongs to classification_loss" if isinstance(loss, nn.Module) else ""
            raise TypeError(
                f"losses take Regularizer terms such as OTPreservation(weight=1.0), got {short_repr(loss)}{place}."
            )
    if classification_loss is not None:
        _check_classification_loss(classification_loss)
    terms = [*losses, *([] if classification_loss is None else [classification_loss])]
    if not terms:
        raise ValueError("Nothing to train: pass losses or a classification_loss.")
    for name, count in Counter(getattr(term, "name", "ce") for term in terms).items():
        if count > 1:
            raise ValueError(f"Two losses have the name {name!r}; give one of them another with name=...")
    offered = {each.name: each.metadata for each in fields(GeometryBatch)}  # GeometryTrainer fills all of them
    for term in terms:
        for field in getattr(term, "requires", ()):
            if field not in offered:
                raise ValueError(f"{term.name} requires {field}, which GeometryTrainer does not fill.")
            if field == "frozen_image_features" and hasattr(classification_head(model), "active_classifier"):
                raise ValueError(
                    f"{term.name} compares features with the frozen model's, which has no projector, so its features "
                    "are not those of a prototype head; leave this loss out, or train without PrototypeConfig."
                )
            if field == "classifier_weight" and reads_text(model):
                raise ValueError(f"{term.name} requires {field}, but {type(unwrap(model)).__name__} has no head.")
            if field in ("classifier_weight", "class_means") and not (reads_text(model) or linear_classifier(model)):
                raise ValueError(
                    f"{term.name} needs the weights of the head, which is not one linear layer; train a linear head "
                    f"as a whole, with {saved_head(model)} and without LoRA in it."
                )
            if offered[field].get("of_text") and not reads_text(model):
                raise ValueError(
                    f"{term.name} requires {field}, but {type(unwrap(model)).__name__} reads no text; leave this loss "
                    "out (OTPreservation takes modality='image')."
                )


def with_label_smoothing(classification_loss: nn.Module | None, share: float) -> nn.Module | None:
    """Return the classification loss with Trainer's `label_smoothing_factor`; for 0, return it unchanged.

    Raises:
        ValueError: the factor is not in 0..1, the loss is not a plain cross-entropy, or it has another share of its
            own.
    """
    if not share:
        return classification_loss
    smoothed = CrossEntropy(share)
    argument = f"label_smoothing_factor={share:g}"
    if type(classification_loss) is not CrossEntropy:
        name = "classification_loss=None" if classification_loss is None else type(classification_loss).__name__
        raise ValueError(f"{argument} smooths the labels of CrossEntropy alone, not of {name}; leave it out.")
    if classification_loss.label_smoothing not in (0.0, share):
        raise ValueError(
            f"{argument} differs from CrossEntropy(label_smoothing={classification_loss.label_smoothing:g}); set one."
        )
    return smoothed


def _check_classification_loss(loss: Any) -> None:
    if isinstance(loss, Regularizer):
        raise TypeError(f"{type(loss).__name__} belongs to losses, where its weight or budget is used.")
    expected = "classification_loss must be one module that takes a GeometryBatch, such as CrossEntropy()"
    if not isinstance(loss, nn.Module):
        raise TypeError(f"{expected}; got {short_repr(loss)}.")
    try:
        inspect.signature(loss.forward).bind("batch")
    except TypeError:
        fits = False
    else:
        fits = type(loss).__module__.partition(".")[0] != "torch"
    if not fits:
        raise TypeError(
            f"{expected}; {type(loss).__name__} does not. Derive a class from CrossEntropy whose forward(batch) "
            'calls it with what `batch.need("logits", "labels")` gives.'
        )


class CheckedCollator:
    """The user's own data collator, with a check that batches are images with labels of the right kind.

    Args:
        multi_label: True if labels are (B, K), 0 or 1; False if each image has one class.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], multi_label: bool = False) -> None:
        self.collate, self.multi_label = collate, multi_label

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(samples)
        _check_batch(batch, self.multi_label)
        return batch


def make_collator(given: Any, image_processor: Any, teacher: Any, multi_label: bool) -> Any:
    """Return the data collator of a trainer: the user's own with checks, or one of pixels for model and teacher.

    Raises:
        ValueError: a collator is given, but the teacher needs pixels of its own.
    """
    of_teacher = teacher and teacher.image_processor
    if not given:
        return ImageCollator(image_processor, of_teacher)
    if of_teacher:
        raise ValueError("data_collator gives no pixels for the teacher, which has another processor; leave it out.")
    return CheckedCollator(given, multi_label)


def _check_batch(inputs: dict[str, Any], multi_label: bool) -> None:
    labels, images = inputs.get("labels"), inputs.get("pixel_values", inputs.get("views"))
    if images is None or not isinstance(labels, Tensor):
        raise ValueError(
            f"data_collator must give 'pixel_values' (B, C, H, W) and 'labels' (B,), got {sorted(inputs)}."
        )
    if multi_label:
        if labels.dim() != 2 or not ((labels == 0) | (labels == 1) | (labels == FILLER)).all():
            raise ValueError(
                f"labels of a multi-label set must be 0 or 1, of shape (B, K), got {labels.dtype} "
                f"{tuple(labels.shape)}; leave mixup and CutMix out of data_collator, since soft labels are not read."
            )
    elif labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers of shape (B,), got {labels.dtype} {tuple(labels.shape)}. Soft labels of a "
            "collator, of mixup or CutMix, are not read: pass data_collator=MixUp(alpha) or CutMix(alpha) of "
            "peft_ncgeo.data, or give a mixed image the class with the larger share."
        )


def check_trainable(model: nn.Module) -> None:
    """Raise an error if nothing can be trained; warn if the whole model is trained, which may not be intended."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not trained:
        raise ValueError("No parameter is trainable; load an adapter with is_trainable=True to train it on.")
    if trained == sum(parameter.numel() for parameter in model.parameters()) and not adapter_layers(model):
        warnings.warn(
            f"{type(unwrap(model)).__name__} has no PEFT adapter, so all its {trained:,} parameters are trained. Wrap "
            "it with get_peft_model(model, config) to train few, or freeze those that must not change.",
            stacklevel=3,
        )


def check_term(name: str, value: Tensor, step: int) -> None:
    """Raise an error if a term's value is not a finite scalar."""
    if value.dim():
        raise ValueError(f"loss/{name} must be a scalar, got shape {tuple(value.shape)}.")
    message = "loss/{} is {} at step {}; no step was taken."
    refuse_unless(value.isfinite(), FloatingPointError, message, name, value, step)


def check_total(total: Tensor, step: int) -> None:
    """Raise an error if the weighted sum of finite terms is not finite."""
    message = (
        "The weighted sum of the losses is {} at step {}, though each is finite; no step was taken. Lower a weight, "
        "or raise a budget."
    )
    refuse_unless(total.isfinite(), FloatingPointError, message, total, step)
