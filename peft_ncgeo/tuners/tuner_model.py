"""Base tuner of this package: checks, weighted combination and strict loading of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..models.adapters import unwrap
from ..models.precision import hold_in_float32
from ..models.snapshots import unchanged_on_error
from ..models.tensor_files import check_tensors
from ..validation import short_repr
from .combination import adapter_tensors, check_combination, combined_tensors, is_prompt
from .tuner_layer import TunerLayer


class TunerModel(BaseTuner):
    """Base of all tuners in this package; subclasses create the wrappers."""

    tuner_layer_cls = TunerLayer
    target_module_mapping = {}  # noqa: RUF012  as PEFT declares it

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject the adapter as PEFT does, after a check of adapters that the model already has.

        Only the config decides which modules are wrapped. PEFT would also read a `state_dict`, but it does not have
        the layers without parameters, which remove vision prompts or check texts.
        """
        kwargs.pop("state_dict", None)
        if isinstance(model, PeftModel):
            raise ValueError("The model is a PeftModel; pass the model inside it, model.get_base_model().")
        config: Any = self.peft_config[adapter_name]
        names = tuple(config.modules_to_save or ())  # PEFT adds two more for a task_type
        if names and not any(
            path.endswith(names) for path, _ in model.named_modules()
        ):  # PEFT would silently save nothing
            raise ValueError(
                f"modules_to_save names {short_repr(names[0])}, which {type(model).__name__} does not have."
            )
        for module in model.modules():
            if isinstance(module, TunerLayer) and not module.adapter_layer_names[0].startswith(self.prefix):
                raise ValueError(
                    "The model holds an adapter of another method of this package, which would be switched off. One "
                    "PrototypeConfig can hold prompts too; `adapt` takes a prompted model directly."
                )
            others = isinstance(module, BaseTunerLayer) and not isinstance(module, TunerLayer)
            if others and adapter_name in module._get_available_adapters():  # type: ignore[operator]
                raise ValueError(
                    f"The model's {type(module).__name__} adapter is named {adapter_name!r} too, and their weights "
                    "would mix in files; inject it under another adapter_name."
                )
        with unchanged_on_error(model):
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Return the config unchanged; PEFT would require target_modules, but the tuners find the modules."""
        return peft_config

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast the adapter as PEFT does; also cast modules trained as a whole, which PEFT does not."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            hold_in_float32(self.model)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        r"""Add an adapter that is a weighted combination of other adapters, with the config of the first one.

        With "linear", every trained tensor is the sum over the adapters i, `P = sum_i w_i P_i`. This is a sum of
        weights, not of outputs: coupled vision vectors, `V_i = T_i A_i^T + b_i`, become `(sum_i w_i T_i) (sum_i w_i
        A_i)^T + sum_i w_i b_i`, and so do projectors and heads of other methods.

        "slerp" takes two adapters with weights `[1 - t, t]`. Each prompt vector rotates from the first adapter's
        direction to the second's by the share t of their angle, and its length is interpolated linearly:
        `p = ((1 - t) ||a|| + t ||b||) slerp(a / ||a||, b / ||b||, t)`. All other tensors are combined linearly.

        The new adapter is not active; call `set_adapter` to activate it.

        Args:
            adapters: names of adapters of this method.
            weights: one number for each adapter, of any sign and sum; a sum of 1 keeps the scale of the tensors.
            adapter_name: name of the new adapter.
            combination_type: "linear" or "slerp".

        Raises:
            ValueError: an adapter or combination type is unknown; the new name is taken; there is not one finite
                weight for each adapter; slerp does not support the weights or adapters; configs differ in more than
                the start of training; fixed prototypes differ; or adapters have modules_to_save, as with LoRA. The
                model does not change in this case.

        Example:

        ```python
        model.add_weighted_adapter(["photos", "sketches"], [0.7, 0.3], "both", combination_type="slerp")
        model.set_adapter("both")
        ```
        """
        layers = [module for module in self.model.modules() if isinstance(module, TunerLayer)]
        own = {
            name for layer in layers for name in layer._get_available_adapters()
        }  # peft_config may hold other methods too
        configs = {name: config for name, config in self.peft_config.items() if name in own}
        check_combination(configs, adapters, weights, adapter_name, combination_type)
        if adapter_name in self.peft_config:
            raise ValueError(f"The model has an adapter {adapter_name!r} already; delete it or choose another name.")
        combined = [combined_tensors(layer, adapters, weights, combination_type) for layer in layers]
        if combination_type == "slerp" and not any(is_prompt(name) for tensors in combined for name in tensors):
            raise ValueError(
                "slerp rotates prompt vectors, but these adapters have none; use combination_type='linear'."
            )
        with unchanged_on_error(self), torch.no_grad():
            self.peft_config[adapter_name] = replace(configs[adapters[0]])
            self.inject_adapter(self.model, adapter_name)
            for layer, tensors in zip(layers, combined, strict=True):
                for name, tensor in adapter_tensors(layer, adapter_name).items():
                    tensor.copy_(tensors[name])

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies `.weight` and `.bias`, which embeddings and layers do not have.
        setattr(parent, child_name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map the tensors as PEFT does; raise an error for missing (they would be random) and unexpected tensors."""
        expected = {
            f"{name}.{key}": value.shape
            for name, layer in model.named_modules()
            if isinstance(layer, TunerLayer)
            for key, value in layer.state_dict().items()
            if key.startswith(cls.prefix) and adapter_name in key.split(".")
        }
        wanted = {cls._remove_adapter_name_from_key(key, adapter_name).removeprefix(_PEFT) for key in expected}
        renamed = {_PEFT + _today(key.removeprefix(_PEFT), wanted): value for key, value in state_dict.items()}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)
        own = {key: value for key, value in remapped.items() if cls.prefix in key}
        given = {key: value.shape for key, value in own.items()}
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
            listed = "; ".join(sorted(wrong)[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise ValueError(
                f"The adapter does not fit {type(unwrap(model)).__name__}; it was made for another architecture or "
                f"depth: {listed}."
            )
        check_tensors(own)
        return remapped


_PEFT = "base_model.model."


def _today(key: str, wanted: set[str]) -> str:
    """Return the Transformers 5 name for a Transformers 4 name of a prompt, if only the new name is wanted.

    ViT and DeiT kept their layers under `encoder.layer`, and CLIP's single towers had an inner model.
    """
    for old, new in (("encoder.layer.", "layers."), ("text_model.", ""), ("vision_model.", "")):
        if key not in wanted and key.replace(old, new) in wanted:
            return key.replace(old, new)
    return key
