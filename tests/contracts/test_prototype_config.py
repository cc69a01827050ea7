"""The config of prototypes: what is kept, what is out of range, what does not fit the model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import ResNetForImageClassification

from peft_ncgeo import PrototypeConfig
from peft_ncgeo.models.heads import classifier

from ..cases import PROMPTS, RESNET, prototypes, uneven
from ..conftest import pixels, tiny, tiny_clip, tiny_vit, tiny_vit_classifier
from ..errors import message
from .prototype_models import adapted, logits, points

FILE_KEY = "base_model.model.classifier.ncgeo_prototype_classifier.prototypes"


@pytest.mark.parametrize("config", [prototypes, uneven, lambda: PrototypeConfig(geometry=points(), trainable=True)])
def test_config_round_trip(config, tmp_path):
    config = config()
    model = adapted(config)
    model.save_pretrained(tmp_path)
    loaded = PrototypeConfig.from_pretrained(tmp_path)
    ignored = {"inference_mode", "auto_mapping"}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    for name, value in config.to_dict().items():
        if name not in ignored:
            assert getattr(loaded, name) == value, name
            assert written[name] == value, name
    assert written["peft_type"] == "NCGEO_PROTOTYPE"
    assert written["num_classes"] == 5
    stored = load_file(tmp_path / "adapter_model.safetensors")[FILE_KEY]
    assert torch.equal(stored, classifier(model).prototypes)
    assert stored.shape == (5, config.projection_dim)
    if written["geometry"] == "given":
        assert loaded.prototypes().isnan().all()  # they are in the file beside it
    else:
        torch.testing.assert_close(loaded.prototypes(), config.prototypes(), atol=0, rtol=0)
    again = PrototypeConfig(**{k: v for k, v in config.to_dict().items() if k not in {*ignored, "peft_version"}})
    assert again.to_dict() == {**config.to_dict(), **{k: again.to_dict()[k] for k in (*ignored, "peft_version")}}


def test_a_files_prototypes_count_and_not_the_configs(tmp_path):
    """A geometry recomputed when loading would change if the formula ever did."""
    model = adapted(prototypes())
    with torch.no_grad():
        classifier(model).prototypes.copy_(torch.nn.functional.normalize(points(5, 8), dim=1))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_vit_classifier(), tmp_path)), logits(model))


def test_number_of_classes_is_the_models_unless_given():
    assert get_peft_model(tiny_vit_classifier(), prototypes()).peft_config["default"].num_classes == 5
    with pytest.warns(UserWarning, match="num_classes=3, but the model names 5 labels.*num_labels=3"):
        model = get_peft_model(tiny_vit_classifier(), prototypes(num_classes=3))
    assert logits(model).shape == (3, 3)
    with pytest.warns(UserWarning, match="num_classes=7, but the model names 5 labels"):
        get_peft_model(tiny_vit_classifier(), PrototypeConfig(geometry=points(7)))


@pytest.mark.parametrize("build", [tiny_clip, tiny_vit])
def test_a_model_without_a_head_is_refused(build):
    text = message(lambda: get_peft_model(build(), prototypes()))
    assert text.startswith(f"{build().__class__.__name__} has no classification head")
    assert "ForImageClassification" in text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"geometry": "simplex"}, "geometry='simplex' must be one of ('etf', 'minority_margin') or a tensor"),
        ({"geometry": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}, "prototype 1 is 0 or not finite"),
        ({"geometry": torch.tensor([[float("nan"), 0.0], [0.0, 1.0]])}, "prototype 0 is 0 or not finite"),
        ({"geometry": torch.ones(3)}, "at least 2 classes, got (3,)"),
        ({"geometry": torch.ones(1, 3)}, "at least 2 classes, got (1, 3)"),
        ({"geometry": torch.eye(3), "num_classes": 4}, "num_classes=4, but geometry has shape (3, 3)"),
        ({"geometry": torch.eye(3), "projection_dim": 4}, "projection_dim=4, but geometry has shape (3, 3)"),
        ({"geometry": "minority_margin"}, "needs class_counts"),
        ({"temperature": 0.0}, "temperature=0.0 must be 1e-6"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 1e-6 to 1e6"),
        ({"temperature": float("nan")}, "temperature=nan must be 1e-6 to 1e6"),
        ({"num_classes": 1}, "num_classes=1 must be a whole number of at least 2"),
        ({"projection_dim": 0}, "projection_dim=0 must be a whole number of at least 1"),
        ({"prototypes_per_class": -1}, "prototypes_per_class=-1 must be a whole number of at least 0"),
        ({"prototypes_per_class": 1.5}, "prototypes_per_class=1.5 must be a whole number"),
        ({"num_vision_tokens": -1}, "num_vision_tokens=-1 must be"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_at_once(fields, expected):
    assert expected in message(lambda: PrototypeConfig(**fields), (TypeError, ValueError))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"projection_dim": 3}, "simplex ETF of 5 classes needs at least 4 dimensions, got 3"),
        ({"projection_dim": 3, "geometry": "minority_margin", "class_counts": [1] * 5}, "need at least 4 dimensions"),
        ({"geometry": "minority_margin", "class_counts": [3, 2]}, "class_counts has 2 numbers for 5 classes"),
        ({"geometry": "minority_margin", "class_counts": [3, 2, 1, 0, 1]}, "class_counts[3] is 0"),
        ({"geometry": "minority_margin", "class_counts": [1] * 5, "margin_strength": -1.0}, "strength=-1.0"),
        ({"num_text_tokens": 2}, "has no text tower to prompt"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_model_is_refused_and_leaves_it_whole(fields, expected):
    model = tiny_vit_classifier()
    names = [name for name, _ in model.named_modules()]
    config = PrototypeConfig(**{"num_vision_tokens": 2, **fields})
    assert expected in message(lambda: get_peft_model(model, config))
    assert [name for name, _ in model.named_modules()] == names


def test_prompts_need_a_transformer():
    model = tiny(ResNetForImageClassification, RESNET)
    text = message(lambda: get_peft_model(model, prototypes(**PROMPTS)), NotImplementedError)
    assert text.startswith("ResNetForImageClassification has no image tokens")


def test_an_adapter_for_other_classes_is_refused(tmp_path):
    adapted(prototypes()).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**written, "num_classes": 4}))
    with (
        pytest.warns(UserWarning, match="num_classes=4, but the model names 5"),
        pytest.raises(ValueError, match=r"prototypes is \(5, 8\), the model takes \(4, 8\)"),
    ):
        PeftModel.from_pretrained(tiny_vit_classifier(), tmp_path)


def test_a_config_of_given_prototypes_can_be_copied_and_asks_for_its_file():
    points = torch.randn(5, 8)
    config = PrototypeConfig(geometry=points)
    copy = dataclasses.replace(config, temperature=1.0)
    torch.testing.assert_close(copy.prototypes(), config.prototypes())
    assert config.to_dict()["geometry"] == "given"
    json.dumps(config.to_dict())
    without = get_peft_model(tiny_vit_classifier(), PrototypeConfig(geometry="given", projection_dim=8))
    with pytest.raises(ValueError, match="have not been loaded"):
        without(pixel_values=pixels())
    with pytest.raises(ValueError, match="modules_to_save names 'classifier'"):
        PrototypeConfig(modules_to_save=["classifier"])
    with pytest.raises(ValueError, match="class_counts"):
        PrototypeConfig(class_counts=[1.5, 2, 3])
