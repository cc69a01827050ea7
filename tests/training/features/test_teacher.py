"""The frozen model is the pretrained one, or is refused: adapters whose start changes the base model."""

from __future__ import annotations

from collections import namedtuple

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig

from peft_ncgeo import PrototypeConfig
from peft_ncgeo.hub import create_card
from peft_ncgeo.losses import OTPreservation
from peft_ncgeo.models.adapters import adapters_off, change_of_base
from peft_ncgeo.models.image_encoder import encode_images

from ...conftest import pixels, tiny_clip, tiny_images
from ..runs import prompted_clip, trainer, vit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TARGETS = ["q_proj", "v_proj"]
Eigens = namedtuple("Eigens", ["U_WC", "S_WC", "V_WC"])


def prepare(model, start):
    """Write on layers what PEFT's own functions write for the starts that look at data."""
    for name, module in model.named_modules():
        if name.endswith(tuple(TARGETS)) and start == "lora_ga":
            module._peft_loraga_grad = torch.randn_like(module.weight)
        if name.endswith(tuple(TARGETS)) and start == "corda":
            u, s, v = torch.linalg.svd(module.weight.detach())
            module.eigens = Eigens(u[:, :2].contiguous(), s[:2].clone(), v[:2].T.contiguous())


def lora(start, **fields):
    if start == "lora_ga":
        fields["lora_ga_config"] = LoraGAConfig()
    return LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=start, **fields)


STARTS = [True, False, "gaussian", "eva", "orthogonal", "mica"]
CHANGING = ["pissa", "pissa_niter_2", "olora", "corda", "lora_ga"]
METHODS = {
    "dora": lambda: lora(True, use_dora=True),
    "lora_bias": lambda: lora(True, lora_bias=True),
    "head": lambda: lora(True, modules_to_save=["visual_projection"]),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(target_modules=TARGETS, init_weights="lycoris"),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "oft": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=8),
    "vera": lambda: peft.VeraConfig(target_modules=["vision_model.encoder.layers.0.self_attn.q_proj"]),
    "hra": lambda: peft.HRAConfig(target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(target_modules=TARGETS, r=8, init_weights="bat"),
    "osf": lambda: peft.OSFConfig(target_modules=TARGETS),
    "fourier": lambda: peft.FourierFTConfig(target_modules=TARGETS, n_frequency=8),
    "shira": lambda: peft.ShiraConfig(target_modules=TARGETS, r=2),
    "norms": lambda: peft.LNTuningConfig(target_modules=["layer_norm1"]),
    "bias": lambda: lora(True, bias="all"),
    "lora_only": lambda: lora(True, bias="lora_only"),
}
CASES = {str(start): lambda start=start: lora(start) for start in [*STARTS, *CHANGING]} | METHODS


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_another_without_its_adapter_is_known(case):
    """Its features with the adapter off, once trained parameters have moved, are the untouched model's or not."""
    with torch.no_grad():
        expected = encode_images(tiny_clip(), pixels())
        model = tiny_clip()
        prepare(model, case)
        model = get_peft_model(model, CASES[case]()).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        assert not torch.allclose(encode_images(model, pixels()), expected, atol=1e-3)
        with adapters_off(model):
            same = torch.allclose(encode_images(model, pixels()), expected, atol=1e-5)
    assert same == (case not in [*CHANGING, "bias", "lora_only"])
    assert bool(change_of_base(model)) != same


def test_prompts_and_prototypes_leave_the_base_model_alone():
    assert not change_of_base(prompted_clip())
    assert not change_of_base(vit(PrototypeConfig(projection_dim=16, num_classes=5)))


def test_a_start_that_is_not_known_is_not_trusted():
    model = get_peft_model(tiny_clip(), lora(True))
    model.peft_config["default"].init_lora_weights = "of_next_year"
    assert "of_next_year" in change_of_base(model)


def test_biases_of_an_adapter_that_is_no_longer_trained_count(tmp_path):
    get_peft_model(tiny_clip(), lora(True, bias="all")).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(tiny_clip(), tmp_path)
    assert "bias" in change_of_base(model)


def test_a_second_adapter_does_not_hide_the_first_ones_start():
    model = get_peft_model(tiny_clip(), lora("pissa"))
    model.add_adapter("other", lora(True))
    model.set_adapter("other")
    assert "pissa" in change_of_base(model)


def test_terms_on_the_frozen_model_refuse_it(tmp_path):
    with pytest.raises(ValueError, match="frozen model.*'olora'.*gaussian") as error:
        trainer(tmp_path, get_peft_model(tiny_clip(), lora("olora")), [OTPreservation(weight=1.0)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("start", [True, "pissa"])
def test_a_card_has_numbers_of_the_frozen_model_or_says_why_not(tmp_path, start):
    images = tiny_images(20)
    expected = trainer(tmp_path, tiny_clip(), eval_dataset=images).evaluate()["eval_accuracy"]
    run = trainer(tmp_path, get_peft_model(tiny_clip(), lora(start)), eval_dataset=images, max_steps=4)
    run.train()
    record = run.record()
    entry, card = record.sets["test"], create_card(record=record).text
    assert entry["after"]["accuracy"] == run.evaluate()["eval_accuracy"]
    if start is True:
        assert entry["before"]["accuracy"] == expected
    assert ("before" in entry, "zero-shot |" in card, "'pissa'" in card) == (
        (True, True, False) if start is True else (False, False, True)
    )
