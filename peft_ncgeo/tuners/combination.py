"""Weighted combinations of adapters: checks and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from ..geometry.sphere import l2_normalize, slerp
from .tuner_layer import TunerLayer

COMBINATION_TYPES = ("linear", "slerp")
# Fields in which combined adapters may differ: their origin and their start values. Fixed prototypes are compared by
# value.
_MAY_DIFFER = {field.name for field in fields(PeftConfig)} | {
    "text_init",
    "tokenizer_name_or_path",
    "init_std",
    "init_weights",
    "token_ids",
    "pack_text",
    "geometry",
    "class_counts",
    "margin_strength",
    "prototypes_per_class",
}


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return `sum_i w_i P_i` of tensors of one shape, in float64."""
    return torch.stack([weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True)]).sum(0)


def spherical(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Rotate rows `(n, d)` of the first tensor towards those of the second by the share `t = weights[1]`, in float64.

    Lengths are interpolated linearly. Rows with the same or opposite directions, and pairs with a row of 0, are
    interpolated linearly without a rotation.
    """
    a, b = (tensor.double() for tensor in tensors)
    t = weights[1]
    start = l2_normalize(a)
    direction = slerp(start, l2_normalize(b), t)
    length = torch.lerp(a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True), t)
    still = (direction == start).all(-1, keepdim=True)
    return torch.where(still, torch.lerp(a, b, t), length * direction)


def check_combination(
    configs: Mapping[str, Any],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
) -> None:
    """Check that adapters can be combined; see [`~peft_ncgeo.tuners.tuner_model.TunerModel.add_weighted_adapter`].

    Args:
        configs: configs of the adapters of this method in the model, by name.
    """
    if combination_type not in COMBINATION_TYPES:
        raise ValueError(f"combination_type={combination_type!r} must be one of {', '.join(COMBINATION_TYPES)}.")
    if isinstance(adapters, str) or not adapters:
        raise ValueError(f"adapters={adapters!r} must be a list of at least one name.")
    for name in adapters:
        if name not in configs:
            raise ValueError(f"There is no adapter {name!r} to combine; the model has {', '.join(configs)}.")
        if configs[name].modules_to_save:
            raise ValueError(
                f"Adapter {name!r} has modules_to_save={configs[name].modules_to_save}, which cannot be combined."
            )
    if "." in adapter_name or not adapter_name:
        raise ValueError(f"adapter_name={adapter_name!r} must be a name without dots.")
    if len(weights) != len(adapters):
        raise ValueError(f"weights must be one number for each of {len(adapters)} adapters, got {len(weights)}.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={list(weights)} must be finite.")
    if combination_type == "slerp" and (
        len(adapters) != 2 or min(weights) < 0 or not math.isclose(sum(weights), 1, abs_tol=1e-6)
    ):
        raise ValueError(f"slerp takes two adapters and weights [1 - t, t], t in [0, 1]; got {list(weights)}.")
    for name in adapters[1:]:
        _check_agreement(adapters[0], configs[adapters[0]], name, configs[name])


def _check_agreement(first: str, config: Any, second: str, other: Any) -> None:
    names = [field.name for field in fields(config) if field.name not in _MAY_DIFFER]
    # one template gives different placeholders under different tokenizers; empty if none was found
    ids = ["placeholder_ids"] if all(getattr(c, "placeholder_ids", None) for c in (config, other)) else []
    for name in [*names, *ids]:
        mine, given = getattr(config, name), getattr(other, name)
        if mine != given:
            raise ValueError(f"Adapters {first!r} and {second!r} differ in {name}: {mine!r} and {given!r}.")


def adapter_tensors(layer: TunerLayer, adapter: str) -> dict[str, Tensor]:
    """Return an adapter's tensors in one layer, named by kind and by name inside a module."""
    found: dict[str, Tensor] = {}
    for kind in layer.adapter_layer_names:
        held = getattr(layer, kind)
        if adapter not in held:
            continue
        if isinstance(held, nn.ParameterDict):
            found[kind] = held[adapter]
        else:
            found |= {f"{kind}.{name}": value for name, value in held[adapter].state_dict(keep_vars=True).items()}
    return found


@torch.no_grad()
def combined_tensors(
    layer: TunerLayer, adapters: Sequence[str], weights: Sequence[float], combination_type: str
) -> dict[str, Tensor]:
    """Return the combined tensors of adapters in one layer, named as in [`adapter_tensors`].

    Raises:
        ValueError: constants, such as fixed prototypes, differ.
    """
    held = [adapter_tensors(layer, adapter) for adapter in adapters]
    found: dict[str, Tensor] = {}
    for name, first in held[0].items():
        tensors = [tensors[name] for tensors in held]
        if isinstance(first, nn.Parameter):
            turns = combination_type == "slerp" and is_prompt(name)
            found[name] = spherical(tensors, weights) if turns else linear(tensors, weights)
        elif all(torch.equal(first, other) for other in tensors):
            found[name] = first
        else:
            raise ValueError(f"Adapters {', '.join(map(repr, adapters))} have different fixed {name.split('.')[-1]}.")
    return found


def is_prompt(name: str) -> bool:
    """Return True if the rows of a tensor of [`adapter_tensors`] are prompt vectors."""
    return name.endswith("_prompt")
