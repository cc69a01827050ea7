"""The description of a model says what its methods then do."""

from __future__ import annotations

import pytest
from peft import get_peft_model
from torch import nn

from peft_ncgeo import AdaptFormerConfig, CoPAConfig, ImageClassifier, NPTConfig, PrototypeConfig, ZeroShotClassifier
from peft_ncgeo.models import describe
from peft_ncgeo.training import align_classifier

from ..conftest import tiny_vit
from .survey.inputs import dataset, processor_for
from .survey.tries import specs

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MODELS = [
    "CLIPModel (eos in config)",
    "SiglipModel",
    "AltCLIPModel",
    "GroupViTModel",
    "AlignModel",
    "FlavaModel",
    "ViTForImageClassification",
    "SwinForImageClassification",
    "LevitForImageClassificationWithTeacher",
    "ResNetForImageClassification",
    "ViTModel",
    "Dinov2Backbone",
    "ImageGPTForImageClassification",
]
SPECS = {spec.name: spec for spec in specs()}
USES = {
    "text prompts": lambda spec: get_peft_model(spec.build(), NPTConfig(num_text_tokens=2)),
    "image prompts": lambda spec: get_peft_model(spec.build(), NPTConfig(num_vision_tokens=2)),
    "PrototypeConfig": lambda spec: get_peft_model(spec.build(), PrototypeConfig()),
    "CoPAConfig, adapt": lambda spec: get_peft_model(spec.build(), CoPAConfig()),
    "residual adapters": lambda spec: get_peft_model(spec.build(), CoPAConfig(residual_adapters=True)),
    "AdaptFormerConfig": lambda spec: get_peft_model(spec.build(), AdaptFormerConfig(bottleneck_dim=2)),
    "ZeroShotClassifier": lambda spec: ZeroShotClassifier(spec.build(), processor_for(spec)),
    "align_classifier": lambda spec: align_classifier(spec.build(), dataset(5), 0.5, processor_for(spec)),
}


@pytest.mark.parametrize("name", [name for name in MODELS if name in SPECS])
def test_a_method_fits_where_the_description_says_so(name):
    spec = SPECS[name]
    described = describe(spec.build())
    assert described.name == spec.cls
    for use, run in USES.items():
        if described.methods[use]:
            with pytest.raises((ValueError, NotImplementedError)):
                run(spec)
        else:
            run(spec)


def test_a_tower_without_a_head_is_sent_to_the_classifier_that_adds_one():
    model = tiny_vit()
    assert "ImageClassifier.from_backbone(model, class_names)" in describe(model).methods["GeometryTrainer"]
    assert "ImageClassifier.from_backbone(model, class_names)" in rows_of(model)["head"]
    wrapped = ImageClassifier.from_backbone(model, ["a cat", "a dog"])
    assert describe(wrapped).methods["GeometryTrainer"] == ""
    assert "from_backbone" not in rows_of(wrapped)["head"]
    unknown = describe(nn.Linear(2, 2)).methods["GeometryTrainer"]
    assert "head" in unknown
    assert "from_backbone" not in unknown


def rows_of(model):
    return {line.split("  ")[1]: line for line in str(describe(model)).splitlines()[1:]}


def test_it_reads_like_a_table():
    spec = SPECS["SiglipModel"]
    model = spec.build()
    rows = rows_of(model)
    assert "64 tokens" in rows["text tower"]
    assert "padded to its full length" in rows["text tower"]
    assert rows["text prompts"].endswith("yes")
    assert "no: " in rows["PrototypeConfig"]
    assert "from_backbone" not in str(describe(model))
    tuned = get_peft_model(model, NPTConfig(num_text_tokens=2, num_vision_tokens=2))
    assert rows_of(tuned)["text tower"] == rows["text tower"]
