"""Few-shot adaptation: a classifier from a few labelled images, in seconds."""

from __future__ import annotations

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

_OF_COPA = {  # published for all data
    "steps": 50,
    "lr": 1e-3,
    "weight_decay": 0.1,
    "optimizer": torch.optim.Adam,
    "adapter_lr": ADAPTER_LR,
}


@torch.inference_mode(False)
def adapt(
    model: nn.Module,
    support_images: Any,
    support_labels: Sequence[Any] | Tensor,
    steps: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    *,
    processor: Any = None,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    adapter_lr: float | None = None,
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
    cross-entropy); every step uses the whole set. The images are embedded once. Only with residual adapters in the
    backbone does every step run the backbone again.

    Other heads, from `peft_ncgeo.few_shot`, are fitted on cached features of a dual encoder, beside the texts of the
    class names: `TipAdapter`, `GaussianDiscriminant`, `LPPlusPlus`, `CLAP`. Their settings are fields of the head.

    Args:
        model: a vision backbone, which does not change; or a `PeftModel` with a [`~peft_ncgeo.CoPAConfig`], whose
            active adapter is reset and then holds the result, ready to be saved. A LoRA below it, or a prompted model
            without `CoPAConfig`, is a frozen backbone like any other. Heads other than CoPA need a dual encoder, such
            as CLIP or SigLIP, plain or tuned, and never change it.
        support_images: N PIL images, or pixels (N, C, H, W).
        support_labels: N labels, numbers or words, of at least two classes. The classifier predicts these, or
            class_names.
        steps, lr, weight_decay: settings of CoPA's optimiser; by default the published 50, 1e-3 and 0.1 for all data.
            URL uses `steps=40, weight_decay=0, optimizer=torch.optim.Adadelta` and an lr of 0.1 to 1.
        processor: the backbone's image processor, for heads other than CoPA with its tokenizer. Default: loaded from
            the base model's name or path.
        optimizer: for CoPA, any torch optimiser that steps without a closure. Default: Adam.
        adapter_lr: learning rate of CoPA's residual adapters, as a share of `lr`. Default: 0.1.
        batch_size: images that go through the backbone at once, also while residual adapters are trained: activations
            of one batch are kept, the others are recomputed.
        class_names: names of the classes, each with an image. Labels that are numbers are positions in it, words are
            names in it. Heads other than CoPA need it if the labels are numbers.
        head: the method. Default: `CoPA()`.
        num_views: randomly cropped and mirrored views of each image, for heads other than CoPA; 0: the image itself.
            Default: the head's published number; for pixels 0.
        template: text around a class name, for heads other than CoPA. Default: the adapter's own, else "a photo of a
            {}.".
        seed: of the views and of a head's training. Default: 0. CoPA draws nothing.

    Returns:
        A classifier with `predict(images)` and, in `metrics`, what was measured on the support set: for CoPA the loss
        and the gap between images and prototypes before and after, for other heads loss, accuracy, and what they
        chose.

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
    of_copa = {
        "steps": steps,
        "lr": lr,
        "weight_decay": weight_decay,
        "optimizer": optimizer,
        "adapter_lr": adapter_lr,
    }
    of_cached = {"num_views": num_views, "template": template, "seed": seed}
    if isinstance(head, FeatureHead):
        _refuse(of_copa, f"serves CoPA alone; set the fields of {type(head).__name__} instead")
        drawn: Any = {
            **of_cached,
            "seed": 0 if seed is None else seed,
            "processor": processor,
            "batch_size": batch_size,
        }
        return fit_cached(model, head, support_images, support_labels, class_names, **drawn)
    _refuse(of_cached, "is for heads on cached features, such as head=TipAdapter(); leave it out for CoPA")
    given: Any = _OF_COPA | {name: value for name, value in of_copa.items() if value is not None}
    given |= {"processor": processor, "batch_size": batch_size}
    return adapt_copa(model, support_images, support_labels, class_names, **given)


def _refuse(arguments: Mapping[str, Any], reason: str) -> None:
    """Raise if one of these arguments is given."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{name}={short_repr(value)} {reason}.")
