"""Files of a head on cached features: a card, and the tensors with settings, names and template in the header."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel

from ..files import parse_json
from ..geometry.sphere import l2_normalize
from ..loading.load import HEAD
from ..markdown import code_cell, escape
from ..models.base_model import base_name, is_folder
from ..models.templates import check_template
from ..models.tensor_files import read_shapes
from ..validation import OF_THE_MACHINE, check_path, one_line, short_repr
from .heads import HEADS
from .heads.base import FeatureHead, State

_PROBE, _TOLD = "probe", "peft_ncgeo"
_KEYS = {"base_model", "classes", "head", "settings", "template", "tuned"}
# Distance of unit features above which two models differ. bfloat16 in place of float32 makes about 0.01.
_APART = 0.03
_CARD = """\
---
library_name: peft_ncgeo
tags:
- peft_ncgeo
---

# {head} on the features of {base}

```python
from peft_ncgeo import FewShotClassifier

classifier = FewShotClassifier.from_pretrained("path/to/this/folder", base_model, processor)
```

Settings: {settings}. It knows {count:,} classes, read inside {template}.{tuned}
"""
_TUNED = " It was fitted on a tuned model, whose adapter is not in this folder; `base_model` must have it."


@dataclass(frozen=True)
class HeadFile:
    """Content of a head's file.

    Attributes:
        head: the method with its settings.
        state: tensors that the head learned.
        classes: names of the classes.
        template: text around a class name.
        probe: features (3, d) of a fixed image and of the first two names, by the model that the head belongs to.
        tuned: True if that model has an adapter.
    """

    head: FeatureHead
    state: State
    classes: list[str]
    template: str
    probe: Tensor
    tuned: bool

    def check_model(self, probe: Tensor, repo_id: str | Path) -> None:
        """Refuse a model, given by its probe, with other features than the model that the head was fitted on.

        Raises:
            ValueError: the features have another width, or differ by more than rounding explains.
        """
        mend = "pass the model that it was fitted on as base_model, with its adapter if it had one, and its processor"
        if probe.shape != self.probe.shape:
            raise ValueError(
                f"The head in {repo_id} is for features of width {self.probe.shape[-1]}, but the model's have "
                f"{probe.shape[-1]}; {mend}."
            )
        apart = torch.linalg.vector_norm(l2_normalize(probe) - l2_normalize(self.probe), dim=-1)
        if not apart.max() <= _APART:
            part = "image" if apart[0] > _APART else "text"
            raise ValueError(f"The head in {repo_id} belongs to other {part} features than this model's; {mend}.")


def fixed_image() -> Image.Image:
    """Return the image of a probe: coloured noise that never changes."""
    numbers = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)  # a frozen generator
    return Image.fromarray(numbers).resize((64, 64), Image.Resampling.NEAREST)


def write_head(folder: Path, file: HeadFile, model: nn.Module) -> None:
    """Write a head's file and a card into a folder. A base model that came from a folder is not named."""
    name = base_name(model)
    name = "" if is_folder(name) else name
    told = {
        "head": type(file.head).__name__,
        "settings": asdict(file.head),  # type: ignore[call-overload]
        "classes": file.classes,
        "template": file.template,
        "tuned": file.tuned,
        "base_model": name,
    }
    tensors = {key: value.clone().contiguous() for key, value in {**file.state, _PROBE: file.probe}.items()}
    save_file(tensors, folder / HEAD, {_TOLD: json.dumps(told)})
    card = _CARD.format(
        head=told["head"],
        base=escape(name or "its base model"),
        settings=code_cell(file.head),
        count=len(file.classes),
        template=code_cell(file.template),
        tuned=_TUNED if file.tuned else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def read_head(folder: Path, repo_id: str | Path) -> tuple[HeadFile, str]:
    """Read the file of a head; return its content and the name of its base model, "" if it is not known.

    Raises:
        ValueError: the file is damaged, or was not written by this package.
    """
    try:
        read_shapes(folder / HEAD)  # refuses unsupported dtypes before any number is read
        with safe_open(folder / HEAD, "pt") as file:
            told = parse_json((file.metadata() or {}).get(_TOLD, "null"))
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  not a dict
        if not isinstance(told, dict) or told.keys() != _KEYS:
            raise ValueError("its header does not describe a head of peft_ncgeo")
        if told["head"] not in HEADS:
            raise ValueError(f"it holds a head {short_repr(told['head'])}, which is not one of {', '.join(HEADS)}")
        classes, name = told["classes"], told["base_model"]
        known = isinstance(classes, list) and all(isinstance(one, str) for one in classes)
        if not known or len(set(classes)) < max(2, len(classes)):
            raise ValueError(f"its classes are {short_repr(classes)}")
        if not isinstance(name, str) or not isinstance(told["tuned"], bool):
            raise ValueError("its header does not name the base model")
        check_template(told["template"])
        head, probe = HEADS[told["head"]](**told["settings"]), tensors.pop(_PROBE)
        head.check(tensors, len(classes))
        if probe.dim() != 2 or len(probe) != 3 or not probe.isfinite().all():
            raise ValueError(f"{_PROBE} has shape {tuple(probe.shape)} or numbers that are not finite")
        return HeadFile(head, tensors, classes, told["template"], probe, told["tuned"]), name
    except OF_THE_MACHINE:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{HEAD} in {repo_id} is damaged: {one_line(error)}") from error


def load_named_base(file: HeadFile, known: str, name: str | None, repo_id: str | Path, token: str | None) -> nn.Module:
    """Load a base model by the name `name`, else by the name `known`.

    Raises:
        OSError: it cannot be loaded.
        ValueError: no name is known, or the head was fitted on a tuned model.
    """
    name = check_path("base_model", name) or known
    if file.tuned:
        raise ValueError(
            f"The head in {repo_id} was fitted on a tuned model; load its adapter with load_adapter and pass that "
            "model as base_model."
        )
    if not name:
        raise ValueError(f"The head in {repo_id} names no base model; pass base_model.")
    try:
        model: Any = AutoModel.from_pretrained(name, token=token, trust_remote_code=False)
    except OF_THE_MACHINE:
        raise
    except Exception as error:  # the Hub and safetensors raise many types, and so does a config with wrong values
        raise OSError(f"The base model {name} cannot be loaded; pass base_model. ({one_line(error)})") from error
    return model.eval()
