"""What losses remember, in a checkpoint: `geometry_state.safetensors`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..losses import Regularizer

FILE_NAME = "geometry_state.safetensors"


def save_state(losses: Iterable[Regularizer], folder: str | Path) -> None:
    """Write every loss's buffers under `<loss name>.<buffer>`."""
    state = {f"{loss.name}.{key}": value.contiguous() for loss in losses for key, value in loss.state_dict().items()}
    save_file(state, Path(folder) / FILE_NAME)


def load_state(losses: Iterable[Regularizer], folder: str | Path) -> None:
    """Read them back.

    Raises:
        ValueError: the file is missing or damaged, or holds other losses than these.
    """
    path = Path(folder) / FILE_NAME
    losses = list(losses)
    expected = {f"{loss.name}.{key}" for loss in losses for key in loss.state_dict()}
    try:
        state = load_file(path) if expected or path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"Cannot resume from {path}: {error}.") from error
    if expected != state.keys():
        raise ValueError(f"{path} was written for other losses: it differs in {sorted(expected ^ state.keys())}.")
    for loss in losses:
        own = {key.removeprefix(f"{loss.name}."): v for key, v in state.items() if key.startswith(f"{loss.name}.")}
        loss.load_state_dict(own)
