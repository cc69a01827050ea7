"""Interpolation between the frozen and the tuned model, after training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.adapters import adapter_layers, base_change_of, check_adapter_weights
from ..models.post_hoc import forget_change, remember_change
from ..models.text_setting import text_setting
from .aligned import SetEncoder
from .sweep import Sweep, check_fractions, check_metric, count_classes, read_fraction, score


@dataclass
class Interpolation:
    """Result of [`interpolate`].

    Attributes:
        fraction: position on the way from the frozen model (0) to the tuned one (1).
        adapter_name: the adapter that was changed.
        basis: text on how a sweep chose the fraction, with the number of validation images per class; else empty.
    """

    fraction: float
    adapter_name: str
    _tuned: list[tuple[Tensor, Tensor]] = field(repr=False)
    basis: str = ""
    _model: Any = field(default=None, repr=False)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the adapter's weights."""
        for tensor, tuned in self._tuned:
            tensor.copy_(tuned)
        if self._model is not None:
            forget_change(self._model, self.adapter_name, self._change)

    @property
    def _change(self) -> str:
        return f"the adapter was moved to {self.fraction:g} of the way from the frozen model" + (
            f", {self.basis}" if self.basis else ""
        )


@torch.no_grad()
def interpolate(model: nn.Module, fraction: float | Sweep, adapter_name: str | None = None) -> Interpolation:
    r"""Move a tuned model back towards the frozen one (WiSE-FT): `theta(a) = (1 - a) theta_0 + a theta_1`.

    LoRA becomes `W + a s B A`: its matrices B are scaled by a. Layer norms of PEFT's `LNTuningConfig` and modules in
    `modules_to_save`, such as a head, are mixed with the base model's own, tensor by tensor: the base model's head
    must be meaningful, for instance the one of [`~peft_ncgeo.ImageClassifier.from_backbone`] with `init="texts"`.
    The adapter is changed in place, so that you can save, merge and export it as usual. Only rounding is lost.

    Args:
        model: a `PeftModel`.
        fraction: a, 0 (the frozen model) to 1 (no change); the paper recommends 0.5. A second call starts from the
            result of the first. The result of [`sweep_interpolation`] is accepted too: it chooses a.
        adapter_name: the adapter to change. Default: the active adapter.

    Raises:
        TypeError: the model is not a `PeftModel`.
        ValueError: the fraction is out of range, or the adapter is unknown, is merged, took weights out of the base
            model, or is of a kind that cannot be mixed: prompts, for instance, have no frozen value.

    Reference: M. Wortsman et al., CVPR 2022, arXiv 2109.01903.

    Example:

    ```python
    sweep = sweep_interpolation(model, validation, processing_class=processor)
    mixed = interpolate(model, sweep)
    mixed.undo()
    ```
    """
    fraction, basis = read_fraction(fraction)
    if not isinstance(model, PeftModel):
        raise TypeError(f"interpolate needs a PeftModel, got {type(model).__name__}; make one with get_peft_model.")
    name = _find_adapter(model, adapter_name)
    check_adapter_weights(model)
    pairs = list(_pairs(model, name))
    tuned = [(tensor, tensor.detach().clone()) for tensor, _ in pairs]
    try:
        for tensor, frozen in pairs:
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensor.copy_(torch.lerp(frozen.to(tensor.device, wide), tensor.to(wide), fraction))
    except BaseException:  # also Ctrl-C: without a result the caller cannot undo it
        Interpolation(fraction, name, tuned).undo()
        raise
    mixed = Interpolation(fraction, name, tuned, basis, model)
    remember_change(model, name, mixed._change)
    return mixed


def sweep_interpolation(
    model: nn.Module,
    validation: Dataset,
    fractions: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    processing_class: Any = None,
    adapter_name: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    batch_size: int = 64,
    template: str | None = None,
    metric: str = "balanced_accuracy",
) -> Sweep:
    """Return the accuracy that [`interpolate`] would give for each fraction; the model does not change.

    Every image is encoded once for each fraction.

    Args:
        validation: labelled images to measure accuracies on; not the training images, which the tuned model fits
            already.
        fractions: numbers from 0 to 1.
        model, adapter_name: see [`interpolate`].
        processing_class, image_column, label_column, batch_size, template: see
            [`~peft_ncgeo.training.align_classifier`].
        metric: measure that chooses the best fraction: "balanced_accuracy" or "accuracy".

    Returns:
        A list of one row for each fraction: `fraction`, `accuracy`, `balanced_accuracy`. Its `best` is the chosen row;
        `class_counts` are the numbers of validation images of each class.

    Warns: if a class has fewer than 5 validation images.

    Raises:
        TypeError, ValueError: `metric` is unknown, no processor is found, the images do not fit, or as in
            [`interpolate`].
    """
    fractions, metric, counts, names = check_fractions(fractions), check_metric(metric), [], None
    encoder = SetEncoder(model, processing_class, image_column, label_column, batch_size, template)
    rows = []
    for fraction in tqdm(fractions, desc="Interpolating", unit="fraction"):
        mixed = interpolate(model, fraction, adapter_name)
        try:
            judged = encoder.collect(validation)
            predicted = encoder.scores(judged.features, *encoder.rows(judged)).argmax(-1)
        finally:
            mixed.undo()
        rows.append({"fraction": float(fraction), **score(predicted, judged.labels)})
        counts, names = count_classes(judged.labels, len(judged.means)), judged.names
    return Sweep(rows, metric, counts, names)


def _find_adapter(model: PeftModel, name: str | None) -> str:
    if name is None:
        active = list(model.active_adapters)
        if len(active) > 1:
            raise ValueError(f"Several adapters are active, {active}; choose one with adapter_name.")
        name = active[0]
    if name not in model.peft_config:
        raise ValueError(f"There is no adapter {name!r}; the model has {', '.join(model.peft_config)}.")
    if reason := base_change_of(model.peft_config[name]):
        raise ValueError(f"The adapter {name!r} cannot be interpolated: {reason}.")
    if text_setting(model.peft_config[name]).rows is not None:
        raise ValueError(f"The adapter {name!r} has rows for its classes, which cannot be mixed with their texts.")
    return name


def _pairs(model: PeftModel, adapter: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor by which an adapter changes a model, with the value at which it changes nothing."""
    for layer in adapter_layers(model):
        if isinstance(layer, BaseTunerLayer) and adapter in layer.merged_adapters:
            raise ValueError(f"The adapter {adapter!r} is merged; call unmerge_adapter() first.")
        if isinstance(layer, LoraLayer):
            yield from _lora_pairs(layer, adapter)
        elif isinstance(layer, LNTuningLayer):
            yield from _module_pairs(layer.ln_tuning_layers, layer.get_base_layer(), adapter)
        elif isinstance(layer, ModulesToSaveWrapper):
            yield from _module_pairs(layer.modules_to_save, layer.original_module, adapter)
        elif adapter in _adapters_of(layer):
            raise ValueError(
                f"The adapter {adapter!r} has a {type(layer).__name__}, which cannot be mixed with the frozen model; "
                "train an adapter of LoRA, LNTuning or modules_to_save, which can."
            )


def _lora_pairs(layer: LoraLayer, adapter: str) -> Iterator[tuple[Tensor, Tensor]]:
    variant = layer.lora_variant.get(adapter)
    if variant is not None:
        raise ValueError(
            f"The adapter {adapter!r} is a variant of LoRA, {type(variant).__name__}, whose change is not "
            "proportional to B; train plain LoRA."
        )
    for parts in (layer.lora_B, layer.lora_embedding_B):
        if adapter in parts:
            part = parts[adapter]
            for tensor in part.parameters() if isinstance(part, nn.Module) else [part]:
                yield tensor, torch.zeros_like(tensor)


def _module_pairs(tuned: nn.ModuleDict, frozen: nn.Module, adapter: str) -> Iterator[tuple[Tensor, Tensor]]:
    if adapter not in tuned:
        return
    starts = frozen.state_dict()
    for name, tensor in tuned[adapter].state_dict().items():
        if name not in starts or starts[name].shape != tensor.shape:
            raise ValueError(f"{name} of the adapter {adapter!r} has no counterpart of its shape in the base model.")
        if tensor.is_floating_point():  # not a count of batches
            yield tensor, starts[name]


def _adapters_of(layer: Any) -> set[str]:
    return {name for part in layer.adapter_layer_names for name in attrgetter(part)(layer)}
