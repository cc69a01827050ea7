"""File of a few-shot classifier's prototypes, beside its adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import parse_json
from ..loading.adapter_folder import weights_digest
from ..loading.load import PROTOTYPES
from ..models.tensor_files import check_tensors, read_shapes
from ..validation import one_line, short_repr

_HEADS = "adapter_sha256"  # key in that file's header: digest of the heads that the prototypes belong to


def write_prototypes(folder: Path, prototypes: Tensor, classes: Sequence[Any]) -> None:
    """Write the prototypes (K, d) beside an adapter that is already there, with the names of their classes."""
    told = {"classes": json.dumps(classes), _HEADS: weights_digest(folder)}
    save_file({"prototypes": prototypes.contiguous().cpu()}, folder / PROTOTYPES, told)


def read_prototypes(folder: Path, repo_id: str | Path) -> tuple[Tensor, list[Any]]:
    """Read the prototypes (K, d) saved beside an adapter, and the names of their classes."""
    if not (folder / PROTOTYPES).is_file():
        raise ValueError(f"{repo_id} has no {PROTOTYPES}; FewShotClassifier.save_pretrained writes one.")
    digest = weights_digest(folder)
    try:
        read_shapes(folder / PROTOTYPES)  # refuses unsupported dtypes before any number is read
        with safe_open(folder / PROTOTYPES, "pt") as file:
            told = file.metadata()
            classes = parse_json(told["classes"])
            prototypes = file.get_tensor(
                "prototypes"
            ).clone()  # a copy, because the tensor maps the file and changes with it
        check_tensors({"prototypes": prototypes})
        if told.get(_HEADS, digest) != digest:  # version 0.1.0 did not write it
            raise ValueError(f"it belongs to other heads than {SAFETENSORS_WEIGHTS_NAME}; save both again")
        known = isinstance(classes, list) and all(isinstance(name, str | int) for name in classes)
        if not known or len(set(classes)) < max(2, len(classes)):
            raise ValueError(f"its classes are {short_repr(classes)}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{PROTOTYPES} in {repo_id} is damaged: {one_line(error)}") from error
    return prototypes, classes
