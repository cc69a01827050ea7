"""Image classifiers of any tower: the feature, the start of the head, files, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    IJepaConfig,
    IJepaModel,
    Owlv2Config,
    ResNetConfig,
    ResNetModel,
    pipeline,
)

from peft_ncgeo import ImageClassifier
from peft_ncgeo.models.image_classifier import ImageClassifierConfig
from peft_ncgeo.models.image_towers import _DUAL_ENCODERS
from peft_ncgeo.models.towers import find_pooling
from peft_ncgeo.registration import register

from ..conftest import (
    NAMES,
    VISION,
    VIT,
    pixels,
    tiny,
    tiny_clip,
    tiny_images,
    tiny_processor,
    tiny_vit,
    tiny_vit_classifier,
)
from .survey.dual_encoders import dual_encoders
from .survey.inputs import image_inputs
from .survey.specs import Spec


def tiny_resnet() -> ResNetModel:
    return tiny(ResNetModel, ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))


def tiny_dinov2() -> Dinov2Model:
    return tiny(Dinov2Model, Dinov2Config(**{k: v for k, v in VIT.items() if k != "intermediate_size"}, mlp_ratio=2))


def classifier(model, **options) -> ImageClassifier:
    torch.manual_seed(1)
    return ImageClassifier.from_backbone(model, **{"num_labels": 5, **options})


def feature(model: ImageClassifier, inputs) -> torch.Tensor:
    """Return the input of the head, seen by a hook of the test's own."""
    seen = []
    handle = model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


# ------------------------------------------------------------------------------------------------------- features


def with_projection():
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(tiny_clip().config.vision_config).eval()


FEATURES = {
    "clip": (tiny_clip, {}, lambda m, x: m.get_image_features(pixel_values=x).pooler_output),
    "clip, not projected": (tiny_clip, {"projected": False}, lambda m, x: m.vision_model(x).pooler_output),
    "clip's image part": (with_projection, {}, lambda m, x: m(x).image_embeds),
    "clip's tower": (
        lambda: tiny(CLIPVisionModel, tiny_clip().config.vision_config),
        {},
        lambda m, x: m(x).pooler_output,
    ),
    "vit": (tiny_vit, {}, lambda m, x: m(x).last_hidden_state[:, 0]),  # not the pooler, which classifiers leave out
    "vit of a classifier": (lambda: tiny_vit_classifier().vit, {}, lambda m, x: m(x).last_hidden_state[:, 0]),
    "dinov2": (tiny_dinov2, {}, lambda m, x: m(x).pooler_output),
    "resnet": (tiny_resnet, {}, lambda m, x: m(x).pooler_output.flatten(1)),
    "i-jepa": (lambda: tiny(IJepaModel, IJepaConfig(**VISION)), {}, lambda m, x: m(x).last_hidden_state.mean(1)),
}


@pytest.mark.parametrize("name", FEATURES)
def test_the_feature_is_the_backbones_own(name):
    make, options, expected = FEATURES[name]
    model, x = make().double(), pixels().double()
    with torch.no_grad():
        expected = expected(model, x)
    made = classifier(model, **options)
    torch.testing.assert_close(feature(made, {"pixel_values": x}), expected, atol=1e-12, rtol=1e-12)
    with torch.no_grad():
        logits = made(pixel_values=x).logits
    torch.testing.assert_close(logits, expected @ made.classifier.weight.T + made.classifier.bias)
    assert find_pooling(made)[:2] == ("projection", expected.shape[1])


def owlv2() -> Owlv2Config:
    (owlvit,) = (spec for spec in dual_encoders() if spec.name == "OwlViTModel")
    config = owlvit.config()
    return Owlv2Config(text_config=config.text_config, vision_config=config.vision_config, projection_dim=24)


DUAL = [
    *(s for s in dual_encoders() if s.family in _DUAL_ENCODERS and hasattr(getattr(T, s.cls), "get_image_features")),
    Spec("Owlv2Model", "Owlv2Model", "dual", owlv2),
]


@pytest.mark.filterwarnings("ignore:.*BlipModel")
@pytest.mark.parametrize("spec", DUAL, ids=lambda spec: spec.name)
def test_features_of_dual_encoders(spec: Spec, tmp_path):
    model, inputs = spec.build(), image_inputs(spec)
    with torch.no_grad():
        expected = model.get_image_features(**inputs).pooler_output
    if spec.family == "groupvit":
        with pytest.raises(ValueError, match="projected=False"):
            classifier(model)
        classifier(model, projected=False).save_pretrained(tmp_path)
        expected = model.vision_model(**inputs).pooler_output
    else:
        classifier(model).save_pretrained(tmp_path)
    made = ImageClassifier.from_pretrained(tmp_path)
    torch.testing.assert_close(feature(made, inputs), expected, atol=1e-5, rtol=1e-4)
    assert not any("text" in key for key in made.state_dict())


def test_the_dual_encoders_of_the_survey_are_all_tried():
    assert {spec.family for spec in DUAL} == set(_DUAL_ENCODERS)


def test_the_model_that_was_given_stays_as_it_was():
    vit, clip = tiny_vit(), tiny_clip()
    before = [key for model in (vit, clip) for key in model.state_dict()]
    made = classifier(vit)
    assert classifier(clip).backbone is not clip.vision_model
    assert [key for model in (vit, clip) for key in model.state_dict()] == before
    assert made.backbone.encoder is not vit.encoder if hasattr(vit, "encoder") else made.backbone is not vit
    shared = {parameter.data_ptr() for parameter in vit.parameters()}
    assert {parameter.data_ptr() for parameter in made.backbone.parameters()} <= shared


def test_loss_and_other_inputs_of_the_tower():
    made, labels = classifier(tiny_clip()), torch.tensor([0, 4, 2])
    larger = torch.randn(3, 3, 24, 24)
    out = made(pixel_values=larger, labels=labels, interpolate_pos_encoding=True, output_hidden_states=True)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    assert len(out.hidden_states) == VISION["num_hidden_layers"] + 1
    loss, logits = made(larger, labels, interpolate_pos_encoding=True, return_dict=False)[:2]
    torch.testing.assert_close((loss, logits), (out.loss, out.logits))


# ----------------------------------------------------------------------------------------------- where heads start


def zero_shot_parts(clip, x):
    """Features and unit text features of NAMES, by Transformers alone."""
    texts = tiny_processor().tokenizer([f"a photo of a {name}." for name in NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        images = clip.get_image_features(pixel_values=x).pooler_output
        text = clip.get_text_features(**texts).pooler_output
    return images, text / text.norm(dim=1, keepdim=True)


def test_a_head_from_texts_is_zero_shot():
    clip, x = tiny_clip().double(), pixels().double()
    images, text = zero_shot_parts(clip, x)
    s = clip.logit_scale.exp().item()
    zero_shot = s * (images / images.norm(dim=1, keepdim=True)) @ text.T
    given = {"class_names": NAMES, "num_labels": None, "init": "texts", "processor": tiny_processor()}
    with torch.no_grad():
        cosine = classifier(clip, **given, head="cosine", scale=s)(pixel_values=x).logits
        linear = classifier(clip, **given)(pixel_values=x).logits
        default = classifier(clip, **given, head="cosine")(pixel_values=x).logits
    torch.testing.assert_close(cosine, zero_shot)
    torch.testing.assert_close(linear, images.norm(dim=1, keepdim=True) * zero_shot)
    torch.testing.assert_close(default, 25 / s * zero_shot)


def test_a_head_from_texts_before_the_projection():
    """LIFT's: w = unit(P g), so that its cosines are zero-shot's numbers but for a factor of each class."""
    clip, x = tiny_clip().double(), pixels().double()
    images, text = zero_shot_parts(clip, x)
    given = {"class_names": NAMES, "num_labels": None, "init": "texts", "processor": tiny_processor()}
    with torch.no_grad():
        pooled = clip.vision_model(pixel_values=x).pooler_output
        rows = text @ clip.visual_projection.weight
        made = classifier(clip, **given, head="cosine", projected=False)
        torch.testing.assert_close(made.classifier.weight, rows / rows.norm(dim=1, keepdim=True))
        cosines = torch.nn.functional.cosine_similarity(pooled[:, None], rows[None], dim=-1)
        torch.testing.assert_close(made(pixel_values=x).logits, 25 * cosines)
        linear = classifier(clip, **given, projected=False)(pixel_values=x).logits
    torch.testing.assert_close(linear, clip.logit_scale.exp() * images @ text.T)


@pytest.mark.parametrize("make", [tiny_clip, tiny_vit])
def test_a_head_from_means_takes_the_nearest_mean(make):
    data, processor, model = tiny_images(23), tiny_processor(), make()
    x = processor.image_processor(images=data["image"][:], return_tensors="pt")["pixel_values"]
    given = {"num_labels": None, "init": "means", "processor": processor, "dataset": data, "batch_size": 4}
    linear, cosine = (classifier(model, **given, head=head) for head in ("linear", "cosine"))
    f = feature(linear, {"pixel_values": x})
    means = torch.stack([f[torch.tensor(data["label"][:]) == k].mean(0) for k in range(len(NAMES))])
    with torch.no_grad():
        logits, cosines = linear(pixel_values=x).logits, cosine(pixel_values=x).logits
    expected = -torch.cdist(f.double(), means.double()).square() / 2
    difference = logits.double() - expected
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cosines, 25 * F.cosine_similarity(f[:, None], means[None], dim=-1))
    assert list(linear.config.id2label.values()) == NAMES


def test_a_head_at_random():
    made = classifier(tiny_clip(), num_labels=400, head="cosine")
    assert made.classifier.weight.std().item() == pytest.approx(0.02, rel=0.1)
    linear = classifier(tiny_clip(), num_labels=400).classifier
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not linear.bias.any()


def test_half_precision():
    made = classifier(tiny_clip(dtype=torch.bfloat16), head="cosine")
    assert made.classifier.weight.dtype == torch.bfloat16
    logits = made(pixel_values=pixels().bfloat16()).logits
    assert logits.dtype == torch.float32  # scaled cosines lose too much in bfloat16


# ----------------------------------------------------------------------------------------------------------- files


def test_registering_again_keeps_the_class_that_is_loaded():
    register()
    assert MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[ImageClassifierConfig] is ImageClassifier


@pytest.mark.parametrize("head", ["linear", "cosine"])
@pytest.mark.parametrize("make", [tiny_clip, tiny_vit, tiny_resnet, tiny_dinov2])
def test_three_ways_to_load_it(make, head, tmp_path):
    made, processor, x = classifier(make(), class_names=NAMES, head=head, scale=7.0), tiny_processor(), pixels()
    made.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = made(pixel_values=x).logits
        for cls in (ImageClassifier, AutoModelForImageClassification):
            loaded = cls.from_pretrained(tmp_path)
            assert isinstance(loaded, ImageClassifier)
            assert not loaded.training
            torch.testing.assert_close(loaded(pixel_values=x).logits, expected)
            assert {key: value.shape for key, value in loaded.state_dict().items()} == {
                key: value.shape for key, value in made.state_dict().items()
            }
    image = tiny_images(1)["image"][0]
    answers = pipeline("image-classification", str(tmp_path), top_k=5)(image)
    with torch.no_grad():
        own = made(**processor.image_processor(images=image, return_tensors="pt")).logits[0].softmax(0)
    assert {answer["label"]: pytest.approx(answer["score"], abs=1e-5) for answer in answers} == dict(
        zip(NAMES, own.tolist(), strict=True)
    )


def test_another_head_is_put_on_a_saved_one(tmp_path):
    classifier(tiny_clip()).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert loaded(pixel_values=pixels()).logits.shape == (3, 3)


def test_no_path_of_the_backbone_is_saved(tmp_path):
    tiny_vit().save_pretrained(tmp_path / "vit")
    made = classifier(type(tiny_vit()).from_pretrained(tmp_path / "vit"))
    made.save_pretrained(tmp_path / "classifier")
    assert str(tmp_path) not in (tmp_path / "classifier" / "config.json").read_text()


# --------------------------------------------------------------------------------------------------------- refusals


def adapted():
    return get_peft_model(tiny_clip(), LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "round"}, "'linear', 'cosine'"),
        ({"init": "magic"}, "'random', 'texts', 'means'"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"projected": "false"}, "True or False"),
        ({"num_labels": None}, "class_names or num_labels"),
        ({"num_labels": 1}, "at least two"),
        ({"class_names": NAMES, "num_labels": 4}, "num_labels=4.*5 names"),
        ({"class_names": ["cat", "cat"]}, "'cat' twice"),
        ({"init": "texts"}, "processor"),
        ({"init": "texts", "processor": tiny_processor()}, "class_names"),
        ({"init": "texts", "processor": tiny_processor(), "class_names": NAMES, "model": tiny_vit()}, "reads text"),
        ({"init": "means", "processor": tiny_processor()}, "labelled dataset"),
        ({"dataset": tiny_images()}, "labelled dataset"),
        (
            {"init": "means", "processor": tiny_processor(), "dataset": tiny_images(), "class_names": NAMES[::-1]},
            "same order",
        ),
        ({"init": "means", "processor": tiny_processor(), "dataset": tiny_images(3)}, "'black fish' has no images"),
        ({"model": tiny_vit_classifier()}, "head already"),
        ({"model": adapted()}, "merge_and_unload"),
        ({"model": torch.nn.Linear(2, 2)}, "Transformers"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        classifier(**{"model": tiny_clip(), **options})
    assert "\n" not in str(caught.value)


def test_a_damaged_config_is_refused(tmp_path):
    classifier(tiny_clip()).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"CLIPVisionModel"', '"pipeline"'))
    with pytest.raises(ValueError, match="vision_class='pipeline'"):
        ImageClassifier.from_pretrained(tmp_path)
