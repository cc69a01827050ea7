"""Our methods as PEFT's own tests take them: a config class, its fields, and a model that returns one tensor."""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from peft_ncgeo import AdaptFormerConfig, CoPAConfig, NPTConfig, PrototypeConfig
from peft_ncgeo.tuners.copa import CoPALayer

from ..conftest import TEXT, VISION, VIT, pixels, texts, tiny

ROWS = 3


class OneTensor(PreTrainedModel):
    """PEFT's tests for models of one's own compare what `forward` returns: here a tensor (3, n) of all there is."""

    @property
    def dtype(self) -> torch.dtype:
        return super().dtype

    @dtype.setter
    def dtype(self, value: torch.dtype) -> None:
        """The tests note the type they have loaded a model in; Transformers' models know it."""

    def all_of(self, *parts: Tensor) -> Tensor:
        """The parts side by side, and beside them a column that tells CoPA's prototype head, which acts elsewhere."""
        heads = next((layer.heads for layer in self.modules() if isinstance(layer, CoPALayer)), None)
        column = torch.ones(ROWS, 1) if heads is None else heads[1].sum(0).mean().expand(ROWS, 1)
        return torch.cat([*parts, column.to(parts[0].dtype)], dim=1)


class OneTensorCLIP(OneTensor, CLIPModel):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        image = self.get_image_features(pixel_values=pixel_values.to(self.dtype)).pooler_output
        text = self.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return self.all_of(image, text)


class OneTensorViT(OneTensor, ViTForImageClassification):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.all_of(super().forward(pixel_values=pixel_values.to(self.dtype)).logits)


class OneTensorResNet(OneTensor, ResNetForImageClassification):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.all_of(super().forward(pixel_values=pixel_values.to(self.dtype)).logits)


@dataclass(frozen=True, eq=False)
class Case:
    """One method on one model; `modules` are parts of that model which `modules_to_save` can name."""

    name: str
    config_cls: Any
    model_cls: type[OneTensor]
    fields: dict[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()


RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
SHALLOW = {"num_hidden_layers": 2}  # enough for prompts that end below the last layer, and half of the time
CONFIGS: dict[type[OneTensor], PreTrainedConfig] = {
    OneTensorCLIP: CLIPConfig(text_config={**TEXT, **SHALLOW}, vision_config={**VISION, **SHALLOW}, projection_dim=24),
    OneTensorViT: ViTConfig(**{**VIT, **SHALLOW}),
    OneTensorResNet: ResNetConfig(**RESNET),
}
PHRASE = [6, 7, 8, 9]  # token ids: tiny models have no tokenizer
BOTH = {"num_text_tokens": 4, "num_vision_tokens": 4, "text_init": PHRASE, "init_std": 0.3}
VISION_ONLY = {"num_vision_tokens": 4, "vision_depth": 1, "init_std": 0.3}
# Points that do not sum to 0, as an ETF's do: the tests train on the sum of all outputs.
POINTS = {"projection_dim": 8, "temperature": 0.5, "geometry": "minority_margin"}
KEPT = {"modules_to_save": ["normalization"]}  # of a ResNet, whose running means move in training
CASES = [
    Case(
        "NPT-clip",
        NPTConfig,
        OneTensorCLIP,
        {**BOTH, "text_depth": 1, "vision_depth": 2},
        ("visual_projection", "text_projection"),
    ),
    Case(
        "NPT-clip-coupled",
        NPTConfig,
        OneTensorCLIP,
        {**BOTH, "text_depth": 2, "vision_depth": 1, "coupling": "coupled"},
        ("visual_projection", "text_projection"),
    ),
    Case("NPT-vit-vision", NPTConfig, OneTensorViT, VISION_ONLY, ("classifier", "layernorm")),
    Case(
        "PROTOTYPE-vit-vision",
        PrototypeConfig,
        OneTensorViT,
        {**VISION_ONLY, **POINTS, "class_counts": [40, 20, 10, 5, 2]},
        ("layernorm", "fc2"),
    ),
    Case(
        "PROTOTYPE-resnet-trained",
        PrototypeConfig,
        OneTensorResNet,
        {**POINTS, **KEPT, "class_counts": [40, 20, 10], "trainable": True},
        ("normalization", "convolution"),
    ),
    Case("COPA-clip", CoPAConfig, OneTensorCLIP, {}, ("text_projection", "final_layer_norm")),
    Case(
        "COPA-vit-residual", CoPAConfig, OneTensorViT, {"residual_adapters": True}, ("classifier", "layernorm_after")
    ),
    Case(
        "COPA-resnet-shared",
        CoPAConfig,
        OneTensorResNet,
        {**KEPT, "shared": True, "residual_adapters": True},
        ("normalization", "classifier"),
    ),
    Case(
        "ADAPTFORMER-clip",
        AdaptFormerConfig,
        OneTensorCLIP,
        {"bottleneck_dim": 16},
        ("text_projection", "post_layernorm"),
    ),
    # wide, so that in no layer all of ReLU is 0
    Case("ADAPTFORMER-vit", AdaptFormerConfig, OneTensorViT, {"bottleneck_dim": 16}, ("classifier", "layernorm")),
]


def targeted(case: Case, target_modules: Any = None, modules_to_save: list[str] | None = None) -> PeftConfig:
    """A config of the case in a test that names linear layers: ours find their places, and keep modules of ours."""
    fields = dict(case.fields)
    if modules_to_save is not None:
        numbers = [int(re.findall(r"\d", name)[0]) for name in modules_to_save]
        fields["modules_to_save"] = sorted({case.modules[number % len(case.modules)] for number in numbers})
    return case.config_cls(**fields)


def inputs(model_cls: type[OneTensor]) -> dict[str, Tensor]:
    """What the model's forward takes: three images, and three texts where it reads texts."""
    images = {"pixel_values": pixels(ROWS)}
    return {**texts(classes=ROWS), **images} if model_cls is OneTensorCLIP else images


FOLDER = TemporaryDirectory(prefix="peft-suite-")


@functools.cache
def saved(case: Case) -> str:
    """Where the case's model is on disk, in a folder of the case's name."""
    path = Path(FOLDER.name) / case.name
    tiny(case.model_cls, CONFIGS[case.model_cls]).save_pretrained(path)
    return str(path)


@functools.cache
def lora() -> str:
    """Where the config of an adapter of another method is on disk."""
    LoraConfig().save_pretrained(Path(FOLDER.name) / "lora")
    return str(Path(FOLDER.name) / "lora")


@functools.cache
def plain_resnet() -> str:
    """Where a ResNet is that returns what Transformers has it return."""
    path = Path(FOLDER.name) / "plain"
    tiny(ResNetForImageClassification, CONFIGS[OneTensorResNet]).save_pretrained(path)
    return str(path)


@functools.cache
def loaded(path: str, **options: Any) -> OneTensor:
    """The model in a folder, whose class the folder's name tells."""
    case = next(case for case in CASES if case.name == Path(path).name)
    return case.model_cls.from_pretrained(path, **options)


class Models:
    """Stands where PEFT's tests have an Auto class. They load a model some 1500 times, mostly what a copy gives."""

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> OneTensor:
        return copy.deepcopy(loaded(path, **options))


def made_up_network(case: Case, *args: Any, **kwargs: Any) -> OneTensor:
    """Ours in the place of a network that PEFT's tests make up, reading its own inputs in the place of theirs."""
    model = Models.from_pretrained(saved(case))
    own = inputs(case.model_cls)
    model.forward = lambda *args, **kwargs: type(model).forward(model, **own)
    return model
