"""Description of a model: its towers, its feature, its head, and the methods that fit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapters import unwrap
from .blocks import find_mlp_norms
from .families import find_family
from .heads import head_path, linear_parameter, replaceable_head
from .prompt_support import check_prompts
from .text_reading import EndOfText, TextReading
from .towers import (
    Pooling,
    Tower,
    check_encoders,
    find_pooling,
    find_residual_places,
    find_towers,
    parent_path,
    reads_text,
)


@dataclass(frozen=True)
class ModelDescription:
    """Known parts of a model, and the methods that fit it; `print` shows them.

    Attributes:
        name: the model's class.
        family: the family's name, or None if it is not known.
        text, vision: the towers, or None.
        feature: the module whose output holds an image's pooled feature, or None if it is not known.
        head: path of the classification head, or None.
        methods: method -> "" if it fits the model, else the reason why it does not, in one line.
    """

    name: str
    family: str | None
    text: Tower | None
    vision: Tower | None
    feature: Pooling | None
    head: str | None
    methods: dict[str, str]

    def __str__(self) -> str:
        new_head = "-, ImageClassifier.from_backbone(model, class_names) adds one" if self._is_bare_tower() else None
        parts = {
            "text tower": self.text and f"{_size(self.text)}; {_reading(self.text.reading)}",
            "image tower": self.vision and _size(self.vision),
            "image feature": self.feature and f"{self.feature.path or 'the model'}, {self.feature.width} numbers",
            "head": self.head or new_head,
        }
        width = max(map(len, [*parts, *self.methods])) + 2
        lines = [f"{self.name} ({self.family or 'of a family that is not known'})"]
        lines += [f"  {name:{width}}{value or '-'}" for name, value in parts.items()]
        lines += [f"  {name:{width}}{self._fits(name)}" for name in self.methods]
        return "\n".join(lines)

    def _is_bare_tower(self) -> bool:
        return self.text is None and self.head is None and self.feature is not None

    def _fits(self, method: str) -> str:
        """Return "yes", or "no" with the reason but without advice, which differs from method to method."""
        fault = self.methods[method].split("; ")[0].split(", so ")[0].removeprefix(f"{self.name} ").rstrip(".")
        return f"no: {fault}" if fault else "yes"


def describe(model: nn.Module) -> ModelDescription:
    """Describe a model, without changing it: the places of its parts, and the methods of this package that fit it.

    LoRA and other methods of PEFT are not listed, since they depend only on the layers.

    Args:
        model: plain, or under PEFT: then the description lists the methods that fit in addition to its adapters.

    Example:

    ```python
    print(describe(AutoModel.from_pretrained("google/siglip2-base-patch16-224")))
    ```
    """
    base = unwrap(model)
    towers, family = find_towers(base), find_family(base)
    checks: dict[str, Callable[[], Any]] = {
        "text prompts": lambda: check_prompts(base, "text", towers.get("text")),
        "image prompts": lambda: check_prompts(base, "vision", towers.get("vision")),
        "PrototypeConfig": lambda: replaceable_head(base),
        "CoPAConfig, adapt": lambda: find_pooling(base),
        "residual adapters": lambda: (find_pooling(base), find_residual_places(base)),
        "AdaptFormerConfig": lambda: find_mlp_norms(base),
        "GeometryTrainer": lambda: check_encoders(base),
        "ZeroShotClassifier": lambda: _check_zero_shot(base),
        "align_classifier": lambda: _check_alignment(base),
    }
    reasons = {name: _reason(check) for name, check in checks.items()}
    return ModelDescription(
        name=type(base).__name__,
        family=None if family is None else family.name,
        text=towers.get("text"),
        vision=towers.get("vision"),
        feature=None if reasons["CoPAConfig, adapt"] else find_pooling(base),
        head=head_path(base),
        methods=reasons,
    )


def _reason(check: Callable[[], Any]) -> str:
    try:
        check()
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return ""


def _check_zero_shot(model: nn.Module) -> None:
    if not reads_text(model):
        raise ValueError(f"{type(model).__name__} gives no text features.")
    check_encoders(model)


def _check_alignment(model: nn.Module) -> None:
    check_encoders(model)
    if not reads_text(model):
        linear_parameter(model)


def _size(tower: Tower) -> str:
    length = "" if tower.max_length is None else f", {tower.max_length} tokens"
    return f"{parent_path(tower.embeddings) or 'the model'}, {len(tower.layers)} layers of {tower.width}{length}"


def _reading(reading: TextReading | None) -> str:
    if reading is None:
        return "not known in which way it reads texts"
    pools = {"first": "the first token", "last": "the last token", "mean": "the mean of all tokens"}
    pooled = "[EOT]" if isinstance(reading.pools, EndOfText) else pools[reading.pools]
    front = f"{reading.front} special token in front" if reading.front else "no special token in front"
    padding = "padded to its full length, without a mask" if reading.full_length else "padded to the longest text"
    return f"{front}, {padding}; pools {pooled}"
