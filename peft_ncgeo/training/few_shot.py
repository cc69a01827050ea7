"""A classifier from a few labelled images, in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.few_shot import FewShotClassifier, copa_layer, copa_weights
from ..evaluation.image_features import ImageFeatures
from ..geometry.contrast import prototype_cross_entropy, prototype_image_contrast
from ..geometry.heads import class_prototypes
from ..geometry.sphere import modality_gap
from ..tuners.copa import CoPAConfig, Residual
from .episodes import ADAPTER_LR, Objective, fit_heads


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
    cross-entropy), all of it in every step. The images are embedded once; only residual adapters in the backbone make
    every step a pass through it.

    Args:
        model: a vision backbone, which stays as it is; or a `PeftModel` with a [`~peft_ncgeo.CoPAConfig`], whose
            active adapter starts afresh and holds the result, ready to be saved. Other adapters, prompts for instance,
            belong to the frozen backbone.
        support_images: N PIL images, or pixels (N, C, H, W).
        support_labels: N labels, numbers or words; two classes at least. The classifier answers with them.
        steps, lr, weight_decay: of the optimiser; the published ones by default, whatever the data. URL's own are
            `steps=40, lr=0.1, weight_decay=0, optimizer=torch.optim.Adadelta`.
        processor: the backbone's image processor. Default: the one that lies where the model came from.
        optimizer: any of torch's.
        adapter_lr: share of `lr` with which residual adapters learn.
        batch_size: images that go through the backbone at once, also while residual adapters are trained: activations
            of one batch are kept, the others computed again.

    Returns:
        A classifier with `predict(images)` and, in `metrics`, the loss and the gap between images and prototypes
        before and after, on the support set.

    Raises:
        ValueError, TypeError: one line that names what is wrong: fewer than two classes, other than one label an
            image, a backbone whose pooled feature is not known, features or a loss that are not finite.

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
    images = support_images if isinstance(support_images, Tensor) else encoder.listed(support_images)
    classes, labels = _classes(support_labels)
    if len(labels) != len(images):
        raise ValueError(f"There are {len(images)} support images and {len(labels)} labels.")
    layer: Any = copa_layer(model)
    configs: Any = getattr(model, "peft_config", {})
    config: Any = CoPAConfig() if layer is None else configs[layer.active_name]
    objective: Objective = prototype_cross_entropy if config.shared else prototype_image_contrast
    maps = [module for module in model.modules() if isinstance(module, Residual) and module.active_name]
    with _kept_on_error(model), _evaluation_mode(model):
        for module in maps:
            module.restart()
        before = encoder.embed(images, batch_size)
        labels = labels.to(before.device)
        embed = None
        if maps:
            pixels = encoder.pixels(images)
            embed = partial(encoder.embed_with_gradient, pixels, batch_size)
        heads = fit_heads(
            before,
            labels,
            steps,
            lr,
            weight_decay,
            shared=config.shared,
            temperature=config.temperature,
            objective=objective,
            optimizer=optimizer,
            embed=embed,
            maps=[module.weight for module in maps],
            adapter_lr=adapter_lr,
        )
        if layer is not None:
            layer.set_heads(*heads)
        after = encoder.embed(images, batch_size) if maps else before
        prototypes = class_prototypes(after, labels, len(classes))
        inputs = after @ heads.image, prototypes @ heads.prototype
        metrics = {
            "loss": float(objective(*inputs, labels, config.temperature)),
            "gap_before": float(modality_gap(before, class_prototypes(before, labels, len(classes)))),
            "gap_after": float(modality_gap(*inputs)),
        }
        if not math.isfinite(metrics["loss"]):
            raise ValueError(f"The loss is {metrics['loss']} after {steps} steps; lower lr={lr}.")
    return FewShotClassifier(
        model, heads, prototypes, classes, config.temperature, processor, copa_weights(model), metrics
    )


def _classes(labels: Sequence[Any] | Tensor) -> tuple[list[Any], Tensor]:
    """The classes in order, and each image's place among them."""
    names = [label.item() if hasattr(label, "item") else label for label in labels]
    strange = [name for name in names if not isinstance(name, int | str)]
    if strange or len({type(name) for name in names}) > 1:
        raise TypeError(f"support_labels must be whole numbers or words, got {(strange or names)[0]!r} among them.")
    classes = sorted(set(names))
    if len(classes) < 2:
        raise ValueError(f"Classification needs at least two classes, got {classes}.")
    places = {name: i for i, name in enumerate(classes)}
    return classes, torch.tensor([places[name] for name in names])


@contextmanager
def _kept_on_error(model: nn.Module) -> Iterator[None]:
    """The adapter as it was where adapting fails or is stopped; what is trained needs gradients only meanwhile."""
    names = set(copa_weights(model))
    before = [(p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters() if name in names]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(True)
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value, _ in before:
                parameter.copy_(value)
        raise
    finally:
        for parameter, _, needed in before:
            parameter.requires_grad_(needed)
            parameter.grad = None


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
