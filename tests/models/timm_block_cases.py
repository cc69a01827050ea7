"""Adapters beside the MLPs of timm's blocks. `test_timm.py` runs this file where timm can be imported."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_ncgeo import AdaptFormerConfig

from ..tuners.test_adaptformer import add_beside_blocks, layers_of
from .timm_cases import VIT, classifier, move, pixels

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"init_values": 0.5}], ids=["plain", "layer scale"])
def test_the_residual_gets_the_term_outside_of_the_block(fields):
    base, inner = (classifier("vit_tiny_patch16_224", **VIT, **fields) for _ in range(2))
    model = move(get_peft_model(inner, AdaptFormerConfig(bottleneck_dim=3)))
    plain, tuned = base(pixels()).logits, model(pixels()).logits
    add_beside_blocks(base, [f"timm_model.blocks.{i}" for i in range(3)], "norm2", layers_of(model))
    torch.testing.assert_close(tuned, base(pixels()).logits)
    assert not torch.allclose(tuned, plain, atol=1e-3)


@pytest.mark.parametrize(
    "architecture", ["resnet10t", "vit_relpos_small_patch16_224", "vit_srelpos_small_patch16_224"]
)
def test_other_models_of_timm_are_refused(architecture):
    with pytest.raises(ValueError, match=r"blocks of Timm.* not known.*timm's"):
        get_peft_model(classifier(architecture), AdaptFormerConfig(bottleneck_dim=3))
