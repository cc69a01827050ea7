"""CoPA's config, and models that it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertModel,
)

from peft_ncgeo import CoPAConfig

from ..cases import MODELS
from ..conftest import tiny, tiny_clip, tiny_vit
from ..errors import message
from .copa_backbones import adapted


def test_defaults():
    config = CoPAConfig()
    assert config.temperature == pytest.approx(math.exp(-2), rel=1e-12)
    assert CoPAConfig(shared=True).temperature == 0.1
    assert CoPAConfig(shared=True, temperature=0.5).temperature == 0.5
    assert (config.num_features, config.shared, config.residual_adapters) == (None, False, False)
    assert get_peft_model(tiny_vit(), config).peft_config["default"].num_features == 32


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0}, "temperature=0 must be 1e-6 to 1e6."),
        ({"temperature": 0.0}, "temperature=0.0 must be 1e-6 to 1e6."),
        ({"temperature": -0.5}, "temperature=-0.5 must be 1e-6 to 1e6."),
        ({"temperature": math.nan}, "temperature=nan must be 1e-6 to 1e6."),
        ({"temperature": math.inf}, "temperature=inf must be 1e-6 to 1e6."),
        ({"temperature": "warm"}, "temperature='warm' must be 1e-6 to 1e6."),
        ({"num_features": 0}, "num_features=0 must be a whole number of at least 1 and at most 1,000,000."),
        ({"num_features": -3}, "num_features=-3 must be a whole number of at least 1 and at most 1,000,000."),
        ({"num_features": True}, "num_features=True must be a whole number of at least 1 and at most 1,000,000."),
        ({"num_features": 32.0}, "num_features=32.0 must be a whole number of at least 1 and at most 1,000,000."),
        ({"num_features": "32"}, "num_features='32' must be a whole number of at least 1 and at most 1,000,000."),
    ],
    ids=str,
)
def test_values_out_of_range(fields, expected):
    assert message(lambda: CoPAConfig(**fields), (TypeError, ValueError)) == expected


@pytest.mark.parametrize(
    "fields", [{}, {"shared": True}, {"residual_adapters": True, "temperature": 0.7, "num_features": 32}], ids=str
)
def test_config_round_trip(fields, tmp_path):
    config = CoPAConfig(**fields)
    adapted(tiny_vit(), config).save_pretrained(tmp_path)
    loaded, ignored = CoPAConfig.from_pretrained(tmp_path), {"inference_mode", "auto_mapping"}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "NCGEO_COPA"
    assert written["num_features"] == 32
    for name, value in config.to_dict().items():
        if name not in ignored:
            assert getattr(loaded, name) == value, name
            assert written[name] == value, name
    again = CoPAConfig(**{k: v for k, v in config.to_dict().items() if k not in {*ignored, "peft_version"}})
    assert again.to_dict() == {**config.to_dict(), **{k: again.to_dict()[k] for k in (*ignored, "peft_version")}}


def tiny_bert():
    return tiny(
        BertModel,
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8),
    )


@pytest.mark.parametrize(
    ("build", "fields", "expected"),
    [
        (tiny_bert, {}, "The pooled feature of BertModel is not known; use one of these backbones: CLIP, SigLIP"),
        (
            MODELS["clip_text"],
            {"residual_adapters": True},
            "The pooled feature of CLIPTextModel is not known",
        ),
        (tiny_vit, {"num_features": 31}, "num_features=31, but the features of ViTModel have 32."),
        (tiny_clip, {"num_features": 40}, "num_features=40, but the features of CLIPModel have 24."),
    ],
    ids=["bert", "clip_text", "vit_width", "clip_width"],
)
def test_a_refused_model_stays_as_it_is(build, fields, expected):
    model, untouched = build(), build()
    assert message(lambda: get_peft_model(model, CoPAConfig(**fields))).startswith(expected)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not hasattr(model, "peft_config")
