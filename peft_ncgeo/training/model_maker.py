"""Maker of the model that a trainer trains: it loads a model by its name, and adds an adapter for a config."""

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
        peft_config: config of the adapter that every model gets; None: models are not changed.
        args: training arguments, with `model_init_kwargs` for a model that is given by its name.
        train_dataset: training set; an image classifier that is given by its name gets a head for its classes.
        given_names: class names of a training set that does not have them.

    Raises:
        TypeError: `peft_config` is not a `PeftConfig`.
        ValueError: an option cannot be given; see [`~peft_ncgeo.loading.base_models.load_base_model`].
    """

    def __init__(
        self, peft_config: Any, args: GeometryTrainingArguments, train_dataset: Any, given_names: list[str] | None
    ) -> None:
        if peft_config is not None and not isinstance(peft_config, PeftConfig):
            raise TypeError(
                f"peft_config must be one config such as LoraConfig(...), got {short_repr(peft_config)}; pass one, or "
                "make the model yourself with get_peft_model and leave peft_config out."
            )
        self.peft_config, self.args = peft_config, args
        self.train_dataset, self.given_names = train_dataset, given_names
        self.options = None if args.model_init_kwargs is None else check_options(args.model_init_kwargs)

    def __call__(self, given: Any) -> nn.Module:
        """Return the model, which is given as an object or by its name.

        Raises:
            OSError, ValueError: a model cannot be loaded by its name; options are given for a model that is an object;
                or a config is given for a model that has an adapter.
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
    """Let the adapter train and save a head, and warn with the reason, given as words after the head's path.

    Raises:
        ValueError: the adapter cannot train a head, so the head would stay random.
    """
    path = head_path(model) or ""
    saved = getattr(config, "modules_to_save", None) or []
    if isinstance(config, PrototypeConfig) or any(covers(name, path) for name in saved):
        return
    if not hasattr(config, "modules_to_save"):
        raise ValueError(
            f"The head {path!r} {reason} and must be trained, but {type(config).__name__} has no modules_to_save; "
            "use another config, or a model whose head was trained."
        )
    config.modules_to_save = [*saved, path]
    warnings.warn(
        f"The head {path!r} {reason}, so it is trained and saved with the adapter: modules_to_save="
        f"{config.modules_to_save}. Name it there to leave out this warning.",
        stacklevel=5,
    )
