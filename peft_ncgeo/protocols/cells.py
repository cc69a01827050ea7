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
from ..training import Recipe

_LOOKED_AT = 8  # images of a set, and numbers of a weight, that stand for all of them


def writes() -> bool:
    """Whether this process writes files: the first of several."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def cell_path(folder: str | Path, setting: str, method: str, seed: int) -> Path:
    """`folder/<setting>/<method>/seed-<seed>.json`, other characters than letters, digits and "-_." replaced."""
    return Path(folder) / _slug(setting) / _slug(method) / f"seed-{seed}.json"


def read_cell(path: Path, made_of: str) -> dict[str, Any] | None:
    """The metrics in a cell, or None where there is none. All processes get what the first one read.

    Raises:
        ValueError: it was made of something else, or is damaged.
    """
    found: list[Any] = [None]
    if writes() and path.exists():
        try:
            found = [json.loads(path.read_text(encoding="utf-8"))]
        except ValueError as error:
            found = [{"error": f"{path} is damaged; remove it: {error}"}]
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
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")  # a run that is killed here leaves no half cell
        partial.write_text(json.dumps({"made_of": made_of, "metrics": metrics}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    (shared,) = broadcast_object_list([metrics])
    return shared


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


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
