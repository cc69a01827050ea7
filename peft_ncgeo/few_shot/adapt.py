"""Few-shot adaptation: a classifier from a few labelled images, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..classifiers.few_shot import FewShotClassifier, copa_layer, copa_weights
from ..classifiers.image_features import ImageFeatures
from ..geometry.heads import class_prototypes
from ..geometry.sphere import modality_gap
from ..models.adapters import evaluation_mode
from ..models.precision import hold_in_float32
from ..tuners.copa import CoPAConfig, Residual
from ..validation import short_repr
from .episodes import ADAPTER_LR, fit_heads, head_settings


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
) -> FewShotClassifier:
    r"""Adapt a frozen backbone to the classes of a support set, a few images each.

    Heads for images and for prototypes start as the identity and minimise
    [`~peft_ncgeo.geometry.prototype_image_contrast`] over the support set (for `CoPAConfig(shared=True)`, URL's
    cross-entropy); every step uses the whole set. The images are embedded once. Only with residual adapters in the
    backbone does every step run the backbone again.

    Args:
        model: a vision backbone, which does not change; or a `PeftModel` with a [`~peft_ncgeo.CoPAConfig`], whose
            active adapter is reset and then holds the result, ready to be saved. A LoRA below it, or a prompted model
            without `CoPAConfig`, is a frozen backbone like any other.
        support_images: N PIL images, or pixels (N, C, H, W).
        support_labels: N labels, numbers or words, of at least two classes. The classifier predicts these.
        steps, lr, weight_decay: settings of the optimiser; by default CoPA's published ones for all data. URL uses
            `steps=40, weight_decay=0, optimizer=torch.optim.Adadelta` and an lr of 0.1 to 1.
        processor: the backbone's image processor. Default: loaded from the base model's name or path.
        optimizer: any torch optimiser that steps without a closure.
        adapter_lr: learning rate of residual adapters, as a share of `lr`.
        batch_size: images that go through the backbone at once, also while residual adapters are trained: activations
            of one batch are kept, the others are recomputed.

    Returns:
        A classifier with `predict(images)` and, in `metrics`, the loss and the gap between images and prototypes
        before and after, on the support set.

    Raises:
        ValueError, TypeError: one line that names the fault: fewer than two classes, not one label for each image, a
            backbone whose pooled feature is not known, features or a loss that are not finite.

    Reference: H. Tian et al., NeurIPS 2024, arXiv 2410.12474.

    Example:

    ```python
    model = get_peft_model(AutoModel.from_pretrained("facebook/dinov2-small"), CoPAConfig())
    classifier = adapt(model, images, ["heron", "heron", "stork", "stork"])
    classifier.predict(others)
    classifier.save_pretrained("birds")
    ```
    """
    encoder = ImageFeatures(model, processor)
    images = encoder.listed(support_images)
    hold_in_float32(model)
    classes, labels = _classes(support_labels)
    if len(labels) != len(images):
        raise ValueError(
            f"There are {len(images)} support images and {len(labels)} labels; pass one label for each image."
        )
    # also for functools.partial
    called = getattr(getattr(optimizer, "func", optimizer), "__name__", short_repr(optimizer))
    layer: Any = copa_layer(model)
    configs: Any = getattr(model, "peft_config", {})
    config: Any = CoPAConfig() if layer is None else configs[layer.active_name]
    settings = head_settings(config)
    maps = [module for module in model.modules() if isinstance(module, Residual) and module.active_name]
    with _training_adapter(model), evaluation_mode(model):
        for module in maps:
            module.restart()
        before = encoder.embed(images, batch_size)
        labels = labels.to(before.device)
        embed = None
        if maps:
            # tensors made in inference mode cannot be trained on
            pixels = {name: value.clone() for name, value in encoder.inputs(images).items()}
            embed = partial(encoder.embed_with_gradient, pixels, batch_size)
        diverged = ValueError(f"The loss or the features are not finite after {steps} steps; lower lr={lr}.")
        try:
            heads = fit_heads(
                before,
                labels,
                steps,
                lr,
                weight_decay,
                **settings,
                optimizer=optimizer,
                embed=embed,
                maps=[module.weight for module in maps],
                adapter_lr=adapter_lr,
            )
        except FloatingPointError:
            raise diverged from None
        if layer is not None:
            layer.set_heads(*heads)
        after = encoder.embed(images, batch_size) if maps else before
        prototypes = class_prototypes(after, labels, len(classes))
        inputs = after @ heads.image, prototypes @ heads.prototype
        lengths = torch.cat([torch.linalg.vector_norm(part, dim=-1) for part in inputs])
        if not lengths.isfinite().all():
            raise diverged
        metrics = {
            "loss": float(settings["objective"](*inputs, labels, config.temperature)),
            "gap_before": float(modality_gap(before, class_prototypes(before, labels, len(classes)))),
            "gap_after": float(modality_gap(*inputs)),
        }
        told = {"steps": int(steps), "lr": float(lr), "weight_decay": float(weight_decay), "optimizer": called}
        weights, tau = copa_weights(model), config.temperature
        return FewShotClassifier(model, heads, prototypes, classes, tau, processor, weights, metrics, told)


def _classes(labels: Sequence[Any] | Tensor) -> tuple[list[Any], Tensor]:
    """Return the classes in order, and the index of each image's class."""
    row = isinstance(labels, Iterable) and not isinstance(labels, str | bytes | Mapping | set | frozenset)
    if not row or getattr(labels, "ndim", 1) != 1:
        raise ValueError("support_labels must be a list of labels, one for each image.")
    names = [label.item() if hasattr(label, "item") else label for label in labels]
    kinds = {type(name) for name in names}
    if len(kinds) > 1 or not kinds <= {int, str, bool}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"support_labels must be all whole numbers or all words, got {found}.")
    classes = sorted(set(names))
    if len(classes) < 2:
        raise ValueError(f"Classification needs at least two classes, got {short_repr(classes)}.")
    places = {name: i for i, name in enumerate(classes)}
    return classes, torch.tensor([places[name] for name in names])


@contextmanager
def _training_adapter(model: nn.Module) -> Iterator[None]:
    """Let gradients reach the active adapter alone, and restore its weights if adapting fails or is stopped."""
    before = copa_weights(model)
    needed = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in before)
        yield
    except BaseException:
        with torch.no_grad():
            for name, value in before.items():
                model.get_parameter(name).copy_(value)
        raise
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(needed[name])
            if name in before:
                parameter.grad = None
