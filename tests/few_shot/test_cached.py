"""Heads on cached features through `adapt`: features, names, predictions, and what is refused."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import processors

from peft_ncgeo import CoPAConfig, FewShotClassifier, NPTConfig, ZeroShotClassifier, adapt
from peft_ncgeo.classifiers.base_new import evaluate_base_new
from peft_ncgeo.data.images import crop_flip
from peft_ncgeo.few_shot import CLAP, CoPA, GaussianDiscriminant, LPPlusPlus, TipAdapter

from ..cases import MODELS
from ..conftest import EOT, IMAGE_SIZE, NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit
from ..errors import message
from .made_up_support import unit
from .support import assert_as_before, snapshot

PICTURES = tiny_images(15)["image"][:]
LABELS = [i % 5 for i in range(15)]
OTHERS = tiny_images(10, seed=3)["image"][:]
HEADS = {
    "tip": TipAdapter(),
    "tip_f": TipAdapter(train_keys=True, epochs=3),
    "gda": GaussianDiscriminant(),
    "lp": LPPlusPlus(20),
    "clap": CLAP(epochs=5),
}
PROCESSOR = tiny_processor()


def fitted(head, model=None, images=PICTURES, labels=LABELS, **options):
    options = {"num_views": 2, "processor": PROCESSOR, "class_names": NAMES, **options}
    return adapt(model or tiny_clip(), images, labels, head=head, **options)


def lora():
    torch.manual_seed(2)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    return get_peft_model(tiny_clip(), config)


def siglip():
    return MODELS["siglip"]()


def siglip_processor():
    """Its tokenizer puts no token in front of a text."""
    processor = tiny_processor()
    ends = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOT)])
    processor.tokenizer.backend_tokenizer.post_processor = ends
    return processor


@torch.no_grad()
def image_features(model, images=OTHERS) -> torch.Tensor:
    inputs = PROCESSOR.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return model.get_image_features(pixel_values=inputs).pooler_output


@pytest.mark.parametrize("build", [tiny_clip, lora], ids=["plain", "lora"])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_on_the_models_own_features(name, build):
    """The classifier's logits are the head's, of the features that the model gives; the model does not change."""
    model = build().train()
    before = snapshot(model)
    classifier = fitted(HEADS[name], model)
    assert_as_before(model, before)
    assert isinstance(classifier, FewShotClassifier)
    assert classifier.classes == NAMES
    base = model.get_base_model().eval() if hasattr(model, "get_base_model") else model.eval()
    logits = classifier.head.logits(classifier.state, image_features(base))
    found = classifier.predict_proba(OTHERS)
    torch.testing.assert_close(found, logits.softmax(1), atol=1e-3, rtol=0)
    torch.testing.assert_close(classifier.predict_proba(OTHERS, 3), found, atol=1e-3, rtol=0)
    assert found.dtype == torch.float32
    assert classifier.predict(OTHERS) == [NAMES[i] for i in found.argmax(1)]
    assert {"loss", "accuracy"} <= classifier.metrics.keys()
    assert all(math.isfinite(value) for value in classifier.metrics.values())
    again = fitted(HEADS[name], build())
    assert all(torch.equal(value, again.state[key]) for key, value in classifier.state.items())


def test_keys_are_made_of_seeded_views():
    """Recomputed by hand: crops of at least half the area, drawn from (seed, view, image)."""
    classifier = fitted(TipAdapter(alpha=1.0, beta=1.0), num_views=3, seed=4)
    views = [
        image_features(
            tiny_clip(),
            [
                crop_flip(image, np.random.default_rng((4, v, i)), (IMAGE_SIZE, IMAGE_SIZE), 0.5)
                for i, image in enumerate(PICTURES)
            ],
        )
        for v in range(3)
    ]
    torch.testing.assert_close(classifier.state["keys"], unit(torch.stack(views).mean(0)), atol=1e-5, rtol=0)
    assert classifier.adaptation == {"num_views": 3, "template": "a photo of a {}.", "seed": 4}
    other = fitted(TipAdapter(alpha=1.0, beta=1.0), num_views=3)
    assert not torch.allclose(other.state["keys"], classifier.state["keys"], atol=1e-3)


def test_without_views_the_images_themselves_count():
    """Also as pixels, which have no views unless they are asked for."""
    head = TipAdapter(alpha=1.0, beta=1.0)
    classifier = fitted(head, num_views=0)
    torch.testing.assert_close(
        classifier.state["keys"], unit(image_features(tiny_clip(), PICTURES)), atol=1e-5, rtol=0
    )
    values = PROCESSOR.image_processor(images=PICTURES, return_tensors="pt")["pixel_values"]
    same = fitted(head, images=values, num_views=None)
    torch.testing.assert_close(same.state["keys"], classifier.state["keys"], atol=1e-5, rtol=0)
    assert fitted(head, num_views=None).adaptation["num_views"] == 10
    published = {"tip": 10, "tip_f": 10, "gda": 10, "lp": 1, "clap": 20}
    assert {name: HEADS[name].num_views for name in published} == published
    assert "num_views=2 needs images that can be cropped" in message(lambda: fitted(head, images=values))


def test_before_anything_is_learned_tip_adapter_is_zero_shot():
    """With alpha 0; for CLIP and SigLIP, whose bias a softmax ignores, in another template too."""
    given = (
        (tiny_clip(), None, PROCESSOR),
        (siglip(), "the {} in a tree", siglip_processor()),
        (lora(), None, PROCESSOR),
    )
    for model, template, processor in given:
        classifier = fitted(TipAdapter(alpha=0.0, beta=1.0), model, template=template, processor=processor)
        expected = ZeroShotClassifier(model, processor, template).predict_proba(OTHERS, NAMES)
        torch.testing.assert_close(classifier.predict_proba(OTHERS), expected, atol=1e-5, rtol=0)
        assert classifier.template == template or template is None


@pytest.mark.parametrize("name", HEADS)
def test_siglip(name):
    classifier = fitted(HEADS[name], siglip(), processor=siglip_processor())
    assert classifier.predict_proba(OTHERS).sum(1).allclose(torch.ones(10))


@pytest.mark.parametrize("name", HEADS)
def test_labels_are_positions_or_names(name):
    """In any order of the images; words alone name the classes in their order."""
    expected = fitted(HEADS[name])
    words = fitted(HEADS[name], labels=[NAMES[label] for label in LABELS])
    assert torch.equal(words.predict_proba(OTHERS), expected.predict_proba(OTHERS))
    by_themselves = fitted(HEADS[name], labels=[NAMES[label] for label in LABELS], class_names=None)
    assert by_themselves.classes == sorted(NAMES)


@pytest.mark.parametrize(
    "head", [TipAdapter(alpha=2.0, beta=3.0), GaussianDiscriminant(alpha=0.5)], ids=["tip", "gda"]
)
def test_new_names(head):
    """Beside trained names, in any order; Tip-Adapter has their texts alone, and trained ones keep their keys."""
    classifier, names = fitted(head), ["red tree", NAMES[3], "green fish", NAMES[0]]
    found = classifier.predict_proba(OTHERS, class_names=names)
    assert found.shape == (10, 4)
    assert classifier.predict(OTHERS, class_names=names) == [names[i] for i in found.argmax(1)]
    logits = classifier.head.logits(classifier.state, image_features(tiny_clip()))[:, [3, 0]]
    if isinstance(head, TipAdapter):
        zero_shot = ZeroShotClassifier(tiny_clip(), PROCESSOR).predict_proba(OTHERS, names).log()
        new = [values.log()[:, 0] - values.log()[:, 2] for values in (found, zero_shot.exp())]
        torch.testing.assert_close(*new, atol=1e-4, rtol=0)
    difference = found.log()[:, 1] - found.log()[:, 3]
    torch.testing.assert_close(difference, logits[:, 0] - logits[:, 1], atol=1e-2, rtol=0)
    permuted = classifier.predict_proba(OTHERS, class_names=NAMES[::-1])
    torch.testing.assert_close(permuted, classifier.predict_proba(OTHERS).flip(1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", HEADS)
def test_names_are_those_of_texts_and_may_come_one_by_one(name):
    """An underscore is read as a space, so it makes no new class; a generator can be read only once."""
    classifier = fitted(HEADS[name])
    written = [name.replace(" ", "_") for name in NAMES]
    expected = classifier.predict_proba(OTHERS, class_names=NAMES)
    torch.testing.assert_close(classifier.predict_proba(OTHERS, class_names=written), expected, atol=0, rtol=0)
    found = classifier.predict(OTHERS, class_names=iter(written))
    assert found == [written[i] for i in expected.argmax(1)]


@pytest.mark.parametrize("name", ["lp", "clap"])
def test_heads_without_texts_take_trained_names_alone(name):
    classifier = fitted(HEADS[name])
    some = classifier.predict_proba(OTHERS, class_names=[NAMES[4], NAMES[1]])
    whole = classifier.predict_proba(OTHERS)[:, [4, 1]]
    torch.testing.assert_close(some, whole / whole.sum(1, keepdim=True), atol=1e-5, rtol=0)
    assert "'red tree'" in message(lambda: classifier.predict(OTHERS, class_names=["red tree", NAMES[0]]))


def test_base_to_new():
    """Each half among its own names."""
    classifier = fitted(TipAdapter(alpha=2.0, beta=3.0))
    new = ["red tree", "green fish", "blue cat"]
    splits = {"base": tiny_images(10, seed=3), "new": tiny_images(9, new)}
    found = evaluate_base_new(classifier, splits)
    for half, names in (("base", NAMES), ("new", new)):
        rows = splits[half]
        right = [
            a == names[b]
            for a, b in zip(classifier.predict(rows["image"][:], class_names=names), rows["label"], strict=True)
        ]
        assert found[half] == pytest.approx(sum(right) / len(right))


def test_copa_is_the_default_and_takes_names():
    expected = adapt(tiny_clip(), PICTURES, LABELS, 3, processor=PROCESSOR)
    for head in (None, CoPA()):
        found = adapt(tiny_clip(), PICTURES, LABELS, 3, processor=PROCESSOR, head=head, class_names=NAMES)
        assert found.classes == NAMES
        assert torch.equal(found.predict_proba(OTHERS), expected.predict_proba(OTHERS))
    assert "class_names" in message(lambda: expected.predict(OTHERS, class_names=NAMES))


def test_eight_threads():
    classifier = fitted(TipAdapter(alpha=2.0, beta=3.0))
    lists = [[f"{a} {b}" for b in ("cat", "dog", "bird")] for a in ("red", "green", "blue", "black")] * 4
    expected = [classifier.predict_proba(OTHERS, class_names=names) for names in lists]
    fresh = fitted(TipAdapter(alpha=2.0, beta=3.0), tiny_clip().train())
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda names: fresh.predict_proba(OTHERS, class_names=names), lists))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert fresh.model.training


def damaged():
    model = tiny_clip()
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = math.nan
    return model


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        (lambda: fitted("tip"), TypeError, "head="),
        (lambda: fitted(TipAdapter, num_views=1), TypeError, "head="),
        (lambda: fitted(TipAdapter(), steps=40), ValueError, "steps=40"),
        (lambda: fitted(CLAP(), lr=0.1), ValueError, "lr=0.1"),
        (lambda: fitted(CLAP(), optimizer=torch.optim.SGD), ValueError, "optimizer"),
        (lambda: fitted(CoPA()), ValueError, "num_views=2"),
        (lambda: fitted(CoPA(), num_views=None, template="a {}"), ValueError, "template"),
        (lambda: fitted(None, num_views=None, seed=0), ValueError, "seed=0"),
        (lambda: fitted(TipAdapter(), class_names=None), ValueError, "class_names"),
        (lambda: fitted(TipAdapter(), class_names=NAMES[:4]), ValueError, "image 4 has the label 4"),
        (
            lambda: fitted(TipAdapter(), labels=["red cat"] * 14 + ["zebra"]),
            ValueError,
            "image 14 has the label 'zebra'",
        ),
        (lambda: fitted(TipAdapter(), labels=[True] * 15), ValueError, "label True"),
        (lambda: fitted(TipAdapter(), labels=[-1] * 15), ValueError, "label -1"),
        (
            lambda: fitted(TipAdapter(), class_names=[*NAMES, "red tree"]),
            ValueError,
            "'red tree' has no support image",
        ),
        (lambda: fitted(TipAdapter(), class_names=[*NAMES, NAMES[0]]), ValueError, "'red cat' twice"),
        (lambda: fitted(CoPA(), num_views=None, class_names=[*NAMES, "tree"]), ValueError, "'tree' has no support"),
        (lambda: fitted(TipAdapter(), labels=LABELS[:14]), ValueError, "15 support images and 14 labels"),
        (lambda: fitted(TipAdapter(), images=[]), ValueError, "no images"),
        (lambda: fitted(TipAdapter(), num_views=-1), ValueError, "num_views"),
        (lambda: fitted(TipAdapter(), seed=-1), ValueError, "seed"),
        (lambda: fitted(TipAdapter(), template="a photo"), ValueError, "template"),
        (lambda: fitted(TipAdapter(), damaged()), ValueError, "support image 0 are not finite"),
        (lambda: fitted(TipAdapter(), tiny_vit()), ValueError, "no text features"),
        (lambda: fitted(TipAdapter(), processor=PROCESSOR.image_processor), TypeError, "processor"),
        (lambda: fitted(TipAdapter(), processor=None), ValueError, "processor"),
        (lambda: fitted(TipAdapter(), images=PICTURES[:5], labels=LABELS[:5]), ValueError, "every class here has one"),
    ],
)
def test_bad_input(call, error, expected):
    assert expected in message(call, error)


def test_tuned_models_are_frozen_features():
    """Prompts too; a CoPA head on the image projection belongs to the features."""
    for config in (NPTConfig(num_text_tokens=2, num_vision_tokens=2), CoPAConfig()):
        torch.manual_seed(1)
        model = get_peft_model(tiny_clip(), config)
        for name, parameter in model.named_parameters():
            if "ncgeo" in name:
                parameter.data.normal_(0, 0.5)
        classifier = fitted(TipAdapter(alpha=0.0, beta=1.0), model)
        expected = ZeroShotClassifier(model, PROCESSOR).predict_proba(OTHERS, NAMES)
        torch.testing.assert_close(classifier.predict_proba(OTHERS), expected, atol=1e-5, rtol=0)
