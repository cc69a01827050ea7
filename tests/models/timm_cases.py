"""Tests of timm's models in Transformers' wrapper. `test_timm.py` runs this file where timm can be imported."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification, TimmWrapperForImageClassification, TimmWrapperModel, pipeline
from transformers.models.timm_wrapper import TimmWrapperImageProcessor

from peft_ncgeo import (
    CoPAConfig,
    GeometryTrainer,
    GeometryTrainingArguments,
    ImageClassifier,
    NPTConfig,
    PrototypeConfig,
    adapt,
)
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.data.processors import input_size
from peft_ncgeo.hub import load_adapter, save_adapter
from peft_ncgeo.losses import OTPreservation, SpaceAlignment
from peft_ncgeo.models import describe
from peft_ncgeo.models.heads import head_path, linear_classifier, linear_parameter, other_heads
from peft_ncgeo.models.image_encoder import encode_and_classify
from peft_ncgeo.models.towers import check_encoders, find_residual_places
from peft_ncgeo.training import align_classifier

from .survey.backbones import timm_spec
from .survey.inputs import NAMES, dataset
from .survey.specs import make
from .survey.tries import TRIES, specs
from .test_survey import check

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
POOLINGS = {
    "token": {},
    "average": {"global_pool": "avg"},
    "map, without [CLS]": {"global_pool": "map", "class_token": False},
    "registers, norm first": {"reg_tokens": 2, "pre_norm": True, "no_embed_class": True},
    "difference of attentions": {"attn_layer": "diff"},
}
HEADS = {
    "vit_tiny_patch16_224": ("timm_model.head", VIT),
    "resnet10t": ("timm_model.fc", {}),
    "tf_mobilenetv3_small_minimal_100": ("timm_model.classifier", {}),
    "test_convnext": ("timm_model.head.fc", {}),
    "sequencer2d_s": ("timm_model.head.fc", {"img_size": 32}),
}


def classifier(architecture: str = "vit_tiny_patch16_224", **args) -> TimmWrapperForImageClassification:
    args = args or HEADS.get(architecture, ("", {}))[1]
    model = make(TimmWrapperForImageClassification, timm_spec(architecture, **args)())
    model.config.id2label = dict(enumerate(NAMES))
    model.config.label2id = {name: i for i, name in enumerate(NAMES)}
    return model


def backbone(architecture: str = "vit_tiny_patch16_224", **args) -> TimmWrapperModel:
    return make(TimmWrapperModel, timm_spec(architecture, **(args or HEADS.get(architecture, ("", {}))[1]))())


def processor() -> TimmWrapperImageProcessor:
    return TimmWrapperImageProcessor(pretrained_cfg=timm_spec("resnet10t")().pretrained_cfg, architecture="resnet10t")


def pixels(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def move(model: nn.Module) -> nn.Module:
    """Give all of an adapter's weights other values, so that it changes the output."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ncgeo" in name or "lora" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


SPECS = [spec for spec in specs() if spec.family == "timm_wrapper"]


@pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])
def test_every_try_ends_as_the_page_says(spec):
    check(spec, TRIES)


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", HEADS)
@torch.no_grad()
def test_head_and_feature_are_timms_own(architecture):
    model, (path, _) = classifier(architecture), HEADS[architecture]
    assert head_path(model) == describe(model).head == path
    features, logits = encode_and_classify(model, pixels())
    tokens = model.timm_model.forward_features(pixels())
    torch.testing.assert_close(features, model.timm_model.forward_head(tokens, pre_logits=True))
    torch.testing.assert_close(logits, model(pixels()).logits)
    torch.testing.assert_close(linear_classifier(model)(features), logits)
    torch.testing.assert_close(ImageFeatures(model)(pixels()), features)


@pytest.mark.parametrize("architecture", HEADS)
@torch.no_grad()
def test_backbones_have_a_feature_and_no_head(architecture):
    model = backbone(architecture)
    assert head_path(model) is None
    torch.testing.assert_close(ImageFeatures(model)(pixels()), model(pixels()).pooler_output)


@pytest.mark.parametrize(
    ("architecture", "second"),
    [
        ("deit_tiny_distilled_patch16_224", "timm_model.head_dist"),
        ("crossvit_tiny_240", "timm_model.head.1"),
        ("volo_d1_224", "timm_model.aux_head"),
    ],
)
def test_several_heads_are_seen(architecture, second):
    model = classifier(architecture)
    assert other_heads(model)[0] == second
    assert linear_classifier(model) is None
    with pytest.raises(ValueError, match=second):
        get_peft_model(model, PrototypeConfig())
    with pytest.raises(ValueError, match=second):
        linear_parameter(model)
    if "volo" not in architecture:
        with pytest.raises(ValueError, match="2 heads"):
            get_peft_model(model, CoPAConfig())


@pytest.mark.parametrize(
    "architecture", ["deit_tiny_distilled_patch16_224", "crossvit_tiny_240", "swiftformer_xs", "volo_d1_224"]
)
@torch.no_grad()
def test_several_heads_are_taken_where_they_share_a_feature(architecture):
    """Against what enters each head; features of VOLO's second one belong to tokens, not to the image."""
    model = classifier(architecture)
    heads, entered = [head_path(model), *other_heads(model)], []
    for path in heads:
        model.get_submodule(path).register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    size = 240 if "crossvit" in architecture else 224
    model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    assert len(entered) == len(heads)
    features = [each for each in entered if each.dim() == 2]
    if all(each is features[0] for each in features):
        check_encoders(model)
    else:
        with pytest.raises(ValueError, match="2 heads"):
            check_encoders(model)
        assert "2 heads" in describe(model).methods["GeometryTrainer"]


def unpooled(**config) -> TimmWrapperModel:
    args = {"global_pool": ""} if not config else {}
    given = timm_spec("vit_tiny_patch16_224", **VIT, **args)()
    given.update(config)
    return make(TimmWrapperModel, given)


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (lambda: unpooled(do_pooling=False), "do_pooling"),
        (lambda: unpooled(), "global_pool"),
        (lambda: backbone(**VIT, features_only=True), "FeatureGetterNet"),
        (lambda: backbone("shvit_s1"), "SHViT"),
    ],
    ids=["no pooling", "no global pooling", "feature maps", "no last module"],
)
def test_models_without_a_known_feature_are_refused(model, word):
    with pytest.raises(ValueError, match=word) as info:
        get_peft_model(model(), CoPAConfig())
    assert "\n" not in str(info.value)
    with pytest.raises(ValueError, match=word):
        ImageClassifier.from_backbone(model(), NAMES)


def test_a_head_that_is_a_convolution_is_no_linear_layer():
    """Its weights (K, d, 1, 1) are no vectors of classes."""
    model = classifier("resnetv2_18")
    assert head_path(model) == "timm_model.head.fc"
    assert isinstance(model.timm_model.head.fc, nn.Conv2d)
    assert linear_classifier(model) is None
    features, logits = encode_and_classify(model, pixels())
    torch.testing.assert_close(logits, model(pixels()).logits)
    torch.testing.assert_close(model.timm_model.head.fc(features[:, :, None, None]).flatten(1), logits)
    with pytest.raises(ValueError, match="Conv2d"):
        linear_parameter(model)


def test_alignment_turns_the_head():
    model, images = classifier(), dataset()
    aligned = align_classifier(model, images, 0.7, processor())
    torch.testing.assert_close(model.timm_model.head.weight.detach(), aligned.weight)
    assert aligned.cosine_after > aligned.cosine_before


# ---- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_prompts_are_tokens_of_every_block(pooling):
    """Against the blocks run by hand on longer rows."""
    args = {**VIT, **POOLINGS[pooling]}
    model = move(get_peft_model(classifier(**args), NPTConfig(num_vision_tokens=2, vision_depth=2)))
    first, second = (p for name, p in model.named_parameters() if "ncgeo" in name)
    plain = classifier(**args).timm_model
    tokens = plain.norm_pre(plain.patch_drop(plain._pos_embed(plain.patch_embed(pixels()))))
    count = tokens.shape[1]
    tokens = plain.blocks[0](torch.cat([tokens, first.expand(3, -1, -1)], 1))
    tokens = plain.blocks[1](torch.cat([tokens[:, :count], second.expand(3, -1, -1)], 1))
    expected = plain.forward_head(plain.norm(plain.blocks[2](tokens)[:, :count]))
    torch.testing.assert_close(model(pixels()).logits, expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(pixels()).logits, classifier(**args)(pixels()).logits)


def test_maps_of_hidden_states_hold_no_prompts():
    """Two prompts beside 4 x 4 patches of width 32 would make maps of 36 channels."""
    model = get_peft_model(classifier(), NPTConfig(num_vision_tokens=2))
    with pytest.raises(NotImplementedError, match="output_hidden_states"):
        model(pixel_values=pixels(), output_hidden_states=True)
    with pytest.raises(NotImplementedError, match="feature maps"):
        get_peft_model(backbone(**VIT, features_only=True), NPTConfig(num_vision_tokens=2))
    with model.disable_adapter():
        maps = model(pixel_values=pixels(), output_hidden_states=True).hidden_states
    assert [tuple(each.shape) for each in maps] == [(3, 32, 4, 4)] * 3


@pytest.mark.parametrize(
    "architecture",
    ["resnet10t", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"],
)
def test_other_architectures_take_no_prompts(architecture):
    model = classifier(architecture)
    kind = type(model.timm_model).__name__
    with pytest.raises(NotImplementedError, match=f"{kind}.*VisionTransformer") as info:
        get_peft_model(model, NPTConfig(num_vision_tokens=2))
    assert "\n" not in str(info.value)
    assert describe(model).methods["image prompts"] == str(info.value)


# ---- CoPA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "resnet10t"])
@torch.no_grad()
def test_copa_transforms_what_the_head_takes(architecture):
    base = classifier(architecture)
    features, logits = encode_and_classify(base, pixels())
    head = linear_classifier(base)
    model = get_peft_model(base, CoPAConfig()).eval()
    torch.testing.assert_close(model(pixels()).logits, logits)
    theta = next(parameter for name, parameter in model.named_parameters() if "image_head" in name)
    theta.copy_(torch.randn(theta.shape, generator=torch.Generator().manual_seed(3)))
    torch.testing.assert_close(model(pixels()).logits, head(features @ theta))
    torch.testing.assert_close(ImageFeatures(model)(pixels()), features)


@torch.no_grad()
def test_residual_maps_stand_beside_known_parts():
    vit, resnet = classifier(), classifier("resnet10t")
    assert find_residual_places(vit)[:2] == ["timm_model.blocks.0.attn", "timm_model.blocks.0.mlp"]
    assert len(find_residual_places(vit)) == 6
    convolutions = [f"timm_model.layer{i}.0.conv{j}" for i in range(1, 5) for j in (1, 2)]
    assert find_residual_places(resnet) == convolutions
    with pytest.raises(ValueError, match="residual adapters"):
        find_residual_places(classifier("test_convnext"))
    for base in (vit, resnet):
        model = move(get_peft_model(base, CoPAConfig(residual_adapters=True)))
        tuned = model(pixels()).logits
        with model.disable_adapter():
            assert not torch.allclose(tuned, model(pixels()).logits, atol=1e-3)


def test_few_shots():
    images = dataset(10)
    names = [NAMES[label] for label in images["label"]]
    fitted = adapt(backbone(), images["image"][:], names, steps=3, processor=processor())
    assert set(fitted.predict(images["image"][:4])) <= set(NAMES)


def test_an_image_classifier_of_timms_backbone(tmp_path):
    base = backbone()
    model = ImageClassifier.from_backbone(base, NAMES, head="cosine", scale=10.0)
    with torch.no_grad():
        unit = torch.nn.functional.normalize
        expected = 10 * unit(base(pixels()).pooler_output) @ unit(model.classifier.weight).T
        torch.testing.assert_close(model(pixel_values=pixels()).logits, expected)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    prompted = move(get_peft_model(again, NPTConfig(num_vision_tokens=2)))
    with torch.no_grad():
        assert not torch.allclose(prompted(pixel_values=pixels()).logits, expected, atol=1e-3)
        with prompted.disable_adapter():
            torch.testing.assert_close(prompted(pixel_values=pixels()).logits, expected)


# ---- from images to files -------------------------------------------------------------------------------------------

ADAPTERS = {
    "LoRA": lambda: LoraConfig(target_modules=["qkv"], r=2, modules_to_save=["timm_model.head"]),
    "prompts": lambda: NPTConfig(num_vision_tokens=2, vision_depth=2, modules_to_save=["head"]),
    "prototypes": lambda: PrototypeConfig(num_vision_tokens=2, projection_dim=16),
}


def test_sizes_and_pixels_are_those_of_timms_processor():
    wide = timm_spec("resnet10t")().pretrained_cfg | {"input_size": [3, 32, 48]}
    assert input_size(TimmWrapperImageProcessor(pretrained_cfg=wide)) == (48, 32)
    white = Image.fromarray(np.full((32, 32, 3), 255, np.uint8))
    assert torch.equal(processor()(images=[white], return_tensors="pt")["pixel_values"], torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_training_saving_and_pipelines(kind, tmp_path):
    classifier().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model, images = get_peft_model(base, ADAPTERS[kind]()), dataset()
    if kind == "prompts":
        with pytest.raises(ValueError, match="head"):
            get_peft_model(classifier(), PrototypeConfig(modules_to_save=["head"]))
    losses = [] if kind == "prototypes" else [SpaceAlignment(weight=0.1), OTPreservation(weight=1.0, modality="image")]
    arguments = GeometryTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=5,
        augmentation="crop_flip",
        gradient_checkpointing=kind == "LoRA",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = GeometryTrainer(
        model, arguments, images, eval_dataset=images, processing_class=processor(), losses=losses
    )
    trainer.train()
    moved = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert len(moved) == len(before)
    model.eval()
    predicted = torch.from_numpy(trainer.predict(images).predictions)
    inputs = processor()(images=images["image"][:], return_tensors="pt")
    with torch.no_grad():
        own = model(**inputs).logits
    torch.testing.assert_close(predicted, own, atol=1e-4, rtol=1e-4)
    save_adapter(model, tmp_path / "adapter", processor())
    loaded = load_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    again = PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, own)
        torch.testing.assert_close(again.eval()(**inputs).logits, own)
    classify = pipeline("image-classification", model=loaded.get_base_model(), image_processor=processor())
    best = [rows[0]["label"] for rows in classify(images["image"][:], top_k=1)]
    assert best == [NAMES[i] for i in own.argmax(-1)]


def test_a_card_finds_the_processor_beside_the_base(tmp_path):
    """timm's processor is part of the base model's config and writes no file."""
    model = get_peft_model(classifier(), ADAPTERS["LoRA"]())
    save_adapter(model, tmp_path, processor(), base_model_id="timm/vit_tiny_patch16_224.augreg_in21k")
    card = (tmp_path / "README.md").read_text()
    assert "AutoImageProcessor.from_pretrained('timm/vit_tiny_patch16_224.augreg_in21k')" in card.replace('"', "'")


def test_a_file_brings_its_head_to_a_base_with_other_classes(tmp_path):
    other = make(TimmWrapperForImageClassification, _two_classes())
    other.save_pretrained(tmp_path / "base")
    model = move(get_peft_model(classifier(), ADAPTERS["LoRA"]()))
    save_adapter(model, tmp_path / "adapter", processor())
    loaded = load_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert list(loaded.get_base_model().config.id2label.values()) == NAMES
    assert torch.equal(linear_classifier(loaded).weight, linear_classifier(model).weight)


def _two_classes():
    config = timm_spec("vit_tiny_patch16_224", **VIT)()
    config.num_labels = 2
    return config
