"""The fields shared by every config whose method learns prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from torch import nn

from ..models.adapters import adapter_layers
from ..models.templates import check_template
from ..validation import check_length, check_names, check_path, flag, not_negative, shown, whole_number

_MOST_TOKENS = 10_000  # vectors of a layer, and layers
_LARGEST_ID = 2**31 - 1


@dataclass
class PromptConfig(PeftConfig):
    """Prompts in the text and vision towers of a CLIP-like or ViT-like model. Not itself a PEFT method.

    Text: slots `1..num_text_tokens` of the tokenised template (behind [BOS], in front of the class name) are
    replaced by learned vectors; each further layer below `text_depth` overwrites them with its own. Vision:
    `num_vision_tokens` vectors follow the patches; each further layer below `vision_depth` overwrites them.

    Args:
        num_text_tokens: learned vectors in each prompted text layer. 0: no text prompts.
        num_vision_tokens: the same for the vision tower.
        text_depth: number of text layers, from the first, that have vectors of their own. More than the tower has
            means all of them.
        vision_depth: the same for the vision tower.
        first_layer: layer at whose entry the first vectors come in, 0 being the input. Text slots hold the
            placeholders' own features below it, and `text_init` goes unused unless it is 0.
        coupling: "independent", or "coupled" (MaPLe): a layer's vision vectors are a learned linear map of its text
            vectors. Needs equal numbers of tokens and `vision_depth <= text_depth`.
        text_init: what the first layer's text vectors start from: a phrase, token ids, or None for N(0, init_std).
            A phrase that is too long gives its first tokens; where it is too short the rest is N(0, init_std).
        tokenizer_name_or_path: where the tokenizer for `text_init` and `template` is found. Default: the base model.
        template: text around a class name, `{}` standing for the name.
        init_std: standard deviation of all other vectors at the start.
        init_weights: False leaves every vector as N(0, init_std), whatever `text_init` says.
        pack_text: run many texts in one row where they begin alike, with the same features and gradients (to float
            error) in a fraction of the time and memory. Goes by itself where it cannot be done. A mask that hides
            tokens in front of a text's [EOT] is not looked at, and hooks on text layers see the rows; False for such.
        exclude_modules: names of modules whose towers get no prompts.
        modules_to_save: modules trained and saved whole beside the prompts, a classification head for instance.
        token_ids: what `text_init` and `template` were as tokens, written when the adapter is created, so that
            loading it needs no tokenizer. Not for setting by hand.
    """

    # PEFT reads this attribute. Towers are found by structure: a path here would freeze today's layout into files.
    target_modules: ClassVar[None] = None

    num_text_tokens: int = field(default=0, metadata={"help": "Learned vectors in each prompted text layer."})
    num_vision_tokens: int = field(default=0, metadata={"help": "Learned vectors in each prompted vision layer."})
    text_depth: int = field(default=1, metadata={"help": "Text layers, from the first, with vectors of their own."})
    vision_depth: int = field(default=1, metadata={"help": "Vision layers with vectors of their own."})
    first_layer: int = field(default=0, metadata={"help": "Layer at whose entry the first vectors come in."})
    coupling: str = field(default="independent", metadata={"help": "'independent', or 'coupled' as in MaPLe."})
    text_init: str | list[int] | None = field(
        default=None, metadata={"help": "Phrase or token ids that the first text vectors start from."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer for `text_init` and `template`. Default: the base model's."}
    )
    template: str = field(default="a photo of a {}.", metadata={"help": "Text around a class name."})
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the other vectors at the start."})
    init_weights: bool = field(default=True, metadata={"help": "False: start from N(0, init_std) throughout."})
    pack_text: bool = field(default=True, metadata={"help": "Run many texts that begin alike in one row."})
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of modules whose towers get no prompts."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the prompts."}
    )
    token_ids: dict[str, list[Any]] | None = field(
        default=None, metadata={"help": "Tokens of `text_init` and `template`, written when the adapter is created."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        least_values = {
            "num_text_tokens": 0,
            "num_vision_tokens": 0,
            "text_depth": 1,
            "vision_depth": 1,
            "first_layer": 0,
        }
        for name, least in least_values.items():
            # Python's, since no JSON file could hold numpy's; and no more than memory is asked for in good faith
            setattr(self, name, whole_number(name, getattr(self, name), least, _MOST_TOKENS))
        self.init_std = not_negative("init_std", self.init_std)
        check_template(self.template)
        for name in ("init_weights", "pack_text"):
            setattr(self, name, flag(name, getattr(self, name)))
        if self.text_init is not None and not isinstance(self.text_init, str):
            self.text_init = _token_ids("text_init", self.text_init)
        if isinstance(self.text_init, str):
            check_length("text_init", self.text_init)
        self.tokenizer_name_or_path = check_path("tokenizer_name_or_path", self.tokenizer_name_or_path)
        if self.coupling not in ("independent", "coupled"):
            raise ValueError(f"coupling={shown(self.coupling)} must be 'independent' or 'coupled'.")
        if self.coupling == "coupled":
            counts = (self.num_text_tokens, self.num_vision_tokens)
            if counts[0] != counts[1]:
                raise ValueError(f"coupling='coupled' needs equal numbers of text and vision tokens, got {counts}.")
            depths = (self.text_depth, self.vision_depth)
            if depths[1] > depths[0]:
                raise ValueError(f"coupling='coupled' needs vision_depth <= text_depth, got text, vision {depths}.")
        self.exclude_modules = check_names("exclude_modules", self.exclude_modules)
        self.modules_to_save = check_names("modules_to_save", self.modules_to_save)
        if self.token_ids is not None:
            written = {"of", "text_init", "placeholders"}
            if not isinstance(self.token_ids, dict) or not written <= self.token_ids.keys():
                raise ValueError(f"token_ids={shown(self.token_ids)} is not for setting by hand; leave it out.")
            for name in ("text_init", "placeholders"):
                _token_ids(f"token_ids[{name!r}]", self.token_ids[name])
        # Ids that came with the other fields, from a file, are kept; a config made by hand gets its own per model.
        self.is_loaded = self.token_ids is not None and not self.has_changed()

    def _tokenised_fields(self) -> list[Any]:
        return [self.text_init, self.template, self.num_text_tokens]

    def has_changed(self) -> bool:
        """Whether the fields are others than those that `token_ids` were written for."""
        return self.token_ids is not None and self.token_ids["of"] != self._tokenised_fields()

    def write_token_ids(self, phrase: list[int], placeholders: list[int]) -> None:
        """Note the tokens of `text_init` and of slots `1..num_text_tokens`."""
        self.token_ids = {"of": self._tokenised_fields(), "text_init": phrase, "placeholders": placeholders}

    @property
    def phrase_ids(self) -> list[int]:
        """Tokens of `text_init`; empty where it is None or no tokenizer was found."""
        return (self.token_ids or {}).get("text_init", [])

    @property
    def placeholder_ids(self) -> list[int]:
        """Tokens that stand in slots `1..num_text_tokens` of a text; empty where no tokenizer was found."""
        return (self.token_ids or {}).get("placeholders", [])


def _token_ids(name: str, value: Any) -> list[int]:
    """A list of ids; words and bytes are none, though one can walk through them."""
    ids = value.tolist() if hasattr(value, "tolist") else value  # a tensor or an array
    if not isinstance(ids, list | tuple):
        raise ValueError(f"{name}={shown(value)} must be token ids, whole numbers of at least 0.")
    try:
        whole_number("number of ids", len(ids), most=_MOST_TOKENS)
        return [whole_number("id", i, least=0, most=_LARGEST_ID) for i in ids]
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}={shown(value)} must be at most {_MOST_TOKENS:,} token ids, whole numbers of at least 0."
        ) from None


def active_prompt_config(model: nn.Module) -> PromptConfig | None:
    """Config of the prompts in force in `model`, a `PeftModel` or a model with adapters of its own; or None."""
    for layer in adapter_layers(model):
        if not layer._disable_adapters and layer.active_adapters:
            config = getattr(model, "peft_config", {}).get(layer.active_adapters[0])
            if isinstance(config, PromptConfig):
                return config
    return None
