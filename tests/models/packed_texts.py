"""Texts of classes, and the passes of packed and padded ones."""

from __future__ import annotations

import copy

import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model

from peft_ncgeo import NPTConfig
from peft_ncgeo.models.text_encoder import encode_texts

from ..conftest import BOS, EOT, PAD, tiny_clip

CONFIGS = {
    "coop": NPTConfig.coop(num_text_tokens=4),
    "ivlp": NPTConfig.ivlp(),
    "maple": NPTConfig.maple(),
    "deep_text": NPTConfig(num_text_tokens=3, text_depth=3),
    "later": NPTConfig(num_text_tokens=2, text_depth=2, first_layer=1),
    "coupled_later": NPTConfig(
        num_text_tokens=2, num_vision_tokens=2, text_depth=2, vision_depth=1, first_layer=1, coupling="coupled"
    ),
}


def class_texts(slots: int = 4, classes: int = 12, length: int = 14) -> dict[str, torch.Tensor]:
    """`[BOS] slots name [EOT] pad`, names of one to five tokens."""
    rows = torch.full((classes, length), PAD)
    for k in range(classes):
        row = [BOS, *range(5, 5 + slots), *[20 + (3 * k + i) % 25 for i in range(1 + k % 5)], EOT]
        rows[k, : len(row)] = torch.tensor(row)
    return {"input_ids": rows, "attention_mask": (rows != PAD).long()}


def prompted(config: NPTConfig, pack: bool, attention: str = "sdpa", dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.pack_text = pack
    model = get_peft_model(tiny_clip(attn_implementation=attention, **options).to(dtype), config)
    return model.to(dtype)


def passes(model, texts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features, and the gradients of a fixed function of them."""
    model.zero_grad()
    features = encode_texts(model, **texts)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return features.detach(), gradients


def adapted(kind: str, attention: str = "sdpa", dtype=torch.float64):
    """CLIP under no adapter, or one of PEFT's whose weights are not zero, or with prompts switched off."""
    torch.manual_seed(0)
    base = tiny_clip(attn_implementation=attention).to(dtype)
    if kind == "plain":
        return base
    if kind == "prompts off":
        model = get_peft_model(base, copy.deepcopy(CONFIGS["ivlp"])).to(dtype)
        model.base_model.disable_adapter_layers()
        model.get_base_model().text_projection.requires_grad_(True)
        return model
    model = get_peft_model(base, OTHERS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.to(dtype)


OTHERS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1", "text_projection"]),
    "lora of embeddings": LoraConfig(r=2, target_modules=["token_embedding", "position_embedding"]),
    "dora": LoraConfig(r=2, target_modules=["q_proj", "fc2"], use_dora=True),
    "layer norms": LNTuningConfig(target_modules=["layer_norm1", "final_layer_norm"]),
    "ia3": IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
    "whole layers": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["text_projection"]),
}
