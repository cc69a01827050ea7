"""Bases, trainings, and what is asked of models: shared by `write.py`, under an old version, and by the test.

Public names alone are used, and those that version 0.1.0 has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    ResNetModel,
    ViTForImageClassification,
    ViTModel,
)

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments, NPTConfig, PrototypeConfig, ZeroShotClassifier
from peft_ncgeo.data import class_prompts
from peft_ncgeo.losses import (
    ClusterCollapse,
    CrossEntropy,
    LanguageCollapse,
    OTPreservation,
    PrototypeSupCon,
    SpaceAlignment,
)
from peft_ncgeo.protocols import EpisodeResults
from peft_ncgeo.training import GradientProjection, PromptAveraging, Recipe, SlerpAlignment

NAMES = ["red cat", "blue dog", "green bird", "black fish", "white panda"]
NEW = ["red bird", "blue tree", "green cat"]
STEPS, SAVED_AT = 8, 4  # of the trainings whose checkpoints are kept

# base model -> its class, and the folder of `bases` that holds its weights
BASES: dict[str, tuple[Any, str]] = {
    "clip": (CLIPModel, "clip"),
    "clip text tower": (CLIPTextModelWithProjection, "clip"),
    "clip vision tower": (CLIPVisionModelWithProjection, "clip"),
    "vit": (ViTForImageClassification, "vit"),
    "vit backbone": (ViTModel, "vit"),
    "resnet": (ResNetModel, "resnet"),
}


def base(name: str, folder: Path) -> Any:
    """A base model as it is stored."""
    kind, place = BASES[name]
    options = {"add_pooling_layer": False} if kind is ViTModel else {}
    return kind.from_pretrained(str(folder / "bases" / place), **options).eval()


def given_prototypes() -> Tensor:
    """Prototypes (5, 3) that come as a tensor."""
    return torch.tensor([[3.0, 1.0, 0.0], [-1.0, 2.0, 1.0], [0.0, -2.0, 1.0], [1.0, 0.0, -3.0], [-2.0, -1.0, 1.0]])


LORA: Any = partial(LoraConfig, r=2, target_modules=["q_proj", "v_proj"])


def pictures(folder: Path, part: str) -> list[Image.Image]:
    """The stored images of a part: "train" or "new"."""
    return [Image.fromarray(array.numpy()) for array in load_file(folder / "inputs.safetensors")[f"{part}.images"]]


def labelled(folder: Path) -> Dataset:
    """The stored training images with their labels and class names."""
    images = pictures(folder, "train")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": images, "label": [i % len(NAMES) for i in range(len(images))]}, features)


@torch.no_grad()
def answers(model: nn.Module, texts: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return a model's outputs for the stored pixels, for token ids and, if it is a CLIP, for images and new names."""
    pixels = load_file(folder / "inputs.safetensors")["pixel_values"]
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(inner, CLIPModel):
        classifier = ZeroShotClassifier(model, AutoProcessor.from_pretrained(str(folder / "bases" / "clip")))
        return {
            "image features": inner.get_image_features(pixel_values=pixels).pooler_output,
            "text features": inner.get_text_features(**texts).pooler_output,
            "probabilities": classifier.predict_proba(pictures(folder, "new"), NEW),
        }
    if isinstance(inner, CLIPTextModelWithProjection):
        return {"text features": model(**texts).text_embeds}
    out = model(pixel_values=pixels)
    return {"image features": out.image_embeds} if "image_embeds" in out else {"logits": out.logits}


def token_ids(config: Any, folder: Path) -> dict[str, Tensor]:
    """The texts of the new names as a model with this config reads them."""
    tokenizer = AutoProcessor.from_pretrained(str(folder / "bases" / "clip")).tokenizer
    template = getattr(config, "template", "a photo of a {}.")
    return dict(class_prompts(NEW, template, getattr(config, "num_text_tokens", 0), tokenizer))


# a training with something to remember -> its base model and what its trainer takes
TRAININGS: dict[str, tuple[str, Callable[[], PeftConfig], Callable[[], dict[str, Any]]]] = {
    "budget_memory_clusters": (
        "clip",
        partial(NPTConfig.ivlp, text_depth=2, vision_depth=2),
        lambda: {
            "losses": [
                OTPreservation(budget=0.02, modality="image", name="ot_image"),
                OTPreservation(weight=2.0, solver="entropic", memory_size=6),
                ClusterCollapse(weight=0.5, num_clusters=2),
                LanguageCollapse(weight=0.25),
            ]
        },
    ),
    "class_means": (
        "clip",
        partial(LORA, init_lora_weights=True),
        lambda: {"losses": [SpaceAlignment(weight=0.5)], "callbacks": [GradientProjection()]},
    ),
    "averaging": (
        "clip",
        partial(NPTConfig.maple, text_depth=2, vision_depth=2),
        lambda: {"callbacks": [PromptAveraging(mean=2, std=1)]},
    ),
    "slerp": (
        "vit",
        partial(LORA, modules_to_save=["classifier"]),
        lambda: {"callbacks": [SlerpAlignment(alpha=2e-5)]},
    ),
    "prototypes": (
        "vit",
        lambda: PrototypeConfig(geometry=given_prototypes(), num_vision_tokens=2, vision_depth=2),
        lambda: {"losses": [PrototypeSupCon()], "classification_loss": None},
    ),
}


def trainer(name: str, folder: Path, output_dir: Path) -> GeometryTrainer:
    """The trainer of one of `TRAININGS`, on the stored images in the order in which they are stored."""
    kind, config, options = TRAININGS[name]
    given: dict[str, Any] = {"losses": [], "callbacks": [], "classification_loss": CrossEntropy(), **options()}
    place = str(folder / "bases" / BASES[kind][1])
    torch.manual_seed(3)
    return GeometryTrainer(
        model=get_peft_model(base(kind, folder), config()),
        args=GeometryTrainingArguments(
            output_dir=str(output_dir),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            optim="sgd",
            optim_args="momentum=0.9",
            lr_scheduler_type="cosine",
            train_sampling_strategy="sequential",  # torch's shuffling is not what is looked at
            logging_steps=1,
            save_strategy="steps",
            save_steps=SAVED_AT,
            disable_tqdm=True,
            report_to="none",
            seed=7,
        ),
        train_dataset=labelled(folder),
        processing_class=(AutoProcessor if kind == "clip" else AutoImageProcessor).from_pretrained(place),
        **given,
    )


def losses(run: GeometryTrainer) -> list[dict[str, float]]:
    """Every loss and multiplier of the steps behind the checkpoint."""
    steps = [entry for entry in run.state.log_history if "loss" in entry and entry["step"] > SAVED_AT]
    return [{k: v for k, v in entry.items() if k.startswith(("loss", "lambda"))} for entry in steps]


def described(part: Any) -> dict[str, Any] | None:
    """A config's, a loss's or a callback's class and settings; of PEFT's configs those that are not the default."""
    if part is None:
        return None
    ours = type(part).__module__.partition(".")[0] == "peft_ncgeo"
    of_every_config = {entry.name for entry in fields(PeftConfig)}
    settings = {}
    for name, parameter in inspect.signature(type(part)).parameters.items():
        value = setting(part, name)
        plain = value is None or isinstance(value, bool | int | float | str | list)
        if hasattr(part, name) and name not in of_every_config and plain and (ours or value != parameter.default):
            settings[name] = value
    return {"name": type(part).__name__, "settings": settings}


def setting(part: Any, name: str) -> Any:
    """A setting as it stands in JSON."""
    value = getattr(part, name, None)
    return sorted(value) if isinstance(value, set) else value


def parts(recipe: Recipe) -> dict[str, list[Any]]:
    """Everything that a recipe makes."""
    return {
        "config": [recipe.config() if recipe.config else None],
        "losses": recipe.losses(),
        "classification_loss": [recipe.classification_loss()],
        "callbacks": recipe.callbacks(),
    }


def compared(results: EpisodeResults) -> list[float]:
    """Mean accuracy of a method on each domain and its difference to the other, with their intervals."""
    both = results.methods
    found = [(results.mean(domain, both[0]), results.difference(domain, *both)) for domain in results.domains]
    return torch.tensor(found, dtype=torch.float64).flatten().tolist()
