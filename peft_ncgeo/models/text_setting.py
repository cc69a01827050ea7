"""Settings kept beside an adapter's weights and config: template, class names, rows, and kind of labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..validation import short_repr
from .adapters import adapter_layers
from .templates import spelled

_ATTRIBUTE = "ncgeo_text_setting"  # of a PEFT config: no field, so PEFT neither writes nor compares it


@dataclass(frozen=True)
class TextSetting:
    """Template, class names and kind of labels that an adapter was trained with, and trained values for each class.

    Attributes:
        template: text around a class name; None if the adapter's own config has it.
        class_names: names of the K classes of training, in the order of its labels; empty if they are not known.
        class_texts: texts of some classes, by name, in place of the template; empty if there are none.
        rows: (K, d), weights that were trained in place of the texts of these classes; None if there are none.
        multi_label: True if an image could have any number of labels, so that each class has a probability of its own.
        logit_bias: bias that was added to the logits of a dual encoder without a bias of its own; None if there is
            none.
    """

    template: str | None = None
    class_names: tuple[str, ...] = ()
    rows: Tensor | None = field(default=None, compare=False, repr=False)
    multi_label: bool = False
    logit_bias: float | None = None
    class_texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def put_rows(self, features: Tensor, names: Sequence[str]) -> Tensor:
        """Return text features (K', d) of any names, with the trained rows in place of those of trained classes.

        Raises:
            ValueError: the rows have another width.
        """
        if self.rows is None:
            return features
        if self.rows.shape[1] != features.shape[1]:
            raise ValueError(
                f"The adapter's class rows have {self.rows.shape[1]} numbers, but the model's text features have "
                f"{features.shape[1]}; load it onto the model that it was trained on."
            )
        places = {spelled(name): i for i, name in enumerate(self.class_names)}
        found = [(k, places[spelled(name)]) for k, name in enumerate(names) if spelled(name) in places]
        features = features.clone()
        if found:
            to, of = zip(*found, strict=True)
            features[list(to)] = self.rows[list(of)].to(features)
        return features


def remember_text_setting(model: Any, setting: TextSetting, adapters: Iterable[str]) -> None:
    """Store settings for adapters of a model under PEFT, by the adapters' names."""
    for adapter in adapters:
        setattr(model.peft_config[adapter], _ATTRIBUTE, setting)


def text_setting(config: Any) -> TextSetting:
    """Return the settings of an adapter with this config: those that were stored for it, or empty ones.

    If the config has a field for the template, the template is read from that field.
    """
    known: TextSetting = getattr(config, _ATTRIBUTE, TextSetting())
    own = getattr(config, "template", None)
    return replace(known, template=own) if isinstance(own, str) else known


def active_text_setting(model: nn.Module) -> TextSetting:
    """Return the settings of the active adapters; empty settings without adapters, or if all of them are off.

    For an adapter without known settings, such as a combination that PEFT made from others, return the settings that
    the model's other adapters of its kind have in common. Settings that differ between adapters are left out; for
    templates and class texts, this is an error.

    Raises:
        ValueError: the adapters have different templates, or different texts of classes.
    """
    configs = getattr(model, "peft_config", {})
    return _setting_of([name for name in _active_adapters(model) if name in configs], configs)


def active_logit_bias(model: nn.Module) -> float | None:
    """Return the `logit_bias` of the active adapters; None if there is none, or if they differ."""
    try:
        return active_text_setting(model).logit_bias
    except ValueError:
        return None


def adapter_text_setting(model: Any, adapter: str) -> TextSetting:
    """Return the settings of one adapter, as [`active_text_setting`] does; empty settings if other adapters differ."""
    try:
        return _setting_of([adapter], model.peft_config)
    except ValueError:
        return TextSetting()


def _setting_of(adapters: Sequence[str], configs: Mapping[str, Any]) -> TextSetting:
    asked = [configs[name] for name in adapters]
    own = _known(asked)
    known = own or _known(config for config in configs.values() if type(config) in set(map(type, asked)))
    templates = list(dict.fromkeys(setting.template for setting in known if setting.template is not None))
    of_names = {setting.class_names: setting.rows for setting in known if setting.class_names}
    if len(templates) > 1:
        raise ValueError(
            f"The adapters were trained with different templates, {short_repr(templates)}; pass template, or use one "
            "adapter at a time."
        )
    texts = [setting.class_texts for setting in known if setting.class_texts]
    if any(one != texts[0] for one in texts):
        raise ValueError(
            "The adapters were trained with different class_texts; pass class_texts, or use one adapter at a time."
        )
    names, rows = next(iter(of_names.items())) if len(of_names) == 1 else ((), None)
    # rows belong to the weights of one adapter, so another one does not take them over
    kinds = {(setting.multi_label, setting.logit_bias) for setting in known}
    kind = next(iter(kinds)) if len(kinds) == 1 else (False, None)
    rows = rows if len(asked) == 1 == len(own) else None
    template, class_texts = templates[0] if templates else None, texts[0] if texts else {}
    return TextSetting(template, names, rows, *kind, class_texts=class_texts)


def _active_adapters(model: nn.Module) -> Sequence[str]:
    for layer in adapter_layers(model):
        if not layer._disable_adapters and layer.active_adapters:
            return layer.active_adapters
    return []


def _known(configs: Iterable[Any]) -> list[TextSetting]:
    return [setting for setting in map(text_setting, configs) if setting != TextSetting()]
