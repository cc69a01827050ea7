"""Image layers below the first prompt, run once for the student and the frozen model alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...models.adapters import unwrap
from ...models.towers import find_towers
from ...tuners.prompt_layer import PromptLayer
from .views import is_random


class SharedLayers:
    """What enters the first prompted image layer, kept from the student's pass for the frozen model's.

    Below that layer the two are the same model. There is nothing to share where prompts come in at the input
    (`first_layer=0`), where other adapters change the layers below, or where dropout makes passes differ.

    Args:
        model: as it is trained, its prompts active.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = []
        self.entered: Tensor | None = None
        base = unwrap(model)
        tower = find_towers(base).get("vision")
        if tower is None:
            return
        places: list[Any] = [base.get_submodule(path) for path in (tower.embeddings, *tower.layers)]
        prompted = [_holds_prompt(place) for place in places]
        first = prompted.index(True) - 1 if True in prompted else 0  # -1: the embeddings, as layer 0's entry
        below = [module for place in places[: first + 1] for module in place.modules()]
        others = any(isinstance(m, BaseTunerLayer) and not isinstance(m, PromptLayer) for m in below)
        if first > 0 and not others and not is_random(base):
            self.layers = places[1 : first + 2]  # those below, and the first with a prompt

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the student's pass."""
        self.entered = None
        if not self.layers:
            yield
            return

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.entered = args[0].detach() if args else None

        with self.layers[-1].register_forward_pre_hook(record):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Around the frozen model's pass of the same images, whose layers below then do nothing."""
        entered, self.entered = self.entered, None
        if entered is None:
            yield
            return
        *below, first = self.layers
        with first.register_forward_pre_hook(lambda module, args: (entered, *args[1:])):
            try:
                for layer in below:
                    layer.forward = _pass_on
                yield
            finally:
                for layer in below:
                    vars(layer).pop("forward", None)


def _pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _holds_prompt(place: Any) -> bool:
    if not isinstance(place, PromptLayer) or not place.active_tokens:
        return False
    name = place.active_adapters[0]
    return name in place.prompts or name in place.couplings
