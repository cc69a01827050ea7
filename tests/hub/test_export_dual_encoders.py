"""Exports of dual encoders other than CLIP give the tuned model's probabilities, read once the package is imported."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification, pipeline

from peft_ncgeo import ImageClassifier, NPTConfig, ZeroShotClassifier
from peft_ncgeo.hub import export_classifier

from ..models.survey.dual_encoders import dual_encoders
from ..models.survey.inputs import NAMES, dataset, processor_for
from ..models.survey.specs import Spec
from ..states import changes, state

SPECS = {spec.cls: spec for spec in dual_encoders()}
IMAGES = dataset(6)["image"][:]
LORA = LoraConfig(target_modules=r".*(q_proj|query|fc1|text_projection|visual_projection)", init_lora_weights=False)
# name -> the tuned model, and whether its probabilities must differ from the base model's
MODELS = {
    "plain": (lambda model: model, False),
    "bfloat16": (lambda model: model.bfloat16(), False),
    "lora": (lambda model: get_peft_model(model, LORA), True),
    "text prompts": (lambda model: get_peft_model(model, NPTConfig(num_text_tokens=2, num_vision_tokens=0)), True),
    "disabled": (lambda model: disabled(get_peft_model(model, NPTConfig(num_text_tokens=2))), False),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*all of them get prompts"),
    pytest.mark.filterwarnings("ignore:.*do not hold this adapter's placeholders"),
    pytest.mark.filterwarnings("ignore:.*BlipModel"),
]


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


def tuned(spec: Spec, name: str):
    torch.manual_seed(1)
    return MODELS[name][0](spec.build()).eval()


def probabilities(model, processor) -> torch.Tensor:
    return ZeroShotClassifier(model, processor).predict_proba(IMAGES, NAMES)


def read(folder, processor) -> torch.Tensor:
    model = AutoModelForImageClassification.from_pretrained(folder)
    inputs = processor.image_processor(images=IMAGES, return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        return model(**inputs).logits.softmax(-1)


CASES = [("SiglipModel", name) for name in MODELS]
CASES += [(f"{cls}Model", "lora") for cls in ("Siglip2", "MetaClip2", "Blip", "Align", "Tipsv2", "OwlViT")]
CASES += [("VisionTextDualEncoderModel", "text prompts"), ("ChineseCLIPModel", "plain")]


@pytest.mark.parametrize(("cls", "name"), CASES)
def test_export_equals_the_model(cls, name, tmp_path):
    spec = SPECS[cls]
    model, processor = tuned(spec, name), processor_for(spec)
    expected = probabilities(model, processor)
    before, random = state(model), torch.get_rng_state()
    folder = export_classifier(model, NAMES, tmp_path / "export", processor)
    assert changes(before, state(model)) == []
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(read(folder, processor), expected, atol=1e-5, rtol=1e-4)
    moved = (expected - probabilities(spec.build(), processor)).abs().max()
    assert moved > 1e-4 if MODELS[name][1] else moved < 1e-2


def test_the_folder_is_a_classifier_without_texts(tmp_path):
    spec = SPECS["SiglipModel"]
    spec.build().save_pretrained(tmp_path / "base")
    base, processor = type(spec.build()).from_pretrained(tmp_path / "base"), processor_for(spec)
    folder = export_classifier(base, NAMES, tmp_path / "export", processor, "the {}.")
    made = ImageClassifier.from_pretrained(folder)
    assert not any("text" in key for key in made.state_dict())
    assert made.classifier.scale == pytest.approx(base.logit_scale.exp().item())
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
    readme = (folder / "README.md").read_text()
    assert 'written as "the {}."' in readme
    assert "import peft_ncgeo" in readme
    answers = pipeline("image-classification", str(folder), top_k=5)(IMAGES[0])
    expected = ZeroShotClassifier(base, processor, "the {}.").predict_proba(IMAGES[:1], NAMES)[0]
    scores = {answer["label"]: answer["score"] for answer in answers}
    assert scores == pytest.approx(dict(zip(NAMES, expected.tolist(), strict=True)), abs=1e-5)


def broken(model):
    with torch.no_grad():
        model.vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] = torch.inf
    return model


@pytest.mark.parametrize(
    ("cls", "make", "message"),
    [
        ("SiglipModel", lambda model: get_peft_model(model, NPTConfig(num_vision_tokens=2)), "has vision prompts"),
        ("SiglipModel", broken, "fc1.weight is not finite"),
        ("GroupViTModel", lambda model: model, "more than one linear layer"),
    ],
)
def test_errors_leave_nothing_behind(tmp_path, cls, make, message):
    model = make(SPECS[cls].build())
    with pytest.raises(ValueError, match=message) as caught:
        export_classifier(model, NAMES, tmp_path / "export", processor_for(SPECS[cls]))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
