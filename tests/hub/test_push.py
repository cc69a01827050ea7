"""Tests of a push beyond the adapter's own files."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from .user import UserError

pytestmark = pytest.mark.slow

CLIP = "user/tiny-clip"
PROMPTS = "tuned.get_peft_model(tuned.base(tuned.CLIP), peft_ncgeo.NPTConfig(num_text_tokens=2))"


def test_licence_is_the_base_models_unless_told(hub, author):
    card = b"---\nlicense: mit\n---\n# base\n"
    hub.add("user/licensed-clip", {**hub.files(CLIP), "README.md": card})
    author.run(f"push_adapter({PROMPTS}, 'user/licence', base_model_id='user/licensed-clip')")
    assert ModelCard(hub.files("user/licence")["README.md"].decode()).data.license == "mit"
    author.run(f"push_adapter({PROMPTS}, 'user/licence', base_model_id='user/licensed-clip', license='apache-2.0')")
    assert ModelCard(hub.files("user/licence")["README.md"].decode()).data.license == "apache-2.0"
    author.run(f"push_adapter({PROMPTS}, 'user/licence')")
    assert ModelCard(hub.files("user/licence")["README.md"].decode()).data.license is None


def test_files_of_an_adapter_that_was_there_before_go(hub, author):
    hub.add(
        "user/reused", {"class_names.json": b"[]", "geometry.png": b"", "prototypes.safetensors": b"", "my.txt": b""}
    )
    author.run(f"push_adapter({PROMPTS}, 'user/reused')")
    files = hub.files("user/reused").keys()
    assert not {"class_names.json", "geometry.png", "prototypes.safetensors"} & files
    assert {"my.txt", "adapter_model.safetensors"} <= files
    assert len(hub.commits("user/reused")) == 3  # made, added to, pushed


def test_a_name_alone_is_the_users_own(hub, author):
    author.run(f"push_adapter({PROMPTS}, 'bare-name')")
    assert 'from_pretrained("user/bare-name")' in hub.files("user/bare-name")["README.md"].decode()


def test_a_branch_is_made(hub, author):
    author.run(f"push_adapter({PROMPTS}, 'user/branched', revision='v2')")
    assert "adapter_model.safetensors" in hub.files("user/branched", "v2")
    assert "adapter_model.safetensors" not in hub.files("user/branched")


def test_a_head_that_nobody_holds_is_refused(hub, author):
    lora = "tuned.LoraConfig(r=2, target_modules=['q_proj'])"
    with pytest.raises(UserError, match="Neither.*adapter.*model's head.*modules_to"):
        author.run(
            "headless = tuned.ViTForImageClassification.from_pretrained(tuned.BACKBONE, num_labels=5)\n"
            f"push_adapter(tuned.get_peft_model(headless, {lora}), 'user/headless')"
        )
    author.run(f"push_adapter(tuned.get_peft_model(tuned.base(tuned.VIT), {lora}), 'user/with-head')")
    assert "adapter_model.safetensors" in hub.files("user/with-head")


def test_a_base_of_another_kind_is_refused(hub, author):
    with pytest.raises(UserError, match="'user/tiny-vit'"):
        author.run(f"push_adapter({PROMPTS}, 'user/mixed', base_model_id='user/tiny-vit')")


def test_a_processor_of_an_adapter_that_was_there_before_goes_too(hub, author):
    author.run(f"push_adapter({PROMPTS}, 'user/turned')")
    assert "processor_config.json" in hub.files("user/turned")
    vit = "tuned.get_peft_model(tuned.base(tuned.VIT), peft_ncgeo.NPTConfig.vpt(vision_depth=2))"
    author.run(f"push_adapter({vit}, 'user/turned')")
    assert not {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} & hub.files("user/turned").keys()
    assert "preprocessor_config.json" in hub.files("user/turned")
    author.run(f"import peft_ncgeo.hub as h\nh.save_adapter({vit}, 'same')\nh.save_adapter({PROMPTS}, 'same')")
    assert not (author.work / "same" / "class_names.json").exists()


def test_nothing_is_measured_for_a_push_that_cannot_be(hub, author):
    author.run("run = tuned.trainer('measured', eval_dataset=tuned.tiny_images(10), hub_model_id='user/measured')")
    author.run("run.predict = lambda *args, **kwargs: 1 / 0")
    for call, error in (
        ("run.push_to_hub(base_model_id='user/nope')", "The Hub has no model base_model_id='user/nope'"),
        ("run.push_to_hub(licence='mit', base_model_id=tuned.CLIP)", "A card has no option 'licence'"),
        ("run.push_to_hub(token='hf_wrong', base_model_id=tuned.CLIP)", "no valid token"),
    ):
        with pytest.raises(UserError, match=error):
            author.run(call)


def test_an_adapter_on_a_branch_loads_by_its_name(hub, author, reader):
    author.run(f"push_adapter({PROMPTS}, 'user/on-branch', revision='dev')")
    names = reader.run(
        "classifier = ZeroShotClassifier.from_pretrained('user/on-branch', revision='dev')\n"
        "result = classifier.predict(tuned.IMAGES, tuned.NEW)"
    )
    assert len(names) == 6


def test_a_wrong_token_is_named_when_the_trainer_is_made(hub, author):
    with pytest.raises(UserError, match="OSError.*The.*cannot.*no"):
        author.run("tuned.trainer('early', push_to_hub=True, hub_model_id='user/early', hub_token='hf_wrong')")
