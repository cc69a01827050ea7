"""The model that a trainer trains: loaded where it is named, and with an adapter where a config is given."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from ..data.checks import class_names
from ..data.multi_label import is_multi_label, multi_label_names
from ..data.processors import find_processor
from ..data.torch_sets import is_torch_set, torch_set_names
from ..loading.base_models import check_options, load_base_model
from ..models.heads import covers, head_path
from ..tuners.prototype import PrototypeConfig
from ..validation import short_repr
from .arguments import GeometryTrainingArguments


class ModelMaker:
    """Maker of a trainer's model.

    Args:
        peft_config: of the adapter that every model gets; None: models stay as they are.
        args: training arguments, with `model_init_kwargs` for a model that is named.
        train_dataset: its classes are those of the head of an image classifier that is named.
        given_names: classes of a training set that does not tell them.

    Raises:
        TypeError: `peft_config` is no `PeftConfig`.
        ValueError: options that cannot be given; see [`~peft_ncgeo.loading.base_models.load_base_model`].
    """

    def __init__(
        self, peft_config: Any, args: GeometryTrainingArguments, train_dataset: Any, given_names: list[str] | None
    ) -> None:
        if peft_config is not None and not isinstance(peft_config, PeftConfig):
            raise TypeError(
                f"peft_config must be one config such as LoraConfig(...), got {short_repr(peft_config)}; for others, "
                "make the model with get_peft_model."
            )
        self.peft_config, self.args = peft_config, args
        self.train_dataset, self.given_names = train_dataset, given_names
        self.options = None if args.model_init_kwargs is None else check_options(args.model_init_kwargs)

    def __call__(self, given: Any) -> nn.Module:
        """Return the model, which is given or named.

        Raises:
            OSError, ValueError: a named model cannot be loaded; options for a model that is not named; or a config
                for a model that has an adapter.
        """
        named, untrained = isinstance(given, str | os.PathLike), ""
        if self.options is not None and not named:
            raise ValueError(
                f"model_init_kwargs are for a model given by its name, but model is a {type(given).__name__}; load it "
                "with these options, or leave them out."
            )
        if named:
            given, untrained = load_base_model(os.fspath(given), self._class_names(), self.options)
        if self.peft_config is None:
            return given
        if isinstance(given, PeftModel):
            raise ValueError(
                "peft_config is given for a model that has an adapter already; leave it out, or pass the base model."
            )
        config = copy.deepcopy(self.peft_config)  # PEFT writes into it
        if untrained:
            _train_head(config, given, untrained)
        return get_peft_model(given, config, revision=self._revision)

    def _class_names(self) -> list[str]:
        if self.given_names is not None or self.train_dataset is None:
            return self.given_names or []
        dataset, column = self.train_dataset, self.args.label_column
        if is_torch_set(dataset):
            return torch_set_names(dataset, column, None)
        return (
            multi_label_names(dataset, column, None)
            if is_multi_label(dataset, column)
            else class_names(dataset, column)
        )

    @property
    def _revision(self) -> str | None:
        return (self.options or {}).get("revision")

    def find_processor(self, model: nn.Module) -> Any:
        """Return the processor found where the model was loaded from, or None."""
        return find_processor(model, revision=self._revision)


def _train_head(config: Any, model: nn.Module, reason: str) -> None:
    """Let the adapter train and save a head for a reason, in words that follow its path, with a warning.

    Raises:
        ValueError: the adapter cannot, so that the head would stay random.
    """
    path = head_path(model) or ""
    saved = getattr(config, "modules_to_save", None) or []
    if isinstance(config, PrototypeConfig) or any(covers(name, path) for name in saved):
        return
    if not hasattr(config, "modules_to_save"):
        raise ValueError(
            f"The head {path!r} {reason} and must be trained, but {type(config).__name__} has no modules_to_save; "
            "take another config, or a model whose head was trained."
        )
    config.modules_to_save = [*saved, path]
    warnings.warn(
        f"The head {path!r} {reason}, so it is trained and saved with the adapter: modules_to_save="
        f"{config.modules_to_save}. Name it there to leave out this warning.",
        stacklevel=5,
    )
