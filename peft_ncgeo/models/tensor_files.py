"""Checks of the tensors in an adapter file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_LONGEST_HEADER = 16 * 2**20  # bytes; about a hundred thousand tensors
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Training never writes narrower floats: torch neither computes with them nor checks them for nan.
_KINDS = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise an error for tensors that training cannot produce: integers, floats of 8 bits, nan and infinity."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} is of {tensor.dtype}; expected floats of 16 bits or more.")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite.")


def read_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors by name; read only the header, not the numbers.

    Raises:
        OSError: the file does not exist.
        SafetensorError: the file is damaged or truncated, or its header is too large.
        ValueError: a tensor has a dtype that training cannot produce.
    """
    with Path(path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _LONGEST_HEADER:
        raise SafetensorError(f"its header would have {size:,} bytes")
    shapes = {}
    with safe_open(path, "pt") as content:
        for name in content.keys():  # noqa: SIM118  not a dict
            stored = content.get_slice(name)
            if stored.get_dtype() not in _KINDS:
                raise ValueError(f"{name} is of {stored.get_dtype()}; expected floats of 16 bits or more")
            shapes[name] = tuple(stored.get_shape())
    return shapes
