"""Template and class names of an adapter, which belong to it wherever it is used."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model

from peft_ncgeo import NPTConfig, ZeroShotClassifier
from peft_ncgeo.hub import hypothesis_template, load_adapter, save_adapter
from peft_ncgeo.models.adapters import adapters_off
from peft_ncgeo.models.text_setting import TextSetting, active_text_setting, remember_text_setting

from ..conftest import NAMES, tiny_clip, tiny_processor
from ..training.runs import lora_vit, prompted_clip, trainer

TEMPLATE = "red {} in the tree."
FILE = "geometry.json"
LORA = partial(LoraConfig, r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
METHODS = {"LoRA": LORA, "layer norms": partial(LNTuningConfig, target_modules=["layer_norm1", "layer_norm2"])}
pytestmark = pytest.mark.filterwarnings("ignore:.*processor:UserWarning")


def trained(folder, config=LORA, template=TEMPLATE):
    run = trainer(folder, get_peft_model(tiny_clip(), config()), template=template, max_steps=1)
    run.train()
    return run


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_a_trained_adapter_brings_template_and_names(tmp_path, config):
    run = trained(tmp_path, config)
    run.save_model()
    classifier = ZeroShotClassifier(load_adapter(tmp_path, tiny_clip()), tiny_processor())
    assert (classifier.template, classifier.class_names) == (TEMPLATE, NAMES)
    assert hypothesis_template(tmp_path) == TEMPLATE
    images = run.train_dataset["image"][:4]
    given = ZeroShotClassifier(run.model.eval(), tiny_processor(), TEMPLATE)
    torch.testing.assert_close(classifier.predict_proba(images), given.predict_proba(images, NAMES))
    assert classifier.predict(images) == given.predict(images, NAMES)


def test_checkpoints_and_shared_folders_bring_them_too(tmp_path):
    run = trained(tmp_path / "run")
    run.args.save_strategy = "steps"
    save_adapter(run.model, tmp_path / "shared", tiny_processor())
    save_adapter(run.model, tmp_path / "recorded", tiny_processor(), record=run.record())
    for folder in ("shared", "recorded"):
        assert active_text_setting(load_adapter(tmp_path / folder, tiny_clip())) == TextSetting(TEMPLATE, tuple(NAMES))
    trainer(tmp_path / "saved", run.model, save_strategy="steps", save_steps=1, max_steps=1).train()
    again = load_adapter(tmp_path / "saved" / "checkpoint-1", tiny_clip())
    assert active_text_setting(again).template == TEMPLATE, "trained on with the template that it had"


def test_prompts_keep_the_template_of_their_config(tmp_path):
    run = trainer(tmp_path, prompted_clip(template="blue {} in the tree."), max_steps=1)
    run.train()
    run.save_model()
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**content, "template": TEMPLATE}))
    found = active_text_setting(load_adapter(tmp_path, tiny_clip()))
    assert found == TextSetting("blue {} in the tree.", tuple(NAMES))


def test_without_training_nothing_is_claimed(tmp_path):
    model = get_peft_model(tiny_clip(), LORA())
    save_adapter(model, tmp_path, tiny_processor())
    assert not (tmp_path / FILE).exists()
    classifier = ZeroShotClassifier(load_adapter(tmp_path, tiny_clip()), tiny_processor())
    assert classifier.class_names == []
    with pytest.raises(ValueError, match="pass class_names"):
        classifier.predict(trainer(tmp_path).train_dataset["image"][:1])


def test_an_adapter_that_replaces_another_does_not_keep_its_names(tmp_path):
    trained(tmp_path).save_model()
    save_adapter(get_peft_model(tiny_clip(), LORA()), tmp_path, tiny_processor())
    assert not (tmp_path / FILE).exists()


def two_adapters(*templates) -> PeftModel:
    model = get_peft_model(tiny_clip(), LORA())
    model.add_adapter("second", LORA())
    for name, template in zip(("default", "second"), templates, strict=True):
        remember_text_setting(model, TextSetting(template), [name])
    return model


def test_each_adapter_has_its_own():
    model = two_adapters(TEMPLATE, "blue {}")
    classifier = ZeroShotClassifier(model, tiny_processor())
    assert classifier.template == TEMPLATE
    model.set_adapter("second")
    assert classifier.template == "blue {}"
    with adapters_off(model):
        assert classifier.template == "a photo of a {}."


def test_a_combination_reads_the_template_that_its_parts_share():
    model = two_adapters(TEMPLATE, TEMPLATE)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean", combination_type="linear")
    model.set_adapter("mean")
    assert ZeroShotClassifier(model, tiny_processor()).template == TEMPLATE


def test_a_saved_combination_keeps_the_template_that_its_parts_share(tmp_path):
    model = two_adapters(TEMPLATE, TEMPLATE)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean", combination_type="linear")
    model.set_adapter("mean")
    save_adapter(model, tmp_path / "shared", tiny_processor())
    trainer(tmp_path / "run", model).save_model()
    for folder in (tmp_path / "shared", tmp_path / "run" / "mean"):
        assert ZeroShotClassifier(load_adapter(folder, tiny_clip()), tiny_processor()).template == TEMPLATE
        assert hypothesis_template(folder) == TEMPLATE


def test_a_combination_of_adapters_with_different_templates_is_saved_without_one(tmp_path):
    model = two_adapters(TEMPLATE, "blue {}")
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean", combination_type="linear")
    model.set_adapter("mean")
    save_adapter(model, tmp_path, tiny_processor())
    assert active_text_setting(load_adapter(tmp_path, tiny_clip())) == TextSetting()


def test_another_adapter_does_not_take_rows_over():
    """They were trained on the features of one adapter alone."""
    model = two_adapters(TEMPLATE, None)
    remember_text_setting(model, TextSetting(TEMPLATE, tuple(NAMES), torch.ones(5, 24)), ["default"])
    assert active_text_setting(model).rows is not None
    model.set_adapter("second")
    assert active_text_setting(model).rows is None


def test_a_combination_of_adapters_with_different_templates_asks_for_one():
    model = two_adapters(TEMPLATE, "blue {}")
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean", combination_type="linear")
    model.set_adapter("mean")
    with pytest.raises(ValueError, match="different templates"):
        _ = ZeroShotClassifier(model, tiny_processor()).template
    assert ZeroShotClassifier(model, tiny_processor(), "blue {}").template == "blue {}"


@pytest.mark.slow
def test_a_combination_of_adapters_with_different_texts_of_classes_asks_for_them():
    model = two_adapters(TEMPLATE, TEMPLATE)
    for name, text in (("default", "a cat"), ("second", "the cat")):
        remember_text_setting(model, TextSetting(TEMPLATE, class_texts={NAMES[0]: (text,)}), [name])
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean", combination_type="linear")
    assert active_text_setting(model).class_texts == {NAMES[0]: ("a cat",)}
    model.set_adapter("mean")
    with pytest.raises(ValueError, match="class_texts"):
        active_text_setting(model)
    assert ZeroShotClassifier(model, tiny_processor(), TEMPLATE, class_texts={}).class_texts == {}


@pytest.mark.parametrize(
    "content",
    [
        '{"template": 3}',
        '{"template": "no place"}',
        '{"class_names": "cat"}',
        '{"class_names": [""]}',
        '{"x": 1}',
        '{"class_texts": {"cat": [3]}}',
        "[",
        "[1]",
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    save_adapter(get_peft_model(tiny_clip(), LORA()), tmp_path, tiny_processor())
    (tmp_path / FILE).write_text(content)
    base = tiny_clip()
    with pytest.raises(ValueError, match=FILE) as refused:
        load_adapter(tmp_path, base)
    assert "\n" not in str(refused.value)
    assert not hasattr(base, "peft_config")
    with pytest.raises(ValueError, match=FILE):
        hypothesis_template(tmp_path)


def test_an_image_classifier_has_no_such_file(tmp_path):
    run = trainer(tmp_path, lora_vit(), processor=tiny_processor().image_processor, max_steps=1)
    run.train()
    run.save_model()
    assert not (tmp_path / FILE).exists()


def test_the_config_compares_as_before():
    one, other = LORA(), LORA()
    model = get_peft_model(tiny_clip(), one)
    remember_text_setting(model, TextSetting(TEMPLATE), ["default"])
    assert "ncgeo" not in json.dumps(one.to_dict(), default=str)
    assert NPTConfig(num_text_tokens=1) == NPTConfig(num_text_tokens=1)
    assert other.to_dict().keys() == one.to_dict().keys()
