"""Heads whose name in the model is not `classifier`, which are known by family."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments, PrototypeConfig
from peft_ncgeo.hub import load_adapter
from peft_ncgeo.losses import SpaceAlignment
from peft_ncgeo.models import describe
from peft_ncgeo.models.heads import head_path, linear_classifier, saved_head
from peft_ncgeo.models.image_encoder import encode_and_classify
from peft_ncgeo.training import align_classifier
from peft_ncgeo.tuners.prototype.layer import PrototypeLayer

from ..conftest import pixels, tiny_images, tiny_processor
from .survey.tries import specs
from .test_families import build, refusal

NAMES = ["red cat", "blue dog", "green bird"]


def hgnet(**labels) -> PreTrainedModel:
    """A model whose `classifier` is a list of layers, whose own forward pass nobody calls."""
    widths = {"stem_channels": [3, 8, 8], "stage_in_channels": [8] * 4, "stage_mid_channels": [8] * 4}
    stages = {"stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4, "depths": [1] * 4, "hidden_sizes": [8] * 4}
    sizes = {"embedding_size": 8, "stage_out_channels": [8] * 4}
    return build("HGNetV2ForImageClassification", **widths, **stages, **sizes, **labels)


def textnet(**labels) -> PreTrainedModel:
    layers = {f"conv_layer_kernel_sizes_stage{i}": [[3, 3]] for i in range(1, 5)}
    layers |= {f"conv_layer_strides_stage{i}": [2] for i in range(1, 5)}
    return build("TextNetForImageClassification", hidden_sizes=[8] * 5, stem_out_channels=8, **layers, **labels)


# the survey's, since every feature of the small one above is 0
HGNET = next(spec.build for spec in specs() if spec.name == "HGNetV2ForImageClassification")
MODELS = {"HGNetV2": HGNET, "TextNet": lambda: textnet(num_labels=5)}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_head_of_another_name_is_used_everywhere(make):
    model, images = make(), pixels(4)
    assert head_path(model) == describe(model).head == "fc"
    entered = []
    handle = model.fc.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    expected = model(pixel_values=images).logits
    handle.remove()
    features, logits = encode_and_classify(model, images)
    assert torch.equal(features, entered[0])
    assert torch.equal(logits, expected)
    before = model.fc.weight.clone()
    align_classifier(model, tiny_images(9), 0.5, tiny_processor())
    assert not torch.equal(model.fc.weight, before)

    model = get_peft_model(make(), PrototypeConfig())
    assert isinstance(model.get_base_model().fc, PrototypeLayer)
    refusal(lambda: get_peft_model(make(), PrototypeConfig(modules_to_save=["fc"])), "fc", ValueError)


def test_an_adapter_file_brings_a_head_of_another_name(tmp_path):
    hgnet(num_labels=2).save_pretrained(tmp_path / "base")
    model = hgnet(num_labels=3)
    model.config.id2label = dict(enumerate(NAMES))
    model = get_peft_model(model, LoraConfig(target_modules=["stem1.convolution"], r=2, modules_to_save=["fc"]))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "class_names.json").write_text('["red cat", "blue dog", "green bird"]')
    loaded = load_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert list(loaded.get_base_model().config.id2label.values()) == NAMES
    assert torch.equal(linear_classifier(loaded).weight, linear_classifier(model).weight)

    get_peft_model(hgnet(num_labels=3), LoraConfig(target_modules=["stem1.convolution"], r=2)).save_pretrained(
        tmp_path / "headless"
    )
    (tmp_path / "headless" / "class_names.json").write_text('["red cat", "blue dog", "green bird"]')
    refusal(lambda: load_adapter(tmp_path / "headless", str(tmp_path / "base")), "holds the head", ValueError)


def test_refusals_name_the_head(tmp_path):
    lora = get_peft_model(hgnet(num_labels=3), LoraConfig(target_modules=["fc"], r=2))
    assert saved_head(lora) == "modules_to_save=['fc']"
    arguments = GeometryTrainingArguments(output_dir=str(tmp_path), report_to="none")

    def trainer() -> GeometryTrainer:
        losses = [SpaceAlignment(weight=1.0)]
        return GeometryTrainer(lora, arguments, tiny_images(9), processing_class=tiny_processor(), losses=losses)

    refusal(trainer, "'fc'", ValueError)


def test_a_model_without_outputs_has_no_head():
    model = hgnet(num_labels=0)
    assert head_path(model) is None
    refusal(lambda: get_peft_model(model, PrototypeConfig()), "no classification head", ValueError)


def test_both_heads_of_swiftformer_are_seen():
    model = build("SwiftFormerForImageClassification", embed_dims=[8] * 4, depths=[1] * 4, num_labels=3)
    assert linear_classifier(model) is None
    refusal(lambda: get_peft_model(model, PrototypeConfig()), "dist_head", ValueError)
