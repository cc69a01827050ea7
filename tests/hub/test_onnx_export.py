"""ONNX graphs give the logits of the model that they were made of, for any number of images."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoImageProcessor

from peft_ncgeo import ImageClassifier, NPTConfig, ZeroShotClassifier
from peft_ncgeo.hub import export_classifier
from peft_ncgeo.models import encode_images
from peft_ncgeo.models.text_setting import TextSetting, remember_text_setting
from peft_ncgeo.training import align_classifier

from ..cases import MODELS
from ..conftest import NAMES, tiny_images, tiny_processor
from ..models.survey.dual_encoders import dual_encoders
from ..models.survey.inputs import NAMES as ALIGNED
from ..models.survey.inputs import dataset, processor_for
from ..states import changes, state

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]
SIGLIP = next(spec for spec in dual_encoders() if spec.cls == "SiglipModel")
ZERO_SHOT = ["red panda", "blue cat", "green fish", "dog"]
IMAGES = tiny_images(3, seed=2)["image"][:]


def far(model: Any) -> Any:
    """The model with its adapter far from the start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def clip_lora_below_prompts():
    lora = far(get_peft_model(MODELS["clip"](), LoraConfig(target_modules=["q_proj", "visual_projection"], r=3)))
    return far(get_peft_model(lora.get_base_model(), NPTConfig(num_vision_tokens=2, vision_depth=2), "prompts"))


def siglip_aligned_prompts():
    model = far(get_peft_model(SIGLIP.build(), NPTConfig(num_vision_tokens=2, vision_depth=2)))
    return align_classifier(model, dataset(10), 0.5, processor_for(SIGLIP))


def dino_with_a_head_and_late_prompts():
    """Prompts that enter at a later layer: traced, the layers get a mask of the image's own tokens."""
    torch.manual_seed(0)
    model = ImageClassifier.from_backbone(MODELS["dinov2"](), NAMES, head="cosine")
    return far(get_peft_model(model, NPTConfig.vpt(num_vision_tokens=3, vision_depth=1, first_layer=1)))


BUILDS = {
    build.__name__: build
    for build in (clip_lora_below_prompts, siglip_aligned_prompts, dino_with_a_head_and_late_prompts)
}


@dataclass
class Exported:
    folder: Path
    names: list[str]
    logits: torch.Tensor  # of the model itself
    changed: list[str]


@pytest.fixture(scope="module", params=BUILDS)
def exported(request, tmp_path_factory) -> Exported:
    if request.param.startswith("siglip") and Version(torch.__version__) < Version("2.9"):
        pytest.skip("torch 2.6 cannot trace SigLIP's attention pooling for any number of images; 2.9 can")
    model, processor = BUILDS[request.param](), tiny_processor()
    tuned, before = getattr(model, "model", model), state(getattr(model, "model", model))
    with torch.no_grad():
        if request.param.startswith("clip"):
            names = ZERO_SHOT
            logits = ZeroShotClassifier(model, processor).predict_proba(IMAGES, names).log()  # up to a constant
        elif request.param.startswith("siglip"):
            names, processor = [ALIGNED[2], ALIGNED[0]], processor_for(SIGLIP)
            features = encode_images(tuned, **processor.image_processor(images=IMAGES, return_tensors="pt"))
            rows, base = model.weight[[2, 0]], tuned.get_base_model()
            logits = base.logit_scale.exp() * normalize(features) @ normalize(rows).T + base.logit_bias
        else:
            names, processor = [NAMES[3], NAMES[0], NAMES[2]], processor.image_processor
            logits = model(**processor(images=IMAGES, return_tensors="pt")).logits[:, [3, 0, 2]]
    folder = export_classifier(
        model, names, tmp_path_factory.mktemp("onnx") / "new" / "graph", processor, format="onnx"
    )
    return Exported(folder, names, logits, changes(before, state(tuned)))


def run(folder: Path, count: int) -> torch.Tensor:
    """The graph's logits, with pixels as whoever has the folder alone makes them."""
    pixels = AutoImageProcessor.from_pretrained(folder)(images=IMAGES[:count], return_tensors="np")["pixel_values"]
    return torch.tensor(
        onnxruntime.InferenceSession(folder / "model.onnx").run(["logits"], {"pixel_values": pixels})[0]
    )


@pytest.mark.slow
def test_the_graph_gives_the_models_logits(exported):
    for count in (1, 3):
        found, expected = run(exported.folder, count), exported.logits[:count]
        assert found.shape == (count, len(exported.names))
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        if exported.names is ZERO_SHOT:
            found = found.log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_the_folder_is_whole_and_the_model_as_it_was(exported):
    names = ["README.md", "config.json", "model.onnx", "preprocessor_config.json"]
    assert sorted(file.name for file in exported.folder.iterdir()) == names
    assert [file.name for file in exported.folder.parent.iterdir()] == ["graph"]
    assert list(AutoConfig.from_pretrained(exported.folder).id2label.values()) == exported.names
    assert exported.changed == []
    graph = onnx.load(exported.folder / "model.onnx")
    onnx.checker.check_model(graph)
    assert [imported.version for imported in graph.opset_import if not imported.domain] == [18]
    size = AutoConfig.from_pretrained(exported.folder).image_size
    shapes = {
        value.name: [axis.dim_value or "any" for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    assert shapes == {"pixel_values": ["any", 3, size, size], "logits": ["any", len(exported.names)]}
    lora = [tensor.name for tensor in graph.graph.initializer if "lora" in tensor.name]
    assert lora == []  # merged


def quantized():
    model = MODELS["clip"]()
    model.is_quantized = True
    return model


@pytest.mark.parametrize(
    ("build", "names", "message"),
    [
        (MODELS["vit"], NAMES, "neither a text tower nor a classification head"),
        (MODELS["vit_classifier"], NAMES, "no class 'red cat'.*id2label"),
        (quantized, NAMES, "quantized"),
        (MODELS["clip"], NAMES[:1], "two class names"),
    ],
)
def test_what_has_no_graph_is_refused(build, names, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        export_classifier(build(), names, tmp_path / "new" / "graph", tiny_processor(), format="onnx")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_and_an_unknown_format_are_told_first(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "peft_ncgeo.hub.onnx_export", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it raises
    export = partial(export_classifier, None, NAMES, tmp_path / "graph", tiny_processor())  # no model: no work
    with pytest.raises(ImportError, match=r"peft_ncgeo\[onnx\]") as caught:
        export(format="onnx")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="format='tflite'.*'onnx'"):
        export(format="tflite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_graph_of_several_labels_has_their_bias_and_says_so(tmp_path):
    model = far(get_peft_model(MODELS["clip"](), LoraConfig(target_modules=["q_proj"], r=3)))
    remember_text_setting(model, TextSetting(multi_label=True, logit_bias=-1.5), ["default"])
    folder = export_classifier(model, ZERO_SHOT, tmp_path / "graph", tiny_processor(), format="onnx")
    chances = ZeroShotClassifier(model, tiny_processor()).predict_proba(IMAGES, ZERO_SHOT)
    torch.testing.assert_close(run(folder, 3).sigmoid(), chances, rtol=1e-4, atol=1e-5)
    assert AutoConfig.from_pretrained(folder).problem_type == "multi_label_classification"
    assert "sigmoid of each" in (folder / "README.md").read_text()
