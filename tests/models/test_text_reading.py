"""Texts of every dual encoder, read as its own tower was trained to read them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import pipeline

from peft_ncgeo import NPTConfig, ZeroShotClassifier
from peft_ncgeo.data import class_prompts
from peft_ncgeo.models import encode_texts
from peft_ncgeo.models.towers import find_towers, logit_bias, logit_scale, max_text_length, text_tower

from ..conftest import NAMES, tiny_images
from .survey.inputs import TEMPLATE, processor_for, tokenizer_for
from .survey.tries import specs

# Transformers says it of its BlipModel.
pytestmark = pytest.mark.filterwarnings("ignore:.*BlipModel. is going to be deprecated:DeprecationWarning")

# Every dual encoder of the survey whose texts do not end at an [EOT]; those that do are in test_families.py.
READ = [
    "SiglipModel",
    "Siglip2Model (naflex)",
    "AltCLIPModel",
    "ChineseCLIPModel",
    "AlignModel",
    "BlipModel",
    "Tipsv2Model",
    "VisionTextDualEncoder (ViT+BERT)",
]
SPECS = {spec.name: spec for spec in specs()}
each = pytest.mark.parametrize("name", [name for name in READ if name in SPECS])


def own_texts(spec):
    """The texts as the tokenizer pads them: SigLIP's to the full length and without a mask."""
    tokenizer = tokenizer_for(spec.tok, spec.max_length)
    length = {"padding": "max_length"} if spec.tok == "siglip" else {"padding": True}
    texts = tokenizer([TEMPLATE.replace("{}", name) for name in NAMES], return_tensors="pt", **length)
    return {key: value for key, value in texts.items() if key != "token_type_ids"}


def features(model, texts):
    return model.get_text_features(**texts).pooler_output


@each
@torch.no_grad()
def test_class_texts_have_the_models_own_features(name):
    model, spec = SPECS[name].build(), SPECS[name]
    expected = features(model, own_texts(spec))
    texts = class_prompts(NAMES, TEMPLATE, 0, tokenizer_for(spec.tok, spec.max_length), model=model)
    torch.testing.assert_close(encode_texts(model, **texts), expected, atol=1e-4, rtol=1e-4)
    alone = torch.cat([encode_texts(model, **{key: value[k : k + 1] for key, value in texts.items()}) for k in (0, 4)])
    torch.testing.assert_close(alone, expected[[0, 4]], atol=1e-4, rtol=1e-4)


@each
def test_prompts_own_the_first_words(name):
    """Vectors equal to the words that they replace change nothing; others do, in their order, with gradients."""
    spec = SPECS[name]
    base, tokenizer = spec.build(), tokenizer_for(spec.tok, spec.max_length)
    texts = class_prompts(NAMES, TEMPLATE, 2, tokenizer, model=base)
    expected = features(base, texts).detach()
    model = get_peft_model(base, NPTConfig(num_text_tokens=2, text_depth=2)).eval()
    first, deeper = (p for key, p in model.named_parameters() if "ncgeo" in key)
    tower = find_towers(spec.build())["text"]
    words = tokenizer("a photo", add_special_tokens=False).input_ids
    with torch.no_grad():
        first.copy_(getattr(spec.build().get_submodule(tower.embeddings), tower.table).weight[words])
    one = get_peft_model(spec.build(), NPTConfig(num_text_tokens=2)).eval()
    (prompt,) = (p for key, p in one.named_parameters() if "ncgeo" in key)
    with torch.no_grad():
        prompt.copy_(first)
        torch.testing.assert_close(encode_texts(one, **texts), expected, atol=1e-4, rtol=1e-4)
        prompt.copy_(first.flip(0))
        assert not torch.allclose(encode_texts(one, **texts), expected, atol=1e-3)
    encode_texts(model, **texts).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in (first, deeper))
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(encode_texts(model, **texts), expected)


@pytest.mark.parametrize("name", ["SiglipModel", "Siglip2Model (naflex)"])
@torch.no_grad()
def test_texts_that_siglip_was_not_trained_on_are_refused(name):
    """Cut, or with the padding hidden, its features would be others: the cosine is about 0.9."""
    model, tokenizer = SPECS[name].build(), tokenizer_for("siglip", 64)
    ids = class_prompts(NAMES, TEMPLATE, 0, tokenizer, model=model)["input_ids"]
    assert ids.shape == (len(NAMES), 64) == (len(NAMES), max_text_length(model))
    short = class_prompts(NAMES, TEMPLATE, 0, tokenizer)  # written for CLIP
    for texts in (short, {"input_ids": ids, "attention_mask": (ids != 1).long()}):
        with pytest.raises(ValueError, match="64 tokens"):
            encode_texts(model, **texts)
    own, masked = features(model, {"input_ids": ids}), features(model, dict(short))
    assert float(torch.cosine_similarity(own, masked).max()) < 0.999
    with pytest.raises(ValueError, match="pass model"):  # there is no [BOS] behind which CLIP's prompts go
        class_prompts(NAMES, TEMPLATE, 2, tokenizer)
    with pytest.raises(ValueError, match="no special token"):
        class_prompts(NAMES, TEMPLATE, 0, tokenizer_for("clip", 64), model=model)


def test_positions_that_no_token_gets_do_not_count():
    """XLM-R numbers positions from `pad_token_id + 1`."""
    model = SPECS["AltCLIPModel"].build()
    positions = model.text_model.get_submodule("roberta.embeddings").position_embeddings.num_embeddings
    longest = text_tower(model).max_length
    assert longest == max_text_length(model) == positions - 2
    features(model, {"input_ids": torch.full((1, longest), 7), "attention_mask": torch.ones(1, longest)})
    with pytest.raises((IndexError, RuntimeError)):
        features(model, {"input_ids": torch.full((1, longest + 1), 7), "attention_mask": torch.ones(1, longest + 1)})


@torch.no_grad()
def test_scale_and_bias_give_the_models_own_logits():
    for name in ("SiglipModel", "AlignModel", "Tipsv2Model"):
        model, spec = SPECS[name].build(), SPECS[name]
        classifier, images = ZeroShotClassifier(model, processor_for(spec)), tiny_images(6)["image"][:]
        pixels = processor_for(spec).image_processor(images=images, return_tensors="pt")
        logits = model(**pixels, **own_texts(spec)).logits_per_image
        got = classifier.predict_proba(images, NAMES)
        torch.testing.assert_close(got, logits.softmax(-1), atol=1e-4, rtol=1e-4)
        cosines = (logits - (0 if logit_bias(model) is None else logit_bias(model))) / logit_scale(model).exp()
        assert float(cosines.abs().max()) < 1 + 1e-5


def test_siglip_gives_the_pipelines_probabilities(tmp_path):
    spec = SPECS["SiglipModel"]
    model, processor = spec.build(), processor_for(spec)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = tiny_images(50)["image"][:]
    run = pipeline("zero-shot-image-classification", str(tmp_path), image_processor=processor.image_processor)
    found = run(images, candidate_labels=NAMES, hypothesis_template=TEMPLATE)
    expected = torch.tensor([[next(e["score"] for e in row if e["label"] == name) for name in NAMES] for row in found])
    classifier = ZeroShotClassifier(model, processor)
    got = classifier.predict_proba(images, NAMES, activation="sigmoid")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (got.sum(1) - 1).abs().max() > 0.01
    assert classifier.predict(images, NAMES) == [row[0]["label"] for row in found]


def test_a_sigmoid_needs_a_bias():
    spec = SPECS["CLIPModel (eos in config)"]
    classifier = ZeroShotClassifier(spec.build(), processor_for(spec))
    for activation, word in (("sigmoid", "logit_bias"), ("tanh", "activation")):
        with pytest.raises(ValueError, match=word):
            classifier.predict_proba(tiny_images(2)["image"][:], NAMES, activation=activation)
