"""CoPA on a model: its heads, and residual adapters in the backbone if it has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from .episodes import fit_heads, head_settings
from .labels import index_labels
from .leave_one_out import prototype_accuracies


def adapt_copa(
    model: nn.Module,
    support_images: Any,
    support_labels: Sequence[Any] | Tensor,
    class_names: Sequence[str] | None,
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    processor: Any,
    optimizer: Callable[..., torch.optim.Optimizer],
    adapter_lr: float,
    batch_size: int,
) -> FewShotClassifier:
    """Train CoPA's heads, or URL's, on a support set; arguments and errors are those of [`~peft_ncgeo.adapt`]."""
    encoder = ImageFeatures(model, processor)
    images = encoder.listed(support_images)
    hold_in_float32(model)
    classes, labels = index_labels(support_labels, len(images), class_names)
    # the name of the class, also inside a functools.partial
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
        chosen: Any = {"steps": steps, "lr": lr, "weight_decay": weight_decay, "optimizer": optimizer, **settings}
        trained = [module.weight for module in maps]
        # None with residual adapters: they would need training too, with passes through the backbone
        again = None if maps else partial(fit_heads, **chosen)
        try:
            heads = fit_heads(before, labels, embed=embed, maps=trained, adapter_lr=adapter_lr, **chosen)
            left_out = prototype_accuracies(before, labels, len(classes), again)
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
            **left_out,
        }
        told = {"steps": int(steps), "lr": float(lr), "weight_decay": float(weight_decay), "optimizer": called}
        weights, tau = copa_weights(model), config.temperature
        return FewShotClassifier(model, heads, prototypes, classes, tau, processor, weights, metrics, told)


@contextmanager
def _training_adapter(model: nn.Module) -> Iterator[None]:
    """Make only the active adapter trainable, and restore its weights if adapting fails or is interrupted."""
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
