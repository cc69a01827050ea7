from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_ncgeo import FewShotClassifier, NPTConfig, TrainedClassifier, ZeroShotClassifier
from peft_ncgeo.cli.run.classifiers import load_classifier
from peft_ncgeo.hub import load_adapter

from ..conftest import tiny_clip, tiny_vit, tiny_vit_classifier


@pytest.fixture
def adapter(tmp_path):
    model = get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=3, num_vision_tokens=2, vision_depth=2))
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_of_checkpoints_alone_names_the_newest(tmp_path):
    loads = [load_classifier, load_adapter]
    loads += [kind.from_pretrained for kind in (TrainedClassifier, ZeroShotClassifier, FewShotClassifier)]
    for step in (0, 9, 10):  # of 0, there is nothing to name
        if step:
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
        for load in loads:
            with pytest.raises(ValueError, match=r"has no adapter_config.json.*trainer\.save_model\(\)") as caught:
                load(str(tmp_path))
            message = str(caught.value)
            assert re.findall(r"checkpoint-\d+", message) == [f"checkpoint-{step}"] * bool(step)
            assert "\n" not in message


def test_truncated_file_is_named(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="is damaged or truncated"):
        load_adapter(adapter, tiny_clip())


def test_missing_key_is_named(adapter):
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    save_file(dict(list(whole.items())[1:]), file)
    with pytest.raises(ValueError, match="missing .*ncgeo_npt_prompt"):
        load_adapter(adapter, tiny_clip())


def test_other_architecture_is_named(adapter):
    with pytest.raises(ValueError, match="ViTModel has no text tower"):
        load_adapter(adapter, tiny_vit())


def test_unknown_base_is_named(adapter):
    with pytest.raises(ValueError, match="names no base model; pass base_model"):
        load_adapter(adapter)


@torch.no_grad()
def test_base_class_is_the_one_it_was_made_for(tmp_path):
    tiny_vit_classifier().save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_vit_classifier(), NPTConfig.vpt(vision_depth=2, modules_to_save=["classifier"]))
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(pixel_values=images).logits, model.eval()(pixel_values=images).logits)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_every_weight_counts_not_prompts_alone(tmp_path, change):
    config = NPTConfig.vpt(vision_depth=2, modules_to_save=["classifier"])
    get_peft_model(tiny_vit_classifier(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    if change == "missing":
        save_file({k: v for k, v in whole.items() if k != "base_model.model.classifier.bias"}, file)
    else:
        save_file({**whole, "base_model.model.foo.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=f"does not fit the model: {change} .*(classifier.bias|foo.weight)"):
        load_adapter(tmp_path, tiny_vit_classifier())


def test_lora_weights_count_too(tmp_path):
    get_peft_model(tiny_clip(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)
    with (
        pytest.warns(UserWarning, match="missing"),
        pytest.raises(ValueError, match="does not fit the model: missing .*lora_A"),
    ):
        load_adapter(tmp_path, tiny_clip())
