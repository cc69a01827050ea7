"""ONNX graph of a tuned classifier, checked against the model; needs `pip install peft_ncgeo[onnx]`."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

try:  # fails at import, before any work
    import onnxruntime
    import onnxscript  # noqa: F401  torch.onnx translates with it
except ImportError as error:
    raise ImportError(
        f"An ONNX export needs onnx, onnxruntime and onnxscript ({error}); install them with `pip install "
        "peft_ncgeo[onnx]`."
    ) from error

from ..classifiers.fixed_classes import check_finite, named_outputs
from ..classifiers.head_files import fixed_image
from ..data.head_names import MULTI_LABEL, head_names, name_numbers
from ..data.processors import image_processor
from ..geometry.sphere import cosine_logits
from ..models.adapters import unwrap
from ..models.heads import classification_head
from ..models.image_encoder import encode_images, image_inputs
from ..models.towers import logit_bias, logit_scale

FILE, INPUT, OUTPUT, OPSET = "model.onnx", "pixel_values", "logits", 18
_RELATIVE = 1e-4  # largest difference between graph and model, of the largest logit
# about how torch itself reads its graphs
_TORCHS_OWN = re.escape("`isinstance(treespec, LeafSpec)` is deprecated")


@dataclass(frozen=True)
class OnnxClassifier:
    """ONNX graph of a classifier with its config; it is saved like a Transformers model.

    Attributes:
        program: the result of `torch.onnx.export`.
        config: config of the image tower, with the class names.
        pixels: (3, C, H, W), pixels on which the written graph is checked.
        logits: (3, K), the model's logits for these pixels.
    """

    program: Any
    config: Any
    pixels: Tensor
    logits: Tensor

    def save_pretrained(self, folder: Path) -> None:
        """Write `model.onnx` and `config.json`, and run the graph on one image and on three.

        Weights of more than 1.5 GiB go into a separate file, `model.onnx.data`, since a graph file cannot exceed 2
        GiB.

        Raises:
            ValueError: the graph's logits differ from the model's.
        """
        folder.mkdir(parents=True)
        self.program.save(str(folder / FILE))
        self.config.save_pretrained(folder)
        session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
        for count in (1, len(self.pixels)):
            found = torch.from_numpy(session.run([OUTPUT], {INPUT: self.pixels[:count].numpy()})[0])
            error = float((found - self.logits[:count]).abs().max() / self.logits.abs().max())
            if not error <= _RELATIVE:
                raise ValueError(
                    f"The ONNX graph gives other logits than the model for {count} images: they differ by {error:.1e} "
                    f"of the largest, more than {_RELATIVE:g}; export with format='safetensors'."
                )

    def describe(self, rows: str) -> str:
        """Return the text of a README; `rows` is a phrase for the rows of the head."""
        shape = ", ".join(map(str, self.pixels.shape[1:]))
        chances = _CHANCES[self.config.problem_type == MULTI_LABEL]
        return _README.format(count=self.logits.shape[1], rows=rows, shape=shape, opset=OPSET, chances=chances)


class _Logits(nn.Module):
    """Logits (B, K) of pixels: cosines with text features (K, d), or some outputs of an image classifier's head."""

    text_features: Tensor | None
    outputs: Tensor

    def __init__(self, model: nn.Module, text_features: Tensor | None, outputs: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("text_features", text_features)
        self.register_buffer("outputs", torch.tensor(outputs, dtype=torch.int64))

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.text_features is None:
            return self.model(pixel_values=pixel_values).logits.float()[:, self.outputs]
        features = encode_images(self.model, pixel_values)
        return cosine_logits(features, self.text_features, logit_scale(self.model), logit_bias(self.model))


@torch.no_grad()
def onnx_classifier(
    model: nn.Module, class_names: Sequence[str], text_features: Tensor | None, processor: Any, multi_label: bool
) -> OnnxClassifier:
    """Return the graph of a classifier for these names, in float32, for any number of images.

    Adapters that PEFT can merge are merged into copies of the weights; the others become part of the graph.

    Args:
        model: a dual encoder or an image classifier, with or without adapters, in evaluation mode.
        text_features: unnormalized text features (K, d) of a dual encoder; None: use the image classifier's own
            outputs for these names.
        processor: the model's processor.
        multi_label: True if an image may have any number of labels; the config then says so.

    Raises:
        ValueError: the model has neither a text tower nor a head, lacks one of the names, is quantized or offloaded,
            needs other inputs than pixels or images of several sizes, or cannot be traced.
    """
    name = type(unwrap(model)).__name__
    if text_features is None and classification_head(model) is None:
        raise ValueError(f"{name} has neither a text tower nor a classification head, so there is nothing to export.")
    outputs = [] if text_features is not None else name_numbers(class_names, head_names(model))
    pixels = _pixels(image_processor(processor), name)
    logits = _Logits(
        _copy(unwrap(model), name), None if text_features is None else text_features.cpu().float(), outputs
    )
    check_finite(dict(logits.named_parameters()))
    expected = logits.eval()(pixels)
    _merge(logits)
    program = _trace(logits, pixels[:2], name)
    return OnnxClassifier(program, _config(unwrap(model), class_names, multi_label), pixels, expected)


def _pixels(processor: Any, name: str) -> Tensor:
    """Return pixels (3, C, H, W) that the image processor makes from a square, a wide and a high image."""
    image = fixed_image()
    images = [image, image.resize((96, 64)), image.resize((64, 80))]
    try:
        found = image_inputs(processor(images=images, return_tensors="pt"))
    except ValueError as error:
        raise ValueError(
            f"{type(processor).__name__} makes images of more than one size, but a graph takes one; set its size, or "
            "do_center_crop."
        ) from error
    if len(found) > 1:
        others = ", ".join(key for key in found if key != INPUT)
        raise ValueError(f"{name} needs {others} beside pixel_values, and an ONNX export has no place for them.")
    return found[INPUT].float()


def _copy(model: Any, name: str) -> Any:
    """Return a copy of the model in float32 on the CPU, with an attention implementation that can be traced."""
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{name} is quantized; load its base model without quantization to export it.")
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError(f"{name} is offloaded in part; load it onto one device to export it.")
    made = copy.deepcopy(model).cpu().float().requires_grad_(False)
    if made.config._attn_implementation not in ("eager", "sdpa"):
        made.set_attn_implementation("eager")
    return made


def _merge(model: nn.Module) -> None:
    """Merge the adapters that PEFT can merge; others stay as they are."""
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        if not layer.disable_adapters and not layer.merged:
            try:
                layer.merge(safe_merge=False)
            except (NotImplementedError, ValueError):  # traced as it is
                continue


def _trace(logits: nn.Module, pixels: Tensor, name: str) -> Any:
    any_number = {INPUT: {0: torch.export.Dim.DYNAMIC}}
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "dynamic_shapes": {INPUT: {0: "batch"}}}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _TORCHS_OWN, FutureWarning)
            traced = torch.export.export(logits, (pixels,), dynamic_shapes=any_number, strict=False)
            return torch.onnx.export(traced, (), opset_version=OPSET, dynamo=True, verbose=False, **names)
    except Exception as error:  # torch raises many kinds
        reason = next(iter(str(error.__cause__ or error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"{name} cannot be traced to an ONNX graph by torch {torch.__version__} ({reason}); try a newer torch."
        ) from error


def _config(model: Any, class_names: Sequence[str], multi_label: bool) -> Any:
    config = copy.deepcopy(getattr(model.config, "vision_config", model.config))
    for key, value in named_outputs(class_names, multi_label).items():
        setattr(config, key, value)
    config.name_or_path, config.architectures, config.dtype = "", None, torch.float32  # no path of this machine
    return config


_CHANCES = {
    False: "A softmax of the logits gives the probabilities",
    True: "An image may have any number of labels: a sigmoid of each logit gives its probability",
}
_README = """---
library_name: onnx
pipeline_tag: image-classification
---

# ONNX classifier for {count} classes

An image tower and, for {count} classes, {rows}. The classes' names are in `config.json`. Runs without PyTorch.

| `model.onnx`, opset {opset} | name | type | shape |
|---|---|---|---|
| input | `pixel_values` | float32 | (batch, {shape}) |
| output | `logits` | float32 | (batch, {count}) |

{chances}. `preprocessor_config.json` says how an image becomes pixels.

```python
import onnxruntime
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

folder = "path/to/this/folder"
names, prepare = AutoConfig.from_pretrained(folder).id2label, AutoImageProcessor.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
pixels = prepare(images=[Image.open("photo.jpg").convert("RGB")], return_tensors="np")["pixel_values"]
print(names[session.run(["logits"], {{"pixel_values": pixels}})[0][0].argmax()])
```
"""
