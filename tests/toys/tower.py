"""A tower of a made-up family: a ViT with [CLS], a norm before each part of a block, and one at the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, hidden_size=32, num_hidden_layers=2, image_size=16, patch_size=8, **others) -> None:
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.image_size, self.patch_size = image_size, patch_size
        super().__init__(**others)


class ToyEmbeddings(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embeddings = nn.Conv2d(3, width, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (config.image_size // patch) ** 2, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embeddings(pixel_values).flatten(2).mT
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.positions


class ToyAttention(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.qkv, self.out = (nn.Linear(config.hidden_size, n * config.hidden_size) for n in (3, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(*self.qkv(tokens).chunk(3, dim=-1)))


class ToyLayer(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = ToyAttention(config)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    main_input_name = "pixel_values"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embeddings = ToyEmbeddings(config)
        self.layers = nn.ModuleList(ToyLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: Tensor, **others: object) -> BaseModelOutputWithPooling:
        tokens = self.embeddings(pixel_values)
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.norm(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens[:, 0])
