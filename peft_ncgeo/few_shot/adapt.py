"""Few-shot adaptation: a classifier from a few labelled images, in seconds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..classifiers.few_shot import FewShotClassifier
from ..classifiers.heads import CoPA, FeatureHead
from ..validation import short_repr
from .cached import fit_cached
from .copa import adapt_copa
from .episodes import ADAPTER_LR
from .leave_one_out import warn_if_worse


@torch.inference_mode(False)
def adapt(
    model: nn.Module,
    support_images: Any,
    support_labels: Sequence[Any] | Tensor,
    steps: int = 50,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    *,
    processor: Any = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    adapter_lr: float = ADAPTER_LR,
    batch_size: int = 64,
    class_names: Sequence[str] | None = None,
    head: CoPA | FeatureHead | None = None,
    num_views: int | None = None,
    template: str | None = None,
    seed: int | None = None,
) -> FewShotClassifier:
    r"""Adapt a frozen backbone to the classes of a support set, a few images each.

    With CoPA, the default, heads for images and for prototypes start as the identity and minimise
    [`~peft_ncgeo.geometry.prototype_image_contrast`] over the support set (for `CoPAConfig(shared=True)`, URL's
    cross-entropy); every step uses the whole set. The images are embedded once. If the backbone has residual adapters,
    every step runs the backbone again.

    Other heads, from `peft_ncgeo.few_shot`, are fitted on cached features of a dual encoder. `TipAdapter`,
    `GaussianDiscriminant`, `LPPlusPlus` and `CLAP` use images and the texts of the class names; `NearestClassMean` and
    `LinearProbe` use images only. Their settings are fields of the head.

    Args:
        model: a vision backbone, which does not change; or a `PeftModel` with a [`~peft_ncgeo.CoPAConfig`], whose
            active adapter is reset and then holds the result, ready to be saved. Other adapters, such as a LoRA below
            it or prompts without a `CoPAConfig`, stay frozen. Heads other than CoPA need a dual encoder, such as CLIP
            or SigLIP, with or without adapters, and never change it.
        support_images: N paths, PIL images or uint8 arrays (H, W, 3) or (H, W); or pixels (N, C, H, W).
        support_labels: N labels, numbers or words, of at least two classes. The classifier predicts these
            labels, or class_names if given.
        steps, lr, weight_decay: settings of CoPA's optimiser, by default the published ones for all data. URL uses
            `steps=40, weight_decay=0, optimizer=torch.optim.Adadelta` and an lr of 0.1 to 1. With other heads these
            three, optimizer and adapter_lr must keep their defaults.
        processor: the backbone's image processor; heads other than CoPA also need its tokenizer. Default: loaded from
            the base model's name or path.
        optimizer: for CoPA, any torch optimiser that steps without a closure.
        adapter_lr: learning rate of CoPA's residual adapters, as a share of `lr`.
        batch_size: images that go through the backbone at once, also while residual adapters are trained: activations
            of one batch are kept, the others are recomputed.
        class_names: names of the classes, each with an image. Labels that are numbers are positions in this list;
            labels that are words are names in it. Heads other than CoPA need it if the labels are numbers.
        head: the method. Default: `CoPA()`.
        num_views: randomly cropped and mirrored views of each image, for heads other than CoPA; 0: the image itself.
            Default: the head's published number; for pixels 0.
        template: text around a class name, for heads other than CoPA. Default: the adapter's own, else "a photo of a
            {}.".
        seed: seed of the views and of a head's training. Default: 0. CoPA draws no random numbers.

    Returns:
        A classifier with `predict(images)`. Its `metrics` are measured on the support set: for CoPA, the loss and the
        gap between images and prototypes before and after; for other heads, loss, accuracy, and the settings that the
        head chose.

        `leave_one_out_accuracy_before` and `leave_one_out_accuracy` are the accuracy on support images that the
        classifier has not seen. One image of each class is left out at a time, or a fifth of the images of a class
        that has more than five, and the head is fitted again on the features of the others. "Before" means CoPA's
        heads at the identity, or for other heads the texts alone. An image that is alone in its class is never left
        out; if this holds for all images, both values are missing. With residual adapters the second value is missing.
        If a head chose its settings by leaving images out, its accuracy here is too optimistic.

    Warns: if adapting lowered the leave-one-out accuracy.

    Raises:
        ValueError, TypeError: one line that names the fault: fewer than two classes, not one label for each image, a
            name without images, a backbone whose pooled feature is not known, features or a loss that are not finite,
            arguments that the head does not take.

    Reference: H. Tian et al., NeurIPS 2024, arXiv 2410.12474.

    Example:

    ```python
    model = get_peft_model(AutoModel.from_pretrained("facebook/dinov2-small"), CoPAConfig())
    classifier = adapt(model, images, ["heron", "heron", "stork", "stork"])
    classifier.predict(others)
    classifier.save_pretrained("birds")
    ```
    """
    if head is not None and not isinstance(head, CoPA | FeatureHead):
        raise TypeError(f"head={short_repr(head)} must be a head such as TipAdapter(), from peft_ncgeo.few_shot.")
    of_copa: Any = {"steps": steps, "lr": lr, "weight_decay": weight_decay, "optimizer": optimizer}
    of_copa["adapter_lr"] = adapter_lr
    of_cached: Any = {"num_views": num_views, "template": template, "seed": seed}
    others: Any = {"processor": processor, "batch_size": batch_size}
    if isinstance(head, FeatureHead):
        _refuse(of_copa, f"is for CoPA only; leave it out, and set the fields of {type(head).__name__} instead")
        others |= {**of_cached, "seed": 0 if seed is None else seed}
        classifier: FewShotClassifier = fit_cached(model, head, support_images, support_labels, class_names, **others)
    else:
        _refuse(of_cached, "is for heads on cached features, such as head=TipAdapter(); leave it out for CoPA")
        classifier = adapt_copa(model, support_images, support_labels, class_names, **of_copa, **others)
    warn_if_worse(classifier.metrics)
    return classifier


def _refuse(arguments: Mapping[str, Any], reason: str) -> None:
    """Raise if one of these arguments of [`adapt`] is not at its default."""
    parameters = inspect.signature(adapt).parameters
    for name, value in arguments.items():
        default = parameters[name].default
        if value is not default and value != default:
            raise ValueError(f"{name}={short_repr(value)} {reason}.")
