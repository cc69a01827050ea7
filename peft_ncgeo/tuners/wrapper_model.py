"""`WrapperModel`: what every tuner of this package does beside making its wrappers."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..towers import unwrap
from .wrapper import Wrapper


class WrapperModel(BaseTuner):
    """Looks after the adapters that a model has, and after the files that its own come from."""

    tuner_layer_cls = Wrapper
    target_module_mapping = {}  # noqa: RUF012  as PEFT declares it

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own, after a look at the adapters of other methods that the model holds already."""
        if isinstance(model, PeftModel):
            raise ValueError("The model is a PeftModel; pass what is inside it, model.get_base_model().")
        for module in model.modules():
            if isinstance(module, Wrapper) and not module.adapter_layer_names[0].startswith(self.prefix):
                raise ValueError(
                    "The model holds an adapter of this package's other methods, which would be switched off. One "
                    "PrototypeConfig can hold prompts too; `adapt` takes a prompted model as it is."
                )
            others = isinstance(module, BaseTunerLayer) and not isinstance(module, Wrapper)
            if others and adapter_name in module._get_available_adapters():  # type: ignore[operator]
                raise ValueError(
                    f"The model's {type(module).__name__} adapter is named {adapter_name!r} too, and their weights "
                    "would mix in files; inject that one under another adapter_name."
                )
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `.weight` and `.bias`, which embeddings and layers do not have.
        setattr(parent, child_name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's own mapping, after which every tensor must have found its place: a missing one would stay random."""
        expected = {
            f"{name}.{key}": value.shape
            for name, layer in model.named_modules()
            if isinstance(layer, Wrapper)
            for key, value in layer.state_dict().items()
            if key.startswith(cls.prefix) and adapter_name in key.split(".")
        }
        wanted = {cls._remove_adapter_name_from_key(key, adapter_name).removeprefix(_PEFT) for key in expected}
        renamed = {_PEFT + _today(key.removeprefix(_PEFT), wanted): value for key, value in state_dict.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)
        given = {key: value.shape for key, value in remapped.items() if cls.prefix in key}
        wrong = [
            *(f"missing {key}" for key in expected.keys() - given.keys()),
            *(f"unexpected {key}" for key in given.keys() - expected.keys()),
            *(
                f"{key} is {tuple(given[key])}, the model takes {tuple(expected[key])}"
                for key in given.keys() & expected.keys()
                if given[key] != expected[key]
            ),
        ]
        if wrong:
            shown = "; ".join(sorted(wrong)[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise ValueError(
                f"The adapter does not fit {type(unwrap(model)).__name__}, it was made for another architecture or "
                f"depth: {shown}."
            )
        return remapped


_PEFT = "base_model.model."


def _today(key: str, wanted: set[str]) -> str:
    """Transformers 4's name of a prompt as today's, where only that is wanted.

    ViT and DeiT kept their layers under `encoder.layer`, and CLIP's single towers a model of their own inside.
    """
    for old, new in (("encoder.layer.", "layers."), ("text_model.", ""), ("vision_model.", "")):
        if key not in wanted and key.replace(old, new) in wanted:
            return key.replace(old, new)
    return key
