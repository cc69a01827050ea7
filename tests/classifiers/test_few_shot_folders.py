"""A few-shot classifier's folder gives it back to the last bit; damaged ones are refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from peft_ncgeo import CoPAConfig
from peft_ncgeo.classifiers.few_shot import FewShotClassifier
from peft_ncgeo.few_shot.adapt import adapt
from peft_ncgeo.loading.load import PROTOTYPES
from peft_ncgeo.tuners.copa import CoPALayer

from ..conftest import VIT, pixels, tiny, tiny_images, tiny_processor, tiny_vit
from ..contracts.copa_backbones import BACKBONES
from ..errors import message
from .few_shot_classifiers import CONFIGS, LABELS, SETTINGS, assert_same, few_shot, images

WORDS = ["stork", "owl", "heron", "heron", "owl", "stork", "stork", "stork", "owl"]
ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize("labels", [LABELS, WORDS, [17 - 14 * c for c in LABELS]], ids=["ints", "words", "sparse"])
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_round_trip(name, fields, labels, tmp_path):
    """To the last bit, from a folder that holds PEFT's files and one more."""
    classifier = few_shot(name, labels, **fields)
    classifier.save_pretrained(tmp_path / "new" / "folder")
    path = tmp_path / "new" / "folder"
    assert sorted(file.name for file in path.iterdir()) == ["README.md", CONFIG, ADAPTER, PROTOTYPES]
    loaded = FewShotClassifier.from_pretrained(path, BACKBONES[name].build())
    assert_same(loaded, classifier)
    assert loaded.temperature == json.loads((path / CONFIG).read_text())["temperature"]
    assert not any(module.training for module in loaded.model.modules())
    assert not torch.equal(loaded.heads.image, torch.eye(len(loaded.heads.image)))
    assert torch.equal(loaded.heads.image, loaded.heads.prototype) == bool(fields.get("shared"))
    layer = next(module for module in loaded.model.modules() if isinstance(module, CoPALayer))
    with torch.no_grad():
        layer.heads[0].zero_()  # the classifier's are its own
    assert torch.equal(loaded.predict_proba(images()), classifier.predict_proba(images()))
    loaded.save_pretrained(tmp_path / "again")  # and what was loaded can be saved
    assert_same(FewShotClassifier.from_pretrained(str(tmp_path / "again"), BACKBONES[name].build()), classifier)


def test_a_loaded_classifier_keeps_its_prototypes_when_its_files_are_written_over(folder):
    loaded = FewShotClassifier.from_pretrained(folder, tiny_vit())
    expected = loaded.predict_proba(images())
    with (folder / PROTOTYPES).open("r+b") as file:
        size = 4 * loaded.prototypes.numel()
        file.seek(-size, 2)
        file.write(bytes(size))
    assert torch.equal(loaded.predict_proba(images()), expected)
    for _ in range(2):
        loaded.save_pretrained(folder)
    assert torch.equal(FewShotClassifier.from_pretrained(folder, tiny_vit()).predict_proba(images()), expected)


def test_what_the_files_hold(saved):
    classifier, folder = saved
    with safe_open(folder / PROTOTYPES, "pt") as file:
        assert list(file.keys()) == ["prototypes"]
        assert torch.equal(file.get_tensor("prototypes"), classifier.prototypes)
        assert json.loads(file.metadata()["classes"]) == [0, 1, 2]
    tensors = load_file(folder / ADAPTER)
    assert len(tensors) == 2 + 6
    assert torch.equal(tensors["base_model.model.layernorm.ncgeo_copa_image_head"], classifier.heads.image)
    assert torch.equal(tensors["base_model.model.layernorm.ncgeo_copa_prototype_head"], classifier.heads.prototype)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_peft_reads_the_same_folder(name, tmp_path):
    """The model's own output is then x Theta_I, with the trained maps in the backbone."""
    backbone, classifier = BACKBONES[name], few_shot(name, residual_adapters=True)
    classifier.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(backbone.build(), tmp_path)
    out = backbone.feature(model, images())
    expected = classifier.features(images()) @ classifier.heads.image
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, backbone.feature(classifier.model.eval(), images()), atol=1e-6, rtol=1e-5)
    native = backbone.build()
    native.load_adapter(tmp_path)
    assert torch.equal(backbone.feature(native, images()), out)


def test_the_base_model_and_processor_are_found(tmp_path):
    """From the path in the adapter's config, and the processor that lies there."""
    processor = tiny_processor().image_processor
    tiny_vit().save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = get_peft_model(ViTModel.from_pretrained(tmp_path / "base"), CoPAConfig())
    pictures = list(tiny_images(9)["image"])
    classifier = adapt(model, pictures, WORDS, **SETTINGS)
    classifier.save_pretrained(tmp_path / "birds")
    for base in (None, str(tmp_path / "base")):
        loaded = FewShotClassifier.from_pretrained(tmp_path / "birds", base)
        assert torch.equal(loaded.predict_proba(pictures), classifier.predict_proba(pictures))
    given = FewShotClassifier.from_pretrained(tmp_path / "birds", tiny_vit(), processor=processor)
    assert torch.equal(given.predict_proba(pictures), classifier.predict_proba(pictures))


@pytest.mark.parametrize("residual", [False, True])
def test_the_classifier_that_is_saved_is_the_one_adapted_first(residual, tmp_path):
    """Although the model's adapter holds another by then, which saving does not disturb."""
    first = few_shot(labels=WORDS, residual_adapters=residual)
    expected = first.predict_proba(images())
    second = adapt(first.model, pixels(8, seed=6), [1, 2] * 4, **SETTINGS)
    other = second.predict_proba(images())
    state = {name: value.clone() for name, value in first.model.state_dict().items()}
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for folder, wanted, classes in (("first", expected, ["heron", "owl", "stork"]), ("second", other, [1, 2])):
        loaded = FewShotClassifier.from_pretrained(tmp_path / folder, tiny_vit())
        assert loaded.classes == classes
        assert torch.equal(loaded.predict_proba(images()), wanted)


def test_backbones_of_other_dtypes(tmp_path):
    """Heads are saved in float32, and features come in float32 or float64."""
    for dtype, atol in ((torch.float64, 1e-5), (torch.bfloat16, 0)):
        model = get_peft_model(tiny_vit().to(dtype), CoPAConfig())
        classifier = adapt(model, pixels(9, seed=4), WORDS, **SETTINGS)
        classifier.save_pretrained(tmp_path)
        loaded = FewShotClassifier.from_pretrained(tmp_path, tiny_vit().to(dtype))
        found, expected = (c.predict_proba(images()) for c in (loaded, classifier))
        torch.testing.assert_close(found, expected, atol=atol, rtol=0)
        single = FewShotClassifier.from_pretrained(tmp_path, tiny_vit())
        torch.testing.assert_close(single.predict_proba(images()), expected, atol=max(atol, 0.05), rtol=0)


def test_an_adapter_of_another_name(tmp_path):
    """PEFT writes it into a folder of its name."""
    model = get_peft_model(tiny_vit(), CoPAConfig(), adapter_name="birds")
    classifier = adapt(model, pixels(9, seed=4), WORDS, **SETTINGS)
    classifier.save_pretrained(tmp_path)
    assert_same(FewShotClassifier.from_pretrained(tmp_path / "birds", tiny_vit()), classifier)


def test_one_of_two_adapters(tmp_path):
    model = get_peft_model(tiny_vit(), CoPAConfig())
    model.add_adapter("birds", CoPAConfig())
    model.set_adapter("birds")
    classifier = adapt(model, pixels(9, seed=4), WORDS, **SETTINGS)
    classifier.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["birds"]
    assert_same(FewShotClassifier.from_pretrained(tmp_path / "birds", tiny_vit()), classifier)


def lora_vit() -> PeftModel:
    torch.manual_seed(2)
    return get_peft_model(tiny_vit(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))


@pytest.mark.parametrize("build", [tiny_vit, lora_vit], ids=["bare", "lora"])
def test_without_an_adapter_of_its_own_it_cannot_be_saved(build, tmp_path):
    classifier = adapt(build(), pixels(9, seed=4), LABELS, **SETTINGS)
    text = message(lambda: classifier.save_pretrained(tmp_path / "birds"))
    assert text.startswith("Only a PeftModel's heads can be saved: adapt get_peft_model(backbone, CoPAConfig())")
    assert not (tmp_path / "birds").exists()


def test_classes_that_json_would_change(tmp_path, saved):
    classifier = saved[0]
    other = FewShotClassifier(
        classifier.model, classifier.heads, classifier.prototypes, [1, 2, (3,)], weights=classifier._weights
    )
    assert message(lambda: other.save_pretrained(tmp_path / "birds")).startswith("Classes must be numbers or words")
    assert not (tmp_path / "birds").exists()


def refused(folder, base=None, error=ValueError) -> str:
    return message(lambda: FewShotClassifier.from_pretrained(folder, base or tiny_vit()), error)


def test_an_adapter_of_another_type(tmp_path):
    lora_vit().save_pretrained(tmp_path)
    assert refused(tmp_path) == f"{tmp_path} holds a LORA adapter, not one of type NCGEO_COPA."


def test_missing_prototypes(folder):
    (folder / PROTOTYPES).unlink()
    assert refused(folder) == f"{folder} has no {PROTOTYPES}; FewShotClassifier.save_pretrained writes one."


def truncate(file):
    file.write_bytes(file.read_bytes()[:-40])


def empty(file):
    file.write_bytes(b"")


def no_classes(file):
    save_file(load_file(file), file)


def other_metadata(file):
    save_file(load_file(file), file, {"names": "[]"})


def broken_classes(file):
    save_file(load_file(file), file, {"classes": "[0, 1,"})


def other_tensor(file):
    save_file({"means": torch.zeros(3, 32)}, file, {"classes": "[0, 1, 2]"})


@pytest.mark.parametrize(
    "damage", [truncate, empty, no_classes, other_metadata, broken_classes, other_tensor], ids=lambda f: f.__name__
)
def test_damaged_prototypes(folder, damage):
    damage(folder / PROTOTYPES)
    assert refused(folder).startswith(f"{PROTOTYPES} in {folder} is damaged: ")


@pytest.mark.parametrize("shape", [(3, 31), (3,), (3, 32, 1)], ids=str)
def test_prototypes_of_another_shape(folder, shape):
    save_file({"prototypes": torch.zeros(shape)}, folder / PROTOTYPES, {"classes": "[0, 1, 2]"})
    assert f"{PROTOTYPES} in {folder} has shape {shape}, but the model's features have width 32" in refused(folder)


def test_prototypes_of_other_classes(folder):
    save_file({"prototypes": torch.zeros(3, 32)}, folder / PROTOTYPES, {"classes": "[0, 1]"})
    assert "There are 3 prototypes for 2 classes" in refused(folder)


def test_a_damaged_adapter(folder):
    truncate(folder / ADAPTER)
    assert refused(folder).startswith(f"The adapter file in {folder} is damaged or truncated")


def test_a_model_of_another_width_or_depth(folder):
    wide = tiny(ViTModel, ViTConfig(**{**VIT, "hidden_size": 48}))
    assert "does not fit the model: num_features=32, but the features of ViTModel have 48." in refused(folder, wide)
    assert "does not fit" in refused(folder, tiny(ViTModel, ViTConfig(**{**VIT, "num_hidden_layers": 2})))
    assert "num_features=32, but the features of ResNetModel have 16." in refused(folder, BACKBONES["resnet"].build())


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        FewShotClassifier.from_pretrained(tmp_path, tiny_vit())
