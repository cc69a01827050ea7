"""Small tuned models of every kind that is pushed, and what they say of images; for the users' processes."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import CLIPModel, ViTForImageClassification, ViTModel

from peft_ncgeo import (
    CoPAConfig,
    FewShotClassifier,
    GeometryTrainer,
    NPTConfig,
    PrototypeConfig,
    ZeroShotClassifier,
    adapt,
)
from peft_ncgeo.hub import load_adapter, push_adapter
from peft_ncgeo.losses import LanguageCollapse, OTPreservation
from peft_ncgeo.models.image_encoder import encode_images

from ..conftest import NAMES, pixels, tiny_clip, tiny_images, tiny_processor, tiny_vit, tiny_vit_classifier
from ..training.runs import trainer

CLIP, VIT, BACKBONE = "user/tiny-clip", "user/tiny-vit", "user/tiny-backbone"
NEW = ["red bird", "blue tree", "green cat"]
THREE = NAMES[:3]  # the base's head has five
IMAGES = tiny_images(6, seed=5)["image"][:]
KINDS = ("trained", "prompts", "lora", "head", "prototypes", "copa")


def push_bases() -> None:
    """Push the base model of every adapter to the Hub."""
    for repo_id, model in ((CLIP, tiny_clip()), (VIT, tiny_vit_classifier()), (BACKBONE, tiny_vit())):
        model.push_to_hub(repo_id)
        (tiny_processor() if repo_id == CLIP else tiny_processor().image_processor).push_to_hub(repo_id)


def base(repo_id: str, **options: Any) -> Any:
    """A base model as it is on the Hub."""
    kinds: dict[str, Any] = {CLIP: CLIPModel, VIT: ViTForImageClassification, BACKBONE: ViTModel}
    return kinds[repo_id].from_pretrained(repo_id, **options)


def far(model: Any) -> Any:
    """The model with its adapter far from the start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def long_tail() -> Any:
    """5, 4, 3, 2 and 1 images of five classes."""
    images = tiny_images(25)
    return images.select([i for i in range(25) if i // 5 <= 4 - i % 5])


def prompt_trainer(folder: str = "out", **arguments: Any) -> GeometryTrainer:
    """Two steps of prompts under two losses, with base and new classes to evaluate on."""
    torch.manual_seed(3)
    prompts = {"num_text_tokens": 6, "text_init": [6, 7, 8, 6], "template": "the {}."}  # more prompts than words
    config = NPTConfig.ivlp(**prompts, text_depth=2, vision_depth=3)
    sets = {"base": tiny_images(15, seed=1), "new": tiny_images(9, NEW, seed=2)}
    losses = [OTPreservation(weight=2.0, solver="entropic"), LanguageCollapse(weight=0.25)]
    model = get_peft_model(base(CLIP), config)
    run = trainer(folder, model, losses, long_tail(), sets, max_steps=2, learning_rate=1.0, **arguments)
    run.train()
    return run


def head_trainer(folder: str = "out") -> GeometryTrainer:
    """Visual prompts and a head for three classes, where the base has one for five."""
    torch.manual_seed(3)
    model = base(VIT, num_labels=3, ignore_mismatched_sizes=True)
    model = get_peft_model(model, NPTConfig.vpt(vision_depth=2, modules_to_save=["classifier"]))
    sets = tiny_images(9, THREE, seed=1)
    run = trainer(folder, model, (), tiny_images(12, THREE), sets, tiny_processor().image_processor, max_steps=2)
    run.train()
    return run


def few_shot(model: Any = None, processor: Any = None) -> FewShotClassifier:
    """Heads and residual maps from six images of three classes."""
    if model is None:
        model = get_peft_model(base(BACKBONE), CoPAConfig(residual_adapters=True), adapter_name="birds")
    labels = [["wren", "owl", "heron"][i % 3] for i in range(6)]
    return adapt(model, tiny_images(6, THREE)["image"][:], labels, steps=3, lr=0.1, processor=processor)


def push(kind: str, repo_id: str, **options: Any) -> Any:
    """Push a model of a kind, and return it."""
    if kind == "trained":
        run = prompt_trainer(hub_model_id=repo_id)
        run.push_to_hub(license="mit", datasets="user/colours", language="en", **options)
        return run.model
    if kind == "head":
        run = head_trainer()
        push_adapter(run.model, repo_id, run.processing_class, record=run.record(), **options)
        return run.model
    if kind == "prompts":
        config = NPTConfig.maple(text_init=[6, 7], text_depth=3, vision_depth=2)
        model = far(get_peft_model(base(CLIP), config, adapter_name="second"))
    elif kind == "lora":
        model = far(get_peft_model(base(CLIP), LoraConfig(r=2, target_modules=["q_proj", "visual_projection"])))
    elif kind == "prototypes":
        config = PrototypeConfig(projection_dim=16, num_classes=3, num_vision_tokens=2, vision_depth=2)
        model = far(get_peft_model(base(VIT), config))
    else:
        model = few_shot()
    push_adapter(model, repo_id, **options)
    return model


def answers(model: Any) -> dict[str, list]:
    """Return the model's outputs for images and texts, exact to the bit."""
    if isinstance(model, FewShotClassifier):
        own = {"probabilities": model.predict_proba(IMAGES).tolist(), "classes": model.predict(IMAGES)}
        return {**own, **answers(model.model)}
    with torch.no_grad():
        if not hasattr(model, "get_image_features"):
            out = model.eval()(pixel_values=pixels(5))
            return {"logits": out.logits.tolist()} if "logits" in out else {"states": out.last_hidden_state.tolist()}
        classifier = ZeroShotClassifier(model, tiny_processor())
        return {
            "images": encode_images(model, pixels(5)).tolist(),
            "texts": classifier.text_features(NEW).tolist(),
            "probabilities": classifier.predict_proba(IMAGES, NEW).tolist(),
        }


def load(kind: str, repo_id: str, **options: Any) -> Any:
    """Load what `push` pushed, with this package's loaders."""
    return FewShotClassifier.from_pretrained(repo_id) if kind == "copa" else load_adapter(repo_id, **options)


def plain(kind: str, repo_id: str) -> PeftModel:
    """The adapter on its base model by PEFT alone."""
    three = {"num_labels": 3, "ignore_mismatched_sizes": True}
    name, options = {"head": (VIT, three), "prototypes": (VIT, {}), "copa": (BACKBONE, {})}.get(kind, (CLIP, {}))
    return PeftModel.from_pretrained(base(name, **options), repo_id).eval()


def aligned(model: Any) -> Any:
    """The model with its tensors moved: where Transformers leaves them, as in the file, sums round otherwise."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def scores(found: list[list[dict]], names: list[str]) -> list[list[float]]:
    """A pipeline's answers as a row of probabilities for each image, in the order of the names."""
    rows = [{answer["label"]: answer["score"] for answer in answers} for answers in found]
    assert all(row.keys() == set(names) for row in rows), rows
    return [[row[name] for name in names] for row in rows]
