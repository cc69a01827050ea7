"""What the tensors of an adapter's file must be."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that no training leaves behind, by name: whole numbers, nan and infinity."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is of {tensor.dtype}, where floating-point numbers belong.")
        if not is_finite(tensor):
            raise ValueError(f"{name} has numbers that are not finite.")


def is_finite(tensor: Tensor) -> bool:
    """Whether floating-point numbers are all finite, also those of 8 bits, for which torch cannot tell."""
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())
