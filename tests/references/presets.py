"""Every preset, geometry and kind of head on tiny models, whose weights and prompts follow the closed formula.

All is float64. Towers have 12 layers, so that presets which differ in depth differ in features.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase, ViTConfig, ViTForImageClassification

from peft_ncgeo import CoPAConfig, NPTConfig, PrototypeConfig
from peft_ncgeo.data import class_prompts
from peft_ncgeo.geometry import prototype_cross_entropy, prototype_image_contrast
from peft_ncgeo.geometry.heads import Heads, class_prototypes
from peft_ncgeo.models.adapters import unwrap
from peft_ncgeo.models.image_encoder import encode_images
from peft_ncgeo.models.text_encoder import text_features
from peft_ncgeo.training import fit_heads
from peft_ncgeo.tuners.copa import CoPALayer

from ..conftest import BOS, EOT, PAD, VOCABULARY, tiny_processor
from .numbers import CLASSES, LABELS, summary, wave

TOWER = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 12, "num_attention_heads": 2}
IMAGES = {"image_size": 8, "patch_size": 4}
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOT, "pad_token_id": PAD}
TEXT_LENGTH = 24  # CoOp's 16 vectors, a name and the rest of the template
NAMES = ["red cat", "dog", "black panda"]
PRESETS = tuple(name for name, member in vars(NPTConfig).items() if isinstance(member, classmethod))


@torch.no_grad()
def _filled(model: nn.Module) -> nn.Module:
    """Weights by the formula; those of norms around their 1, biases around their 0, the temperature as it was."""
    for phase, weight in enumerate(model.double().parameters()):
        if weight.dim() == 1:
            weight.copy_(weight.mean().round() + 0.2 * wave(*weight.shape, phase=phase))
        elif weight.dim():
            weight.copy_(1.5 * weight.shape[-1] ** -0.5 * wave(*weight.shape, phase=phase))
    return model.eval()


def _clip() -> nn.Module:
    text = {**TOWER, **TOKENS, "max_position_embeddings": TEXT_LENGTH}
    return _filled(CLIPModel(CLIPConfig(text_config=text, vision_config={**TOWER, **IMAGES}, projection_dim=6)))


def _vit() -> nn.Module:
    return _filled(ViTForImageClassification(ViTConfig(**TOWER, **IMAGES, num_labels=CLASSES)))


@torch.no_grad()
def _adapted(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Return the adapted model with fixed weights: start plus formula; the formula alone for random linear maps."""
    adapted = get_peft_model(model, config).double().eval()
    learned = (named for named in adapted.named_parameters() if named[1].requires_grad)
    for phase, (name, weight) in enumerate(learned, start=100):
        if any(part in name for part in ("_coupling.", "_hidden.", "_output.")):
            weight.copy_(1.5 * weight.shape[-1] ** -0.5 * wave(*weight.shape, phase=phase))
        else:
            weight.add_(0.3 * wave(*weight.shape, phase=phase))
    return adapted


def _images(number: int = 2) -> Tensor:
    return wave(number, 3, IMAGES["image_size"], IMAGES["image_size"], phase=50.0)


def _gradient(model: nn.Module, outputs: list[Tensor]) -> Tensor:
    """That of a fixed combination of the outputs, with respect to all that is learned."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    value = torch.stack([(output * wave(*output.shape, phase=0.7)).sum() for output in outputs]).sum()
    found = torch.autograd.grad(value, learned, allow_unused=True)  # a ViT's head is not moved by image features
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def _presets(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Tensor | float]]:
    for name in PRESETS:
        # nothing random: what starts from no phrase starts from 0
        config = getattr(NPTConfig, name)(init_std=0.0, tokenizer_name_or_path=tokenizer.name_or_path)
        texts = class_prompts(NAMES, config.template, config.num_text_tokens, tokenizer, TEXT_LENGTH)
        model = _adapted(_clip(), config)
        features = {"image features": encode_images(model, _images()), "text features": text_features(model, **texts)}
        yield from ((f"NPTConfig.{name}/{what}", value) for what, value in features.items())
        yield f"NPTConfig.{name}/gradient", _gradient(model, list(features.values()))
        yield f"NPTConfig.{name}/learned numbers", float(model.get_nb_trainable_parameters()[0])


def _prototypes() -> Iterator[tuple[str, Tensor | float]]:
    variants: dict[str, dict[str, Any]] = {
        "etf": {},
        "etf, trainable": {"trainable": True},
        "etf, prompts": {"num_vision_tokens": 2, "vision_depth": 3, "init_std": 0.0},
        "minority_margin": {"geometry": "minority_margin", "class_counts": [40, 20, 10, 5, 2]},
        "given": {"geometry": wave(CLASSES, 7, phase=60.0), "temperature": 0.5},
    }
    for name, fields in variants.items():
        model = _adapted(_vit(), PrototypeConfig(**({"projection_dim": 7} | fields)))
        logits = model(pixel_values=_images()).logits
        yield f"PrototypeConfig({name})/logits", logits
        yield f"PrototypeConfig({name})/gradient", _gradient(model, [logits])


def _copa() -> Iterator[tuple[str, Tensor | float]]:
    labels = torch.tensor(LABELS)
    for base, make in {"CLIP": _clip, "ViT": _vit}.items():
        for name, fields in {
            "default": {},
            "shared": {"shared": True},
            "residual": {"residual_adapters": True},
        }.items():
            model = _adapted(make(), CoPAConfig(**fields))
            inner = unwrap(model)
            if base == "CLIP":
                features = encode_images(model, _images())
            else:
                features = inner.vit(pixel_values=_images()).last_hidden_state[:, 0]
            yield f"CoPAConfig({base}, {name})/image features", features
            yield f"CoPAConfig({base}, {name})/gradient", _gradient(model, [features])
            (layer,) = (module for module in model.modules() if isinstance(module, CoPALayer))
            samples = wave(len(labels), layer.width, phase=70.0)
            sides = Heads(*layer.heads).embed(samples, class_prototypes(samples, labels, CLASSES))
            loss = prototype_cross_entropy if fields.get("shared") else prototype_image_contrast
            temperature = model.peft_config["default"].temperature
            yield f"CoPAConfig({base}, {name})/loss", loss(*sides, labels, temperature)
    samples = wave(len(labels), 6, phase=80.0)
    kept = labels != 4  # one sample is too few
    for name, shared in (("CoPA", False), ("URL", True)):
        heads = fit_heads(samples[kept], labels[kept].clamp_max(2), shared=shared)
        yield f"fit_heads({name})/image head", heads.image
        yield f"fit_heads({name})/prototype head", heads.prototype


def presets() -> dict[str, list[float]]:
    """Everything of this file by its name, `presets/<config>(<variant>)/<what>`."""
    found = {}
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", UserWarning)
        tokenizer = tiny_processor().tokenizer
        tokenizer.save_pretrained(folder)
        tokenizer.name_or_path = folder
        for part in (_presets(tokenizer), _prototypes(), _copa()):
            found |= {f"presets/{name}": summary(value) for name, value in part}
    return found
