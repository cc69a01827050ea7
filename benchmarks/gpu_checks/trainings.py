"""Short trainings on the built-in images, which the checks repeat in several ways."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments, ImageClassifier, NPTConfig
from peft_ncgeo.data import load_demo
from peft_ncgeo.losses import OTPreservation


def prompts() -> dict[str, Any]:
    config = NPTConfig.ivlp(text_depth=3, vision_depth=4)
    return {"model": get_peft_model(load_demo(shots=1).model, config), "losses": [OTPreservation(budget=0.05)]}


def lora() -> dict[str, Any]:
    return {"model": get_peft_model(load_demo(shots=1).model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))}


def image_classifier() -> dict[str, Any]:
    demo = load_demo(shots=1)
    names = demo.splits["train"].features["label"].names
    base = ImageClassifier.from_backbone(demo.model, names, head="cosine", init="texts", processor=demo.processor)
    exclude, heads = ["projection", "classifier"], ["classifier"]
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=exclude, modules_to_save=heads)
    return {"model": get_peft_model(base, config)}


TRAININGS = {"prompts and transport under a budget": prompts, "LoRA": lora, "image classifier": image_classifier}


def train(device: torch.device, parts: dict[str, Any], scale: float | None = None, **arguments: Any) -> Any:
    """Train on the demo's 30 base images, all of them in each step; return the trainer and the change of weights."""
    demo = load_demo(shots=1)
    given = {"train_dataset": demo.splits["train"], "processing_class": demo.processor, **parts}
    defaults = {
        "per_device_train_batch_size": 30,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
    }
    defaults |= {"max_steps": 1, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    defaults |= {"use_cpu": device.type == "cpu", "dataloader_pin_memory": device.type != "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = GeometryTrainer(args=GeometryTrainingArguments(folder, **defaults | arguments), **given)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if scale is not None and trainer.accelerator.scaler is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler(device.type, init_scale=scale)
        before = trained_weights(trainer.model)
        trainer.train()
    return trainer, trained_weights(trainer.model) - before


def trained_weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().cpu().double() for p in model.parameters() if p.requires_grad])


def distance(change: Tensor, expected: Tensor) -> float:
    return float((change - expected).norm() / expected.norm())


def seeded(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    torch.manual_seed(0)
    return make()
