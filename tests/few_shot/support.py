"""Support sets, backbones and comparisons that the tests of few-shot adaptation share."""

from __future__ import annotations

import math

import torch
from peft import PeftModel, get_peft_model
from torch.nn import functional as F

from peft_ncgeo import CoPAConfig

from ..conftest import pixels
from ..contracts.copa_backbones import BACKBONES
from ..losses.batches import unit_rows

URL = {"steps": 40, "lr": 0.1, "weight_decay": 0.0, "optimizer": torch.optim.Adadelta}
TEMPERATURE = math.exp(-2)
LABELS = [2, 0, 1, 1, 0, 2, 2, 2, 0]  # unsorted, 3, 2 and 4 shots


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def support(labels=LABELS, classes: int = 3, dim: int = 8, seed: int = 0, dtype=torch.float64):
    """Features around a centre a class, with a gap to the origin, and int64 labels."""
    labels = torch.as_tensor(labels)
    features = draw(len(labels), dim, seed=seed) + 1.5 * draw(classes, dim, seed=seed + 1)[labels] + 0.5
    return features.to(dtype), labels


def means(features: torch.Tensor, labels) -> torch.Tensor:
    labels = torch.as_tensor(labels)
    return torch.stack([features[labels == c].mean(0) for c in range(int(labels.max()) + 1)])


def full_contrast(instances, prototypes, labels, temperature) -> torch.Tensor:
    """CLIP's loss with the N x N matrix: every sample against the prototype of every sample."""
    own = unit_rows(prototypes)[labels]
    s = unit_rows(instances) @ own.T / temperature
    targets = torch.arange(len(labels))
    return (F.cross_entropy(s, targets) + F.cross_entropy(s.T, targets)) / 2


def cross_entropy(instances, prototypes, labels, temperature) -> torch.Tensor:
    return F.cross_entropy(unit_rows(instances) @ unit_rows(prototypes).T / temperature, labels)


def loop(features, labels, loss, optimizer, steps, shared=False, temperature=TEMPERATURE):
    """Heads trained by hand on features that stay."""
    prototypes = means(features, labels)
    image = torch.eye(features.shape[1], dtype=features.dtype, requires_grad=True)
    prototype = image if shared else image.detach().clone().requires_grad_()
    optimise = optimizer([image] if shared else [image, prototype])
    for _ in range(steps):
        optimise.zero_grad()
        loss(features @ image, prototypes @ prototype, labels, temperature).backward()
        optimise.step()
    return image.detach(), prototype.detach()


def snapshot(model) -> dict:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


def assert_as_before(model, before: dict, but: str = "\n") -> None:
    """Bit-equal state, modes and flags, and no gradient; `but`: a part of names whose values may differ."""
    now = snapshot(model)
    assert now["values"].keys() == before["values"].keys()
    for name, value in before["values"].items():
        assert but in name or torch.equal(now["values"][name], value), name
    for part in ("training", "requires_grad", "hooks"):
        assert now[part] == before[part], part
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []


def tsa(name: str = "vit", **fields) -> PeftModel:
    return get_peft_model(BACKBONES[name].build(), CoPAConfig(residual_adapters=True, **fields))


NINE = pixels(9, seed=4)
