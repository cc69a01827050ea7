"""Config fields that all methods with prompts have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from torch import nn

from ..models.adapters import adapter_layers
from ..models.templates import check_template
from ..validation import check_bool, check_int, check_length, check_names, check_non_negative, check_path, short_repr

_MOST_TOKENS = 10_000  # vectors in a layer, and layers in a tower
_LARGEST_ID = 2**31 - 1


@dataclass
class PromptConfig(PeftConfig):
    """Base config of prompts in the text and vision towers of a CLIP-like or ViT-like model; not a PEFT method itself.

    In the text tower, learned vectors replace slots `1..num_text_tokens` of the tokenised template (after [BOS],
    before the class name); each further one of `text_depth` layers overwrites them with its own vectors. In the vision
    tower, `num_vision_tokens` vectors follow the patches, or precede them in DINOv3, whose last tokens must be
    patches; each further one of `vision_depth` layers overwrites them.

    Args:
        num_text_tokens: learned vectors in each prompted text layer. 0: no text prompts.
        num_vision_tokens: the same for the vision tower.
        text_depth: number of text layers with their own vectors, from `first_layer` on. A number larger than the rest
            of the tower means all these layers.
        vision_depth: the same for the vision tower.
        first_layer: layer at whose entry the first vectors are inserted; 0 is the tower's input. Before this layer,
            text slots hold the features of the placeholder words. `text_init` is used only if `first_layer` is 0.
        coupling: "independent", or "coupled" (MaPLe): a layer's vision vectors are a learned linear map of its text
            vectors. "coupled" needs equal numbers of tokens and `vision_depth <= text_depth`.
        text_init: start of the first layer's text vectors: a phrase, token ids, or None for N(0, init_std). Only the
            first tokens of a long phrase are used; after a short phrase, the rest is N(0, init_std).
        tokenizer_name_or_path: Hub id or folder of the tokenizer for `text_init` and `template`. Default: the base
            model.
        template: text around a class name, with `{}` in place of the name.
        init_std: standard deviation of all other vectors at the start.
        init_weights: False: start every vector from N(0, init_std) and ignore `text_init`.
        pack_text: True: run texts with the same beginning in one row, with the same features and gradients (up to
            rounding) in a fraction of the time and memory. Packing is skipped if it is not possible. Set False if a
            mask hides tokens before a text's [EOT], which packing ignores, or if hooks on text layers need padded
            rows.
        exclude_modules: names of modules whose towers get no prompts.
        modules_to_save: modules trained and saved as a whole beside the prompts, for example a classification head.
        token_ids: tokens of `text_init` and `template`, written when the adapter is created, so that loading needs
            no tokenizer. Do not set it by hand.

    Raises:
        TypeError: a number is of another type.
        ValueError: a value is out of range, or fields do not fit together; or, when the adapter is created, the model
            has no such tower, too few layers for `first_layer`, or too few slots for the prompts and a name.
        NotImplementedError: when the adapter is created, the model's tower is not known to take prompts.
    """

    # PEFT reads this attribute. Towers are found by structure: a path here would store today's layout in files.
    target_modules: ClassVar[None] = None

    num_text_tokens: int = field(default=0, metadata={"help": "Learned vectors in each prompted text layer."})
    num_vision_tokens: int = field(default=0, metadata={"help": "Learned vectors in each prompted vision layer."})
    text_depth: int = field(default=1, metadata={"help": "Text layers, from the first, with their own vectors."})
    vision_depth: int = field(default=1, metadata={"help": "Vision layers, from the first, with their own vectors."})
    first_layer: int = field(default=0, metadata={"help": "Layer at whose entry the first vectors are inserted."})
    coupling: str = field(default="independent", metadata={"help": "'independent', or 'coupled' as in MaPLe."})
    text_init: str | list[int] | None = field(
        default=None, metadata={"help": "Phrase or token ids from which the first text vectors start."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer for `text_init` and `template`. Default: the base model's."}
    )
    template: str = field(default="a photo of a {}.", metadata={"help": "Text around a class name."})
    init_std: float = field(default=0.02, metadata={"help": "Standard deviation of the other vectors at the start."})
    init_weights: bool = field(default=True, metadata={"help": "False: start all vectors from N(0, init_std)."})
    pack_text: bool = field(default=True, metadata={"help": "Run texts with the same beginning in one row."})
    exclude_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of modules whose towers get no prompts."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved as a whole beside the prompts."}
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
            # Python ints, since JSON cannot hold numpy's; and bounded, so that a file cannot ask for endless memory
            setattr(self, name, check_int(name, getattr(self, name), least, _MOST_TOKENS))
        self.init_std = check_non_negative("init_std", self.init_std)
        check_template(self.template)
        for name in ("init_weights", "pack_text"):
            setattr(self, name, check_bool(name, getattr(self, name)))
        if self.text_init is not None and not isinstance(self.text_init, str):
            self.text_init = _token_ids("text_init", self.text_init)
        if isinstance(self.text_init, str):
            check_length("text_init", self.text_init)
        self.tokenizer_name_or_path = check_path("tokenizer_name_or_path", self.tokenizer_name_or_path)
        if self.coupling not in ("independent", "coupled"):
            raise ValueError(f"coupling={short_repr(self.coupling)} must be 'independent' or 'coupled'.")
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
                raise ValueError(f"token_ids={short_repr(self.token_ids)} is not for setting by hand; leave it out.")
            for name in ("text_init", "placeholders"):
                _token_ids(f"token_ids[{name!r}]", self.token_ids[name])
        # Keep ids that came from a file with the other fields; a config made by hand gets new ids for each model.
        self.is_loaded = self.token_ids is not None and not self.has_changed()

    def _tokenised_fields(self) -> list[Any]:
        return [self.text_init, self.template, self.num_text_tokens]

    def has_changed(self) -> bool:
        """Return True if fields changed since `token_ids` were written."""
        return self.token_ids is not None and self.token_ids["of"] != self._tokenised_fields()

    def write_token_ids(self, phrase: list[int], placeholders: list[int]) -> None:
        """Store the tokens of `text_init` and of slots `1..num_text_tokens`."""
        self.token_ids = {"of": self._tokenised_fields(), "text_init": phrase, "placeholders": placeholders}

    @property
    def phrase_ids(self) -> list[int]:
        """Tokens of `text_init`; empty if it is None or no tokenizer was found."""
        return (self.token_ids or {}).get("text_init", [])

    @property
    def placeholder_ids(self) -> list[int]:
        """Tokens in slots `1..num_text_tokens` of a text; empty if no tokenizer was found."""
        return (self.token_ids or {}).get("placeholders", [])


def _token_ids(name: str, value: Any) -> list[int]:
    """Return token ids as a list of ints; raise an error for strings and bytes, although they are iterable."""
    ids = value.tolist() if hasattr(value, "tolist") else value  # a tensor or an array
    if not isinstance(ids, list | tuple):
        raise ValueError(f"{name}={short_repr(value)} must be token ids, whole numbers of at least 0.")
    try:
        check_int("number of ids", len(ids), most=_MOST_TOKENS)
        return [check_int("id", i, least=0, most=_LARGEST_ID) for i in ids]
    except (TypeError, ValueError):
        raise ValueError(
            f"{name}={short_repr(value)} must be at most {_MOST_TOKENS:,} token ids, whole numbers of at least 0."
        ) from None


def active_prompt_config(model: nn.Module) -> PromptConfig | None:
    """Return the config of the active prompts in `model`, a `PeftModel` or a model with adapters, or None."""
    for layer in adapter_layers(model):
        if not layer._disable_adapters and layer.active_adapters:
            config = getattr(model, "peft_config", {}).get(layer.active_adapters[0])
            if isinstance(config, PromptConfig):
                return config
    return None
