"""Export of a tuned model as a classifier for fixed class names, without a text tower and without PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel

from ..classifiers.aligned import AlignedClassifier
from ..classifiers.exported_classifier import ExportedClassifier
from ..classifiers.fixed_classes import (
    PARTS,
    check_finite,
    fixed_classifier,
    image_part,
    named_outputs,
    refuse_vision_prompts,
)
from ..classifiers.zero_shot import ZeroShotClassifier
from ..data.class_prompts import list_names
from ..data.head_names import head_names, is_multi_label, name_numbers
from ..data.processors import image_processor
from ..geometry.sphere import l2_normalize
from ..markdown import escape
from ..models.adapters import evaluation_mode, unwrap
from ..models.cosine_head import CosineHead
from ..models.heads import classifier
from ..models.image_classifier import ImageClassifierModel, check_choice
from ..models.text_setting import active_text_setting
from ..models.towers import find_towers, reads_text
from ..tuners.prompt_layer import PromptLayer

FORMATS = ("safetensors", "onnx")
_PARTS_OF_STUDENT = ("backbone", "projection", "projector")


def export_classifier(
    model: nn.Module | AlignedClassifier,
    class_names: Sequence[str],
    folder: str | Path,
    processor: Any,
    template: str | None = None,
    format: str = "safetensors",
) -> Path:
    r"""Write an image classifier for these class names, which gives the probabilities of `ZeroShotClassifier`.

    The class texts are encoded once; the text tower is left out. With the image's projected feature f and the text
    features `g_k`,

    .. math:: z_k = \exp(\texttt{logit\_scale}) \, \mathrm{unit}(f) \cdot \mathrm{unit}(g_k)

    Adapters that PEFT can merge, such as LoRA, are merged into the weights, which rounds them if the model is in half
    precision; vision prompts are saved as tensors. The model itself does not change.

    The folder of a `CLIPModel` runs without this package. It holds `model.safetensors` (in the model's dtype; text
    features and scale in float32 or wider), `config.json` with the names, the image processor's config, a README, and
    `exported_classifier.py`, the class that Transformers needs to read them. Without vision prompts,
    `CLIPVisionModelWithProjection` can read the image tower too.

    The folder of another dual encoder, such as SigLIP, holds an [`~peft_ncgeo.ImageClassifier`] with a cosine head,
    which Transformers can read after `import peft_ncgeo`. It cannot hold vision prompts.

    An [`~peft_ncgeo.ImageClassifier`] with the image tower of a CLIP, such as a student with prompts and a projector,
    is exported like a `CLIPModel`; the rows of its cosine head take the place of the texts.

    With `format="onnx"` the folder holds a graph, `model.onnx`, that runs without PyTorch: `pixel_values`
    (batch, C, H, W) to `logits` (batch, K), float32, opset 18, for any number of images. Every dual encoder
    and image classifier can be exported, also with prompts, prototypes or other adapters that cannot be merged. The
    folder also holds `config.json` with the names, the image processor's config and a README. Weights of more than
    1.5 GiB are in `model.onnx.data`. The written graph is run with onnxruntime and must give the model's logits.

    Args:
        model: a dual encoder with or without adapters, or a `PeftModel` around one. Its active adapters are exported.
            An image classifier is accepted for ONNX, or if it has the image tower of a CLIP. An
            [`~peft_ncgeo.classifiers.aligned.AlignedClassifier`] is exported with its aligned rows.
        class_names: K class names, at least two; for an image classifier, some of its own names.
        folder: a new or empty folder; it is written completely or not at all.
        processor: the model's processor, with its tokenizer; for an image classifier, its image processor.
        template: text around a class name. Default: the adapter's own, else "a photo of a {}.".
        format: "safetensors" or "onnx".

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists and is not empty.
        TypeError: `model` is not a model; it is a few-shot classifier, for instance.
        ImportError: a package for ONNX is missing; `pip install peft_ncgeo[onnx]` installs them.
        NotImplementedError: it is not known how the model reads texts.
        ValueError: there are fewer than two names, or [`class_prompts`] refuses them; the model is not a dual encoder,
            or its image feature is not known; it has vision prompts and is not a `CLIPModel`; an adapter of the image
            tower cannot be merged; the processor has no tokenizer; weights are not finite; the format is unknown; for
            "safetensors", the model was trained with MultiLabelLoss; or, for "onnx", the model is quantized or
            offloaded, or cannot be traced.

    Example:

    ```python
    export_classifier(model, ["red panda", "snow leopard"], "pandas", processor)
    pipeline("image-classification", model="pandas", trust_remote_code=True)("photo.jpg")
    ```
    """
    check_choice("format", format, FORMATS)
    if format == "onnx":
        from .onnx_export import onnx_classifier  # an extra; one that is missing is told before any work
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty; name a new folder.")
    names, tuned = list_names(class_names), model.model if isinstance(model, AlignedClassifier) else model
    if not isinstance(tuned, nn.Module):
        raise TypeError(f"Expected a model, or what align_classifier returns, got {type(model).__name__}.")
    with evaluation_mode(tuned):
        features, rows = _class_rows(model, tuned, names, processor, template)
        if format == "onnx":
            lists = is_multi_label(tuned) if features is None else active_text_setting(tuned).multi_label
            lists = lists and tuned is model  # an aligned classifier gives one label
            exported: Any = onnx_classifier(tuned, names, features, processor, lists)
            readme = exported.describe(rows)
        else:
            exported, told = _model(tuned, names, features)
            readme = _README.format(count=len(names), rows=rows, **told)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        whole = Path(temporary) / "export"
        exported.save_pretrained(whole)
        image_processor(processor).save_pretrained(whole)
        (whole / "README.md").write_text(readme, encoding="utf-8")
        whole.replace(folder)
    return folder


def _class_rows(
    model: Any, tuned: nn.Module, names: list[str], processor: Any, template: str | None
) -> tuple[Tensor | None, str]:
    """Return the names' unnormalized text features (K, d), or None for a head's own rows; and a phrase on them."""
    if not reads_text(tuned):
        return None, "the rows of its head"
    if isinstance(model, AlignedClassifier):
        return model.rows_of(names), "their text features, rotated towards the class means"
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"{type(processor).__name__} has no tokenizer for the class names; pass the CLIPProcessor.")
    text = ZeroShotClassifier(tuned, processor, template)
    own = ", or as the texts of its own" if text.class_texts else ""
    return text.text_features(names), f'their text features, each name written as "{escape(text.template)}"{own}'


def _model(model: nn.Module, names: list[str], text_features: Tensor | None) -> tuple[Any, dict[str, str]]:
    """Return a classifier that Transformers can save, and the texts on it for its README."""
    if _is_student(model):
        return _of_student(unwrap(model), names), _CODE
    if text_features is None:
        raise ValueError(
            f"{type(unwrap(model)).__name__} reads no text, so there is nothing to export; save it with "
            "save_pretrained, after merge_and_unload where its adapter can be merged, or pass format='onnx'."
        )
    if active_text_setting(model).multi_label:
        raise ValueError(
            f"The adapter of {type(unwrap(model)).__name__} was trained with MultiLabelLoss, and this export has no "
            "place for its logit_bias; pass format='onnx', or predict with ZeroShotClassifier.predict_labels."
        )
    if isinstance(unwrap(model), CLIPModel):
        return _of_clip(unwrap(model), names, text_features), _CODE
    refuse_vision_prompts(model)
    return fixed_classifier(unwrap(model), names, text_features), _PACKAGE


def _is_student(model: nn.Module) -> bool:
    """Return True for an image classifier with a CLIP's projected image tower and a cosine head."""
    base = unwrap(model)
    if not (isinstance(base, ImageClassifierModel) and isinstance(classifier(model), CosineHead)):
        return False
    return base.config.vision_class == CLIPVisionModel.__name__ and base.config.projection_dim is not None


@torch.no_grad()
def _of_clip(model: CLIPModel, class_names: list[str], text_features: Tensor) -> ExportedClassifier:
    # detached, or assigning them to the export would make them trainable
    parts = image_part(model)
    weights = {name: value.detach() for name, value in parts.named_parameters() if name.startswith(PARTS)}
    scale = model.logit_scale.to(torch.promote_types(model.logit_scale.dtype, torch.float32))
    return _exported(model, model.config.vision_config, weights, class_names, text_features, scale)


@torch.no_grad()
def _of_student(model: Any, class_names: list[str]) -> ExportedClassifier:
    outputs, head = name_numbers(class_names, head_names(model)), classifier(model)
    parts = image_part(model, _PARTS_OF_STUDENT)
    weights = {f"vision_model.{name}": value.detach() for name, value in parts.backbone.named_parameters()}
    weights |= {"visual_projection.weight": parts.projection.weight.detach()}
    weights |= {f"projector.{name}": value for name, value in parts.projector.state_dict().items()}
    rows = head.weight.detach()[outputs]
    scale = torch.tensor(head.scale, dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device).log()
    return _exported(model, model.config.vision_config, weights, class_names, rows, scale, model.config.projector_dim)


def _exported(
    model: Any,
    vision_config: Any,
    weights: dict[str, Tensor],
    class_names: list[str],
    text_features: Tensor,
    scale: Tensor,
    projector_dim: int | None = None,
) -> ExportedClassifier:
    """Return an export that holds these weights, the model's vision prompts, and rows (K, d) of any length."""
    prompts = _vision_prompts(model)
    weights = {
        **weights,
        **{f"prompts.{layer}": prompt for layer, prompt in prompts.items()},
        "text_features": l2_normalize(text_features),
        "logit_scale": scale,
    }
    check_finite({**weights, "exp(logit_scale)": scale.exp()})
    config = CLIPVisionConfig.from_dict(
        {
            **vision_config.to_dict(),
            "projection_dim": len(weights["visual_projection.weight"]),
            **({} if projector_dim is None else {"projector_dim": projector_dim}),
            **named_outputs(class_names, is_multi_label(model)),
            "prompt_layers": list(prompts),
            "num_prompts": len(next(iter(prompts.values()), ())),
        }
    )
    with torch.device("meta"):  # takes no memory or random numbers for weights that are replaced below
        exported = ExportedClassifier(config)
    exported.load_state_dict(weights, assign=True)
    return exported


def _vision_prompts(model: nn.Module) -> dict[int, Tensor]:
    """Return layer -> prompt vectors (n, width) at its input, in the model's dtype; compute coupled prompts."""
    tower = find_towers(model)["vision"]
    like = next(model.get_submodule(tower.embeddings).parameters()).new_empty(1, 0, 0)
    found = {}
    for i, path in enumerate([tower.embeddings, *tower.layers[1:]]):  # layer 0's prompts enter at the embeddings
        place = model.get_submodule(path)
        prompt = place.active_prompt(like) if isinstance(place, PromptLayer) else None
        if prompt is not None:
            found[i] = prompt[0]
    return found


_README = """---
library_name: {library}
pipeline_tag: image-classification
---

# Classifier for {count} classes

{tower} and, for {count} classes, {rows}. The classes' names are in `config.json`. {needs}

```python
{first}from transformers import pipeline

classify = pipeline("image-classification", model="path/to/this/folder"{option})
classify("photo.jpg")
```
"""
_CODE = {
    "library": "transformers",
    "tower": "CLIP's image tower",
    "needs": "Needs torch and transformers 5 or later; `trust_remote_code=True` lets Transformers run\n"
    "`exported_classifier.py`, which is in this folder.",
    "first": "",
    "option": ", trust_remote_code=True",
}
_PACKAGE = {
    "library": "peft_ncgeo",
    "tower": "An image tower",
    "needs": "Needs the package `peft_ncgeo`, which tells Transformers how to read them.",
    "first": "import peft_ncgeo\n",
    "option": "",
}
