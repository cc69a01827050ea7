"""State of losses and callbacks in a checkpoint: `geometry_state.safetensors`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...models.tensor_files import read_shapes
from ...validation import one_line

FILE_NAME = "geometry_state.safetensors"


class Stateful(Protocol):
    """Loss or callback with a state to save."""

    name: str

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> Any: ...


def save_state(owners: Iterable[Stateful], folder: str | Path) -> None:
    """Write the tensors of all owners under `<name>.<tensor>`."""
    state = {f"{own.name}.{key}": value.contiguous() for own in owners for key, value in own.state_dict().items()}
    save_file(state, Path(folder) / FILE_NAME)


def load_state(owners: Iterable[Stateful], folder: str | Path) -> None:
    """Load the tensors of all owners from a checkpoint.

    Raises:
        ValueError: the file is missing or damaged, or holds the state of other losses and callbacks.
    """
    path = Path(folder) / FILE_NAME
    owners = list(owners)
    expected = {own.name for own in owners if own.state_dict()}
    try:
        if path.exists():
            read_shapes(path)  # refuses unsupported dtypes before any number is read
        state = load_file(path) if expected or path.exists() else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"Cannot resume from {path}: {error}.") from error
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        owner, _, name = key.partition(".")
        # a copy, because the tensor maps the file and changes with it
        parts.setdefault(owner, {})[name] = value.clone()
    if expected != parts.keys():
        raise ValueError(f"{path} was written for other losses: it differs in {sorted(expected ^ parts.keys())}.")
    for own in owners:
        now = own.state_dict()
        for name, value in parts.get(own.name, {}).items():
            kinds = [(tensor.is_floating_point(), tensor.dim()) for tensor in (value, now.get(name, value))]
            if kinds[0] != kinds[1]:  # length and precision may differ
                raise ValueError(f"{path} does not fit {own.name}: its {name} is {value.dtype} {tuple(value.shape)}.")
        if own.name in parts:
            try:
                own.load_state_dict(parts[own.name])
            except RuntimeError as error:
                raise ValueError(f"{path} does not fit {own.name}: {one_line(error)}") from error
