"""Wrappers that insert learned vectors into a tower: one class for embeddings and one for layers, per modality.

They replace `embeddings` and every `layers.i` of a prompted tower. They are `BaseTunerLayer`s, so PEFT enables,
switches, deletes, saves and unloads them.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models.adapters import innermost
from ..models.substitution import substitute
from ..models.text_packing import Slots, read_texts
from ..models.towers import Tower
from .prompt_config import PromptConfig
from .tuner_layer import TunerLayer


class PromptLayer(TunerLayer):
    """Wrapped module with a `(num_tokens, width)` prompt for each adapter that has one here.

    The prompt is a parameter, or for coupled prompts a linear map of the prompt of another layer.

    Args:
        base_layer: the module to wrap.
        prefix: prefix of the PEFT type, with which the names of its parameters start, so that Transformers finds them.
    """

    other_param_names: tuple[str, ...] = ("num_tokens", "sources")

    def __init__(self, base_layer: nn.Module, prefix: str) -> None:
        super().__init__(base_layer)
        self.adapter_layer_names = (f"{prefix}prompt", f"{prefix}coupling")
        self.add_module(f"{prefix}prompt", nn.ParameterDict())
        self.add_module(f"{prefix}coupling", nn.ModuleDict())
        # Layers whose prompts are mapped to coupled prompts; a plain dict, since they are not children of this module.
        self.sources: dict[str, PromptLayer] = {}
        # Adapters with prompts in this tower; a layer beyond the prompted depth has the count but no prompt.
        self.num_tokens: dict[str, int] = {}

    @property
    def prompts(self) -> nn.ParameterDict:
        """Prompts `(num_tokens, width)` by adapter name."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def couplings(self) -> nn.ModuleDict:
        """Linear maps from the prompt of another layer, by adapter name."""
        return getattr(self, self.adapter_layer_names[1])

    def update_layer(
        self,
        adapter_name: str,
        num_tokens: int,
        prompt: Tensor | None,
        inference_mode: bool,
        source: PromptLayer | None = None,
    ) -> None:
        """Add an adapter.

        Args:
            prompt: `(num_tokens, width)`; None if this layer has no vectors of its own.
            source: layer whose prompt is mapped to this layer's width; only the width of `prompt` is then used.
        """
        self.num_tokens[adapter_name] = num_tokens
        if prompt is not None and source is not None:
            width = source.prompts[adapter_name].shape[1]
            self.sources[adapter_name] = source
            self.couplings[adapter_name] = nn.Linear(width, prompt.shape[1])
        elif prompt is not None:
            self.prompts[adapter_name] = nn.Parameter(prompt.float())
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def active_tokens(self) -> int:
        """Number of this tower's slots that the active adapter fills; 0 if it fills none or is disabled."""
        if self.disable_adapters or not self.active_adapters:
            return 0
        return self.num_tokens.get(self.active_adapters[0], 0)

    def active_prompt(self, hidden_states: Tensor) -> Tensor | None:
        """Return the active adapter's vectors for this layer, expanded to `(B, num_tokens, width)`, or None."""
        if not self.active_tokens:
            return None
        name = self.active_adapters[0]
        if name in self.couplings:
            prompt = self.couplings[name](self.sources[name].prompts[name])
        elif name in self.prompts:
            prompt = self.prompts[name]
        else:
            return None
        return prompt.to(hidden_states.dtype).expand(hidden_states.shape[0], -1, -1)


def _write_slots(hidden_states: Tensor, prompt: Tensor, first: int) -> Tensor:
    """Overwrite slots `first..first + n - 1` of `(B, L, width)`, behind the special tokens."""
    return torch.cat([hidden_states[:, :first], prompt, hidden_states[:, first + prompt.shape[1] :]], dim=1)


class _TableWithPrompt(nn.Module):
    """Token embeddings whose output holds prompts in its first slots; they replace the tower's own for one pass."""

    def __init__(self, table: nn.Module, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.write = table, write

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.write(self.table(input_ids))


class TextEmbeddingsWithPrompt(PromptLayer):
    """Wrapped text embeddings: a prompt replaces tokens before positions and other embeddings are added to them.

    Args:
        tower: the text tower, whose rules of reading determine the slots of prompts.
    """

    other_param_names = ("num_tokens", "sources", "configs")

    def __init__(self, base_layer: nn.Module, prefix: str, tower: Tower) -> None:
        super().__init__(base_layer, prefix)
        assert tower.reading is not None  # check_prompts has checked it
        self.reading, self.table = tower.reading, tower.table
        self.configs: dict[str, PromptConfig] = {}
        self._warned = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        if inputs_embeds is None and self.active_tokens and not torch.compiler.is_compiling():
            assert input_ids is not None  # one of the two is given
            self._check(input_ids)
        table = getattr(self.base_layer, self.table)
        if position_ids is not None and self.reading.end_of_text is not None:  # packed rows, longer than one text
            inputs_embeds = self._write(table(input_ids) if inputs_embeds is None else inputs_embeds)
            return inputs_embeds + self.base_layer.position_embedding(position_ids)
        others |= {} if position_ids is None else {"position_ids": position_ids}
        if inputs_embeds is not None:
            return self.base_layer(inputs_embeds=self._write(inputs_embeds), **others)
        prompted = substitute(self.base_layer, {self.table: _TableWithPrompt(table, self._write)})
        return prompted(input_ids=input_ids, **others)

    def _write(self, inputs_embeds: Tensor) -> Tensor:
        prompt = self.active_prompt(inputs_embeds)
        return inputs_embeds if prompt is None else _write_slots(inputs_embeds, prompt, self.reading.front)

    def slots(self) -> Slots | None:
        """Return the slots that the active adapter fills; None if its texts must not be packed."""
        name = next(iter(self.active_adapters), "")
        if name in self.configs and not self.configs[name].pack_text:
            return None
        return Slots(self.active_tokens, self.active_tokens > 0 and name in self.prompts)

    def _check(self, input_ids: Tensor) -> None:
        """Raise an error if a prompt would overwrite an [EOT]; warn if slots hold other words than placeholders."""
        n, name = self.active_tokens, self.active_adapters[0]
        first, end = self.reading.front, self.reading.end_of_text
        # without [EOT] a text's own end is not known here; one special token at least follows the words
        shortest = input_ids.shape[1] - 1 if end is None else min(read_texts(input_ids, end).ends)
        if shortest < first + n:
            raise ValueError(
                f"A text ends at slot {shortest}, but prompts overwrite slots {first}..{first + n - 1}: write {n} "
                "placeholder tokens before the class name, as `peft_ncgeo.data.class_prompts` does."
            )
        placeholders = self.configs[name].placeholder_ids
        if not self.training and not self._warned and placeholders:
            expected = torch.tensor(placeholders, device=input_ids.device)
            if not torch.equal(input_ids[:, first : first + n], expected.expand(input_ids.shape[0], -1)):
                self._warned = True
                warnings.warn(
                    f"Slots {first}..{first + n - 1} do not hold this adapter's placeholders, so its prompts replace "
                    "words of another template. Write texts with `peft_ncgeo.data.class_prompts` and the adapter's "
                    "`template`.",
                    stacklevel=2,
                )


class TextLayerWithPrompt(PromptLayer):
    """Wrapped text layer: its own vectors overwrite the prompts' slots before the layer runs.

    Args:
        first: the first of these slots.
    """

    def __init__(self, base_layer: nn.Module, prefix: str, first: int) -> None:
        super().__init__(base_layer, prefix)
        self.first = first

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        prompt = self.active_prompt(hidden_states)
        if prompt is not None:
            hidden_states = _write_slots(hidden_states, prompt, self.first)
        return self.base_layer(hidden_states, *args, **kwargs)


class GridWithPrompt(PromptLayer):
    """Wrapped patch embeddings of timm, which give no size of feature maps, since prompts do not fit into maps."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(*args, **kwargs)

    def dynamic_feat_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of the feature maps of all layers, for `output_hidden_states`."""
        if self.active_tokens:
            raise NotImplementedError(
                "timm makes feature maps of the hidden states, where prompts would be taken for patches; leave "
                "output_hidden_states out, or disable the adapter."
            )
        return self.base_layer.dynamic_feat_size(image_size)


def _around(hidden_states: Tensor, special_tokens: int | None, count: int) -> list[Tensor]:
    """Return the image's tokens before and after `count` prompts in `(B, L, width)`.

    Prompts follow the special tokens; None: they are the last tokens.
    """
    start = hidden_states.shape[1] - count if special_tokens is None else special_tokens
    return [hidden_states[:, :start], hidden_states[:, start + count :]]


def _grow_mask(mask: Any, tokens: int) -> Any:
    """Return an attention mask, of a kind that Transformers makes, extended by tokens that all tokens attend to.

    The mask may only hide keys: (B, 1, L, L), True or 0 where a token is visible, or (B, L), nonzero there.

    Raises:
        NotImplementedError: the mask is of another kind, such as that of flex attention.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise NotImplementedError(
            f"An attention mask of type {type(mask).__name__} cannot be extended for prompts; load the model with "
            "attn_implementation='sdpa'."
        )
    if mask is None or mask.shape[-1] == tokens:
        return mask
    seen = 0.0 if mask.is_floating_point() else 1
    if mask.dim() == 2:
        return nn.functional.pad(mask, (0, tokens - mask.shape[-1]), value=seen)
    return nn.functional.pad(mask[..., :1, :], (0, tokens - mask.shape[-1]), value=seen).expand(-1, -1, tokens, -1)


class VisionEmbeddingsWithPrompt(PromptLayer):
    """Wrapped vision embeddings: n vectors without position embeddings are added to the image tokens.

    Args:
        special_tokens: number of tokens that the vectors follow; None: they follow all tokens.
    """

    def __init__(self, base_layer: nn.Module, prefix: str, special_tokens: int | None = None) -> None:
        super().__init__(base_layer, prefix)
        self.special_tokens = special_tokens

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden_states = self.base_layer(*args, **kwargs)
        prompt = self.active_prompt(hidden_states)
        if prompt is None:
            return hidden_states
        before, after = _around(hidden_states, self.special_tokens, 0)
        return torch.cat([before, prompt, after], dim=1)


class VisionLayerWithPrompt(PromptLayer):
    """Wrapped vision layer: its vectors overwrite the tower's prompts; the first vectors are added to the tokens.

    The tower's last layer removes them, since some heads average all patch tokens, and prompts must not be part of the
    average. The `hidden_states` that a model returns hold them. A mask of the image's own tokens, which some towers
    always make and others only in an export, is extended for the prompts.

    Args:
        special_tokens: number of tokens that the vectors follow; None: they follow all tokens.
        is_last: True for the tower's last layer.
    """

    other_param_names = ("num_tokens", "sources", "is_entry")

    def __init__(self, base_layer: nn.Module, prefix: str, is_last: bool, special_tokens: int | None = None) -> None:
        super().__init__(base_layer, prefix)
        self.is_last, self.special_tokens = is_last, special_tokens
        taken = list(inspect.signature(innermost(base_layer).forward).parameters)
        self._takes_mask = taken[1:2] == ["attention_mask"]
        self.is_entry: dict[str, bool] = {}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        prompt = self.active_prompt(hidden_states)
        if prompt is not None:
            written = 0 if self.is_entry[self.active_adapters[0]] else prompt.shape[1]
            before, after = _around(hidden_states, self.special_tokens, written)
            hidden_states = torch.cat([before, prompt, after], dim=1)
        if "attention_mask" in kwargs:
            kwargs["attention_mask"] = _grow_mask(kwargs["attention_mask"], hidden_states.shape[1])
        elif args and self._takes_mask:
            args = (_grow_mask(args[0], hidden_states.shape[1]), *args[1:])
        hidden_states = self.base_layer(hidden_states, *args, **kwargs)
        if self.is_last and self.active_tokens:
            before, after = _around(hidden_states, self.special_tokens, self.active_tokens)
            return torch.cat([before, after], dim=1) if after.shape[1] else before  # a view where prompts are last
        return hidden_states
