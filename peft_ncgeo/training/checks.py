"""Whether model, losses and arguments fit together, said before training starts; and whether a term has a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import HubStrategy

from ..geometry.checks import check
from ..losses import Regularizer
from ..templates import is_template
from ..towers import classification_head, linear_classifier, reads_text, unwrap
from ..values import shown
from .arguments import GeometryTrainingArguments

# GeometryBatch fields that GeometryTrainer fills
OFFERED = {
    "image_features",
    "text_features",
    "labels",
    "logits",
    "logit_scale",
    "frozen_image_features",
    "frozen_text_features",
    "template_features",
    "frozen_template_features",
    "class_counts",
    "classifier_weight",
    "class_means",
    "progress",
}


def check_arguments(args: Any, options: dict[str, Any]) -> None:
    """Refuse what GeometryTrainer would silently ignore."""
    if not isinstance(args, GeometryTrainingArguments):
        raise TypeError(f"args must be GeometryTrainingArguments, got {type(args).__name__}.")
    if args.remove_unused_columns:
        raise ValueError("remove_unused_columns=True would drop the image column; leave it at False.")
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs; start one process each with `accelerate launch`, or choose one with "
            "CUDA_VISIBLE_DEVICES."
        )
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise ValueError("dispatch_batches=True is not supported; every process reads its own images.")
    strategy = HubStrategy(args.hub_strategy).value
    if args.push_to_hub and strategy in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            f"hub_strategy={strategy!r} would publish pickled states that hold paths of this machine; "
            "use 'end' or 'every_save'."
        )
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is not read here; pass a classification_loss that smooths.")
    for name in ("compute_loss_func", "model_init"):
        if options.get(name) is not None:
            raise ValueError(f"{name} is not read here; pass losses, classification_loss and a model.")


def check_templates(args: GeometryTrainingArguments, required: set[str]) -> None:
    """Templates must have a place for the name, and a loss that reads them."""
    for name, reader in (("student_templates", "template_features"), ("frozen_templates", "frozen_te")):
        templates = getattr(args, name) or []
        if not isinstance(templates, list | tuple):
            raise ValueError(f"{name}={shown(templates)} must be a list of templates.")
        for template in templates:
            if not is_template(template):
                raise ValueError(f"{name}: {shown(template)} must hold '{{}}' once, where the class name goes.")
        if templates and not any(field.startswith(reader) for field in required):
            raise ValueError(f"{name} is given, but no loss reads it.")


def list_losses(losses: Any) -> list[Any]:
    """The terms as a list; one alone is taken too."""
    if isinstance(losses, Regularizer):
        return [losses]
    if not isinstance(losses, Iterable):
        raise TypeError(f"losses must be a list of Regularizer terms, got {shown(losses)}.")
    return list(losses)


def check_losses(model: nn.Module, losses: Sequence[Regularizer], classification_loss: nn.Module | None) -> None:
    """Kinds and names must be right, and the trainer and the model must have what each loss requires."""
    for loss in losses:
        if not isinstance(loss, Regularizer):
            raise TypeError(f"losses take Regularizer terms; {type(loss).__name__} belongs to classification_loss.")
    if isinstance(classification_loss, Regularizer):
        raise TypeError(f"{type(classification_loss).__name__} belongs to losses, where its weight or budget counts.")
    if classification_loss is not None and not isinstance(classification_loss, nn.Module):
        raise TypeError(
            f"classification_loss must be one module such as CrossEntropy(), got {shown(classification_loss)}."
        )
    terms = [*losses, *([] if classification_loss is None else [classification_loss])]
    if not terms:
        raise ValueError("Nothing to train: pass losses or a classification_loss.")
    for name, count in Counter(getattr(term, "name", "ce") for term in terms).items():
        if count > 1:
            raise ValueError(f"Two losses have the name {name!r}; give one of them another with name=...")
    for term in terms:
        for field in getattr(term, "requires", ()):
            if field not in OFFERED:
                raise ValueError(f"{term.name} requires {field}, which GeometryTrainer does not fill.")
            if field == "frozen_image_features" and hasattr(classification_head(model), "active_classifier"):
                raise ValueError(
                    f"{term.name} compares features with the frozen model's, which has no projector: its features are "
                    "others than those of a prototype head."
                )
            if field == "classifier_weight" and reads_text(model):
                raise ValueError(f"{term.name} requires {field}, but {type(unwrap(model)).__name__} has no head.")
            if field in ("classifier_weight", "class_means") and not (reads_text(model) or linear_classifier(model)):
                raise ValueError(
                    f"{term.name} needs the weights of the head, which is not one linear layer; keep it with "
                    'modules_to_save=["classifier"].'
                )
            if any(word in field for word in ("text", "template", "logit_scale")) and not reads_text(model):
                raise ValueError(
                    f"{term.name} requires {field}, but {type(unwrap(model)).__name__} reads no text; use a modality "
                    "without text."
                )


def check_term(name: str, value: Tensor, step: int) -> None:
    """A term's value must be a finite scalar."""
    if value.dim():
        raise ValueError(f"loss/{name} must be a scalar, got shape {tuple(value.shape)}.")

    def refuse() -> None:
        raise FloatingPointError(f"loss/{name} is {value.item()} at step {step}; no step was taken.")

    check(torch.isfinite(value), refuse)


def check_total(total: Tensor, step: int) -> None:
    """The weighted sum of terms that are finite must be finite too."""

    def refuse() -> None:
        raise FloatingPointError(
            f"The weighted sum of the losses is {total.item()} at step {step}, though each is finite; no step was "
            "taken. Lower a weight, or raise a budget."
        )

    check(torch.isfinite(total), refuse)
