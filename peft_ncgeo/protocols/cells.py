"""One run as a small file, which says what it was made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset, Image
from torch import Tensor, distributed, nn

from ..data.sampling import encoded_images, label_array
from ..files import file_name, read_json
from ..training import Recipe
from ..values import reason, whole_number
from .whole_files import write_whole

LARGEST = 64 * 2**20  # bytes of a cell; one with episodes has a row for each
_LOOKED_AT = 8  # images of a set, and numbers of a weight, that stand for all of them


def writes() -> bool:
    """Whether this process writes files: the first of several."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def cell_path(folder: str | Path, setting: str, method: str, seed: int) -> Path:
    """`folder/<setting>/<method>/seed-<seed>.json`; see [`~peft_ncgeo.files.file_name`] for the names.

    Raises:
        ValueError: a name that cannot be a folder's.
    """
    names = file_name(setting, "a setting"), file_name(method, "a recipe")
    return Path(folder).joinpath(*names, f"seed-{whole_number('seed', seed)}.json")


def read_cell(path: Path, made_of: str) -> dict[str, Any] | None:
    """The metrics in a cell, or None where there is none. All processes get what the first one read.

    Raises:
        ValueError: it was made of something else, or is damaged.
    """
    found: list[Any] = [None]
    if writes() and path.exists():
        try:
            found = [_checked(read_json(path, LARGEST))]
        except (OSError, ValueError) as error:
            found = [{"error": str(damaged(path, reason(error)))}]
    (cell,) = broadcast_object_list(found)
    if cell is None:
        return None
    if "error" in cell:
        raise ValueError(cell["error"])
    if cell["made_of"] != made_of:
        raise ValueError(
            f"{path} was made by another recipe, model or data set or with other arguments; remove it or change "
            "output_dir."
        )
    return cell["metrics"]


def write_cell(path: Path, made_of: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Write a cell, once and whole, and give every process the first one's metrics."""
    if writes():
        write_whole(path, json.dumps({"made_of": made_of, "metrics": metrics}, indent=1) + "\n")
    (shared,) = broadcast_object_list([metrics])
    return shared


def damaged(path: Path, why: str) -> ValueError:
    """Return the error for a cell that is not as it was written."""
    return ValueError(f"{path} is damaged; remove it and run again ({why}).")


def fingerprint(*parts: Any) -> str:
    """Sixteen characters that change with any part."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def describe_recipe(recipe: Recipe) -> Any:
    """What the recipe was read from, or for one made in Python what its objects hold."""
    if recipe.source:
        return recipe.source
    config = recipe.config() if recipe.config else None
    objects = [recipe.classification_loss(), *recipe.losses(), *recipe.callbacks()]
    held = [
        (type(o).__name__, {k: v for k, v in vars(o).items() if isinstance(v, str | int | float)}) for o in objects
    ]
    return [None if config is None else config.to_dict(), held, recipe.args]


def describe_dataset(dataset: Dataset, label_column: str) -> list[Any]:
    """Class names, all labels, and the encoded bytes of a few images."""
    labels = label_array(dataset, label_column)
    places = np.linspace(0, max(0, len(dataset) - 1), min(_LOOKED_AT, len(dataset))).astype(int)
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    rows, stored = dataset.select(places), hashlib.sha256()
    for row in zip(*(encoded_images(rows, name) for name in images), strict=True):
        for content in row:
            stored.update(content)
    names = dataset.features[label_column].names
    return [names, hashlib.sha256(labels.tobytes()).hexdigest(), stored.hexdigest()]


def describe_model(model: nn.Module) -> list[Any]:
    """Class, and shape and first numbers of every weight."""
    weights: Mapping[str, Tensor] = model.state_dict()
    numbers = {n: [list(w.shape), w.flatten()[:_LOOKED_AT].float().tolist()] for n, w in weights.items()}
    return [type(model).__name__, fingerprint(numbers)]


def _checked(cell: Any) -> dict[str, Any]:
    """Return a cell as [`write_cell`] wrote it; refuse anything else."""
    if not isinstance(cell, dict) or cell.keys() != {"made_of", "metrics"}:
        raise ValueError("it must hold made_of and metrics")
    if not isinstance(cell["metrics"], dict):
        raise ValueError("its metrics must have names")
    return cell
