"""Prompt checkpoints of the papers' published code, converted to adapters."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..models.tensor_files import check_tensors
from ..tuners.npt import NPTConfig
from ..validation import one_line
from .adapter_folder import refuse_model_folder, writing_adapter

_TEXT, _VISION = "text_model", "vision_model"
_Found = dict[tuple[str, int], dict[str, Tensor]]  # (tower, layer) -> parameters there


@dataclass
class ImportedPrompts:
    """Prompts read from a checkpoint, under this package's parameter names.

    Attributes:
        config: an adapter config with the numbers and depths of the prompts.
        state_dict: float32 tensors, as in `adapter_model.safetensors`.
    """

    config: NPTConfig
    state_dict: dict[str, Tensor]

    def save_pretrained(self, folder: str | Path, base_model_name_or_path: str | None = None) -> None:
        """Write an adapter folder for `PeftModel.from_pretrained(CLIPModel, folder)`."""
        parent = "transformers.models.clip.modeling_clip"
        self.config.inference_mode = True
        self.config.base_model_name_or_path = base_model_name_or_path
        self.config.auto_mapping = {"base_model_class": "CLIPModel", "parent_library": parent}
        refuse_model_folder(folder)
        with writing_adapter(folder) as part:
            save_file(self.state_dict, part / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            self.config.save_pretrained(str(part))


def import_prompts(path: str | Path, format: str, template: str = "a photo of a {}.") -> ImportedPrompts:
    """Read the `.pth.tar` checkpoint of a prompt learner's published code.

    Args:
        path: checkpoint, read with `weights_only=True`: nothing in it is executed.
        format: "coop"; "ivlp" for the prompts of IVLP, PromptSRC and Prompt-OT; or "maple".
        template: text around a class name that the prompts were trained with.

    Raises:
        ValueError: the format is unknown; or the file cannot be read, has no prompts of that format, or holds a
            context for each class (CoOp's CSC), which has no meaning for new classes.

    Example:

    ```python
    import_prompts("model.pth.tar-50", format="coop").save_pretrained("adapter", "openai/clip-vit-base-patch16")
    ```
    """
    if format not in _READERS:
        raise ValueError(f"format={format!r} must be one of {', '.join(_READERS)}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise many types
        raise ValueError(f"{path} cannot be read as weights: {one_line(error)}") from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    state = state if isinstance(state, dict) else {}
    prefix = re.compile(r"^(module\.)?(prompt_learner\.)?")
    state = {prefix.sub("", key): value for key, value in state.items() if isinstance(key, str)}
    try:
        found = _READERS[format](state) if isinstance(state.get("ctx"), Tensor) else {}
    except KeyError as error:
        raise ValueError(f"{path} holds no prompts in the layout of {format!r}: it lacks {error}.") from error
    if not found:
        raise ValueError(f"{path} holds no prompts in the layout of {format!r}; pass the format that it was saved in.")
    if state["ctx"].dim() == 3:
        raise ValueError(
            f"{path} has a context for each class (CSC), which does not fit other classes; pass a checkpoint that has "
            "one context for all classes."
        )
    for (tower, layer), parameters in found.items():
        for name, value in parameters.items():
            if not isinstance(value, Tensor) or value.dim() != 2 - name.endswith("bias") or not value.numel():
                kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                wanted = "vector" if name.endswith("bias") else "matrix"
                raise ValueError(f"{path}: {name} of {tower}, layer {layer}, must be a {wanted}; got {kind}.")
    depths = {tower: 1 + max((i for t, i in found if t == tower), default=0) for tower in (_TEXT, _VISION)}
    at_input = found.get((_VISION, 0), {})
    coupled = "coupling.weight" in at_input
    vision = state["ctx"] if coupled else at_input.get("prompt")
    config = NPTConfig(
        num_text_tokens=state["ctx"].shape[0],
        num_vision_tokens=0 if vision is None else vision.shape[0],
        text_depth=depths[_TEXT],
        vision_depth=depths[_VISION],
        coupling="coupled" if coupled else "independent",
        template=template,
    )
    adapter = {
        f"base_model.model.{tower}.{f'encoder.layers.{i}' if i else 'embeddings'}.ncgeo_npt_{name}": value
        for (tower, i), parameters in found.items()
        for name, value in parameters.items()
    }
    try:
        check_tensors(adapter)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    # copies, because a checkpoint's tensors may share memory, which safetensors cannot save
    return ImportedPrompts(config, {key: value.float().contiguous().clone() for key, value in adapter.items()})


def _read_coop(state: dict[str, Tensor]) -> _Found:
    return {(_TEXT, 0): {"prompt": state["ctx"]}}


def _read_ivlp(state: dict[str, Tensor]) -> _Found:
    """Read prompts from a whole model: `VPT` at the image input, `VPT_shallow` in each deeper layer."""
    found = _read_coop(state)
    for encoder, tower in (("text_encoder", _TEXT), ("image_encoder", _VISION)):
        if f"{encoder}.VPT" in state:
            found[tower, 0] = {"prompt": state[f"{encoder}.VPT"]}
        for key, value in state.items():
            match = re.fullmatch(rf"{encoder}\.transformer\.resblocks\.(\d+)\.VPT_shallow", key)
            if match:
                found[tower, int(match[1])] = {"prompt": value}
    return found if len(found) > 1 else {}


def _read_maple(state: dict[str, Tensor]) -> _Found:
    """Read text vectors, and for each layer the map from them to the vision vectors."""
    found: _Found = _read_coop(state)
    if "proj.weight" not in state:
        return {}
    found[_VISION, 0] = {f"coupling.{name}": state[f"proj.{name}"] for name in ("weight", "bias")}
    for i in range(sum(key.startswith("compound_prompts_text.") for key in state)):
        projection = f"compound_prompt_projections.{i}"
        found[_TEXT, i + 1] = {"prompt": state[f"compound_prompts_text.{i}"]}
        found[_VISION, i + 1] = {f"coupling.{n}": state[f"{projection}.{n}"] for n in ("weight", "bias")}
    return found


_READERS: dict[str, Callable[[dict[str, Tensor]], _Found]] = {
    "coop": _read_coop,
    "ivlp": _read_ivlp,
    "maple": _read_maple,
}
