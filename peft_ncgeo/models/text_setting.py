"""Setting that an adapter keeps beside its weights and config: template, class names, rows, and its kind of labels."""

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
    """Template, class names and kind of labels that an adapter was trained with, and what was trained for each class.

    Attributes:
        template: text around a class name; None if the adapter's own config has it.
        class_names: names of the K classes of training, in the order of its labels; empty if they are not known.
        class_texts: texts of some classes, by name, which stand in place of the template; empty: there are none.
        rows: (K, d), weights that were trained in place of the texts of these classes; None: there are none.
        multi_label: True if an image could have any number of labels, so that each class has a probability of its own.
        logit_bias: number that was added to the logits of a dual encoder without one; None: there is none.
    """

    template: str | None = None
    class_names: tuple[str, ...] = ()
    rows: Tensor | None = field(default=None, compare=False, repr=False)
    multi_label: bool = False
    logit_bias: float | None = None
    class_texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def put_rows(self, features: Tensor, names: Sequence[str]) -> Tensor:
        """Return text features (K', d) of any names, with the trained rows in the places of trained classes.

        Raises:
            ValueError: the rows have another width.
        """
        if self.rows is None:
            return features
        if self.rows.shape[1] != features.shape[1]:
            raise ValueError(
                f"The adapter's class rows have {self.rows.shape[1]} numbers, the model's text features "
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
    """Remember a setting for adapters of a model under PEFT, by their names."""
    for adapter in adapters:
        setattr(model.peft_config[adapter], _ATTRIBUTE, setting)


def text_setting(config: Any) -> TextSetting:
    """Return the setting that belongs to an adapter with this config: what was remembered for it, or an empty one.

    The template of a config that has a field for it is that field.
    """
    known: TextSetting = getattr(config, _ATTRIBUTE, TextSetting())
    own = getattr(config, "template", None)
    return replace(known, template=own) if isinstance(own, str) else known


def active_text_setting(model: nn.Module) -> TextSetting:
    """Return the setting of the active adapters; an empty one without adapters or with all of them off.

    For an adapter of which nothing is known, such as a combination that PEFT made of others, it is the setting that
    the model's other adapters of its kind share. What differs from adapter to adapter is left out, but for templates.

    Raises:
        ValueError: the adapters have different templates, or different texts of classes.
    """
    configs = getattr(model, "peft_config", {})
    return _setting_of([name for name in _active_adapters(model) if name in configs], configs)


def active_logit_bias(model: nn.Module) -> float | None:
    """Return the `logit_bias` of the active adapters; None where there is none, or where they differ."""
    try:
        return active_text_setting(model).logit_bias
    except ValueError:
        return None


def adapter_text_setting(model: Any, adapter: str) -> TextSetting:
    """Return the setting of one adapter, as [`active_text_setting`] gives it; an empty one where others differ."""
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
