"""Alignment after training, against plain torch on the features themselves."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import ResNetConfig, ResNetForImageClassification

from peft_ncgeo.models.heads import linear_classifier
from peft_ncgeo.training import align_classifier, sweep_alignment

from ..conftest import NAMES, tiny, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from ..losses.batches import unit_rows
from ..training.runs import lora_vit, pixels_and_labels, prompted_clip, prototypes, vit


def tiny_resnet():
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    return tiny(ResNetForImageClassification, config)


def lora_head():
    """Nothing but the head, adapted by LoRA far from its start."""
    torch.manual_seed(3)
    return get_peft_model(
        tiny_vit_classifier(), LoraConfig(r=2, target_modules=["classifier"], init_lora_weights=False)
    )


def resnet():
    return get_peft_model(
        tiny_resnet(), LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier"])
    )


HEADS = {
    "modules_to_save": vit,
    "lora": lora_vit,
    "lora_head": lora_head,
    "plain": tiny_vit_classifier,
    "resnet": resnet,
    "resnet_lora_head": lambda: get_peft_model(tiny_resnet(), LoraConfig(target_modules=["classifier.1"])),
}
pytestmark = pytest.mark.filterwarnings("ignore:The head belongs")


def logits_of(model, pixels):
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).logits


def features_of(model, pixels):
    """Return the input of the whole head, seen by a hook of the test's own."""
    seen = []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    handle = base.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(1)))
    logits_of(model, pixels)
    handle.remove()
    return seen[0].double()


def by_hand(weight, features, labels, fraction):
    """Each row rotated towards its centred class mean by a share of the angle, with acos, in float64."""
    means = torch.stack([features[labels == c].mean(0) for c in range(len(weight))])
    mu, w = unit_rows(means - means.mean(0)), unit_rows(weight)
    angle = (w * mu).sum(1, keepdim=True).acos()
    turned = (((1 - fraction) * angle).sin() * w + (fraction * angle).sin() * mu) / angle.sin()
    return turned * weight.norm(dim=1, keepdim=True)


def effective_rows(model, width):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        points = torch.cat([torch.zeros(1, width), torch.eye(width)])
        if isinstance(base, ResNetForImageClassification):
            points = points[:, :, None, None]
        out = base.classifier.eval()(points).double()
    return (out[1:] - out[0]).T, out[0]


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_rotated(head):
    model, images = HEADS[head](), tiny_images(40)
    pixels, labels = pixels_and_labels(images)
    features, labels = features_of(model, pixels), torch.tensor(labels)
    before, bias = effective_rows(model, features.shape[1])
    expected = by_hand(before, features, labels, 0.6)
    correct = (logits_of(model, pixels).argmax(1) == labels).double().mean()
    start = {name: value.clone() for name, value in model.state_dict().items()}

    aligned = align_classifier(model, images, 0.6, tiny_processor())
    torch.testing.assert_close(aligned.weight.double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(effective_rows(model, features.shape[1])[0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(aligned.original.double(), before)
    assert aligned.accuracy_before == pytest.approx(float(correct))
    logits = features @ expected.T + bias
    torch.testing.assert_close(logits_of(model, pixels).double(), logits, atol=1e-4, rtol=1e-4)
    assert aligned.accuracy_after == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert aligned.cosine_after > aligned.cosine_before + 0.1
    assert aligned.predict(images["image"][:6]) == [NAMES[i] for i in logits[:6].argmax(1)]

    aligned.undo()
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]), name
    aligned.undo()  # once more changes nothing
    assert torch.equal(effective_rows(model, features.shape[1])[0], before)


@pytest.mark.parametrize("fraction", [0.05, 0.6, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", ["modules_to_save", "lora_head", "plain", "resnet_lora_head"])
def test_a_head_in_half_precision_is_rotated(head, dtype, fraction):
    """As far as its resolution goes; what is told of it is true of the rounded rows."""
    model, images = HEADS[head]().to(dtype), tiny_images(40)
    pixels, labels = pixels_and_labels(images)
    features, labels = features_of(model, pixels.to(dtype)), torch.tensor(labels)
    before, bias = effective_rows(copy.deepcopy(model).float(), features.shape[1])
    expected = by_hand(before, features, labels, fraction)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    aligned = align_classifier(model, images, fraction, tiny_processor())
    now, _ = effective_rows(copy.deepcopy(model).float(), features.shape[1])
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    largest = max(float(weight.detach().abs().max()) for weight in (expected, *base.classifier.parameters()))
    torch.testing.assert_close(now, expected, atol=torch.finfo(dtype).eps * largest, rtol=0)
    torch.testing.assert_close(aligned.weight.double(), now, atol=1e-6, rtol=1e-5)
    correct = ((features @ now.T + bias).argmax(1) == labels).double().mean()
    assert aligned.accuracy_after == pytest.approx(float(correct), abs=0.026)  # a tie of an image
    assert aligned.cosine_after > aligned.cosine_before
    aligned.undo()
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]), name


def test_an_aligned_head_is_saved(tmp_path):
    model = vit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        align_classifier(model, tiny_images(40), 1.0, tiny_processor())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit_classifier(), tmp_path)
    assert torch.equal(linear_classifier(loaded).weight, linear_classifier(model).weight)


@pytest.mark.filterwarnings("default:The head belongs")
def test_a_head_outside_the_adapter_is_warned_of():
    with pytest.warns(UserWarning, match="will not hold its aligned weights"):
        align_classifier(lora_head(), tiny_images(40), 0.5, tiny_processor())


def test_clip_gives_a_classifier_and_stays_as_it_is():
    model, images, other = prompted_clip(), tiny_images(40), tiny_images(20, seed=5)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    aligned = align_classifier(model, images, 0.5, tiny_processor(), validation=other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]), name
    base = model.get_base_model().eval()
    with torch.no_grad():
        pixels, labels = pixels_and_labels(images)
        features = base.get_image_features(pixel_values=pixels).pooler_output.double()
        other_pixels, other_labels = pixels_and_labels(other)
        judged = base.get_image_features(pixel_values=other_pixels).pooler_output.double()
    expected = by_hand(aligned.original.double(), features, torch.tensor(labels), 0.5)
    torch.testing.assert_close(aligned.weight.double(), expected, atol=1e-5, rtol=1e-4)
    right = (unit_rows(judged) @ unit_rows(expected).T).argmax(1) == torch.tensor(other_labels)
    assert aligned.accuracy_after == pytest.approx(float(right.double().mean()))


def test_sweep_is_align_classifier_for_each_fraction():
    model, train, validation = lora_vit(), tiny_images(40), tiny_images(30, seed=5)
    rows = sweep_alignment(model, train, validation, (0.0, 0.5, 1.0), tiny_processor())
    assert [row["fraction"] for row in rows] == [0.0, 0.5, 1.0]
    for row in rows:
        aligned = align_classifier(model, train, row["fraction"], tiny_processor(), validation=validation)
        aligned.undo()
        assert row["accuracy"] == aligned.accuracy_after
        assert row["cosine"] == pytest.approx(aligned.cosine_after)
    assert rows[0]["accuracy"] == aligned.accuracy_before
    assert rows[2]["cosine"] == pytest.approx(1)


def test_batches_in_place_of_images():
    model, images = lora_vit(), tiny_images(40)
    pixels, labels = pixels_and_labels(images)
    expected = align_classifier(model, images, 0.5, tiny_processor())
    expected.undo()
    loader = [{"pixel_values": pixels[i::3], "labels": torch.tensor(labels)[i::3]} for i in range(3)]
    got = align_classifier(model, loader, 0.5, tiny_processor())
    torch.testing.assert_close(got.weight, expected.weight)
    assert got.class_names is None
    predicted = got.predict(images["image"][:6])
    assert [NAMES[i] for i in predicted] == expected.predict(images["image"][:6])


def test_a_class_without_images_keeps_its_row():
    images = tiny_images(40).filter(lambda label: label != 2, input_columns="label")
    aligned = align_classifier(vit(), images, 1.0, tiny_processor())
    assert torch.equal(aligned.weight[2], aligned.original[2])
    assert aligned.means[2].isnan().all()
    assert not torch.allclose(aligned.weight[1], aligned.original[1])


def test_the_model_keeps_its_mode():
    model = lora_vit().train()
    align_classifier(model, tiny_images(20), 0.5, tiny_processor())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: align_classifier(vit(), tiny_images(20), 1.5, tiny_processor()), "fraction=1.5 must be 0 to 1"),
        (lambda: align_classifier(vit(), tiny_images(20), 0.5), "pass processing_class"),
        (lambda: align_classifier(prototypes(), tiny_images(20), 0.5, tiny_processor()), "not one linear layer"),
        (
            lambda: align_classifier(vit(), tiny_images(8, NAMES[:4]), 0.5, tiny_processor()),
            "5 outputs, the data",
        ),
        (lambda: align_classifier(vit(), [], 0.5), "no images"),
        (lambda: align_classifier(prompted_clip(), [], 0.5), "Class texts need names"),
        (
            lambda: align_classifier(vit(), tiny_images(9), 0.5, tiny_processor(), tiny_images(9, NAMES[::-1])),
            "are not the data set's",
        ),
        (lambda: align_classifier(vit(), [{"pixel_values": 1}], 0.5), "must hold pixel_values and labels"),
        (lambda: sweep_alignment(vit(), tiny_images(9), tiny_images(9), (0, 2), tiny_processor()), "fraction=2"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, use_dora=True, target_modules=["classifier"]),
        IA3Config(target_modules=["classifier"], feedforward_modules=[]),
    ],
    ids=["dora", "ia3"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_that_do_more_than_add_are_refused(config, dtype):
    """Nothing is changed, rather than weights that are not those that are reported."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_vit_classifier(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + torch.rand_like(parameter)).add_(0.1)
    model.to(dtype)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="does more than add to its weights"):
        align_classifier(model, tiny_images(40), 1.0, tiny_processor())
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]), name


def test_the_template_of_class_texts():
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), LoraConfig(r=2, target_modules=["q_proj"]))
    plain, other = (
        align_classifier(model, tiny_images(20), 0.0, tiny_processor(), template=t) for t in (None, "the {} in red.")
    )
    texts = tiny_processor().tokenizer([f"the {name} in red." for name in NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_base_model().eval().get_text_features(**texts).pooler_output
    torch.testing.assert_close(other.original, expected, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(plain.original, expected)
