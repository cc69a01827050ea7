"""Tiny random models for tests; nothing here needs a network."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import peft_ncgeo  # noqa: F401  registers the PEFT types

IMAGE_SIZE, VOCABULARY, BOS, EOT, PAD = 16, 50, 1, 3, 0


def tiny_clip(**overrides) -> CLIPModel:
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=24,
        bos_token_id=BOS,
        eos_token_id=overrides.pop("eos_token_id", EOT),
        pad_token_id=PAD,
    )
    vision = CLIPVisionConfig(
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=24,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24)
    return CLIPModel._from_config(config, **overrides).eval()


def _tiny_vit(cls, **overrides):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
        num_labels=5,
    )
    return cls._from_config(config, **overrides).eval()


def tiny_vit(**overrides) -> ViTModel:
    return _tiny_vit(ViTModel, **overrides)


def tiny_vit_classifier(**overrides) -> ViTForImageClassification:
    return _tiny_vit(ViTForImageClassification, **overrides)


def pixels(batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def texts(slots: int = 4, classes: int = 3) -> dict[str, torch.Tensor]:
    """Token ids `[BOS] slots.. name.. [EOT] pad`, the names one to three tokens long."""
    rows = []
    for k in range(classes):
        name = [20 + k + i for i in range(1 + k % 3)]
        row = [BOS, *range(5, 5 + slots), *name, EOT]
        rows.append(row + [PAD] * (slots + 6 - len(row)))
    input_ids = torch.tensor(rows)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


@pytest.fixture
def clip() -> CLIPModel:
    return tiny_clip()
