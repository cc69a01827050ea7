"""Many names: in chunks they have the features that they have together, and the best few need no (N, K) matrix."""

from __future__ import annotations

from itertools import islice, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_ncgeo import NPTConfig, ZeroShotClassifier
from peft_ncgeo.classifiers.best_names import best_names
from peft_ncgeo.data import class_prompts
from peft_ncgeo.models import encode_texts

from ..conftest import NAMES, WORDS, tiny_clip, tiny_images, tiny_processor
from ..models.survey.inputs import TEMPLATE, tokenizer_for
from ..models.survey.tries import specs

IMAGES = tiny_images(7)["image"][:]
SPECS = {spec.name: spec for spec in specs()}
# 530 names of one to three words: two whole chunks and a short third one, whose texts are longest
MANY = [" ".join(words) for n in (1, 2, 3) for words in product(WORDS[5:17], repeat=n)][:530]


def tuned(config):
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


MODELS = {
    "plain": (tiny_clip, 0),
    "prompts": (lambda: tuned(NPTConfig(num_text_tokens=2, text_depth=2)), 2),
    "prompts, not packed": (lambda: tuned(NPTConfig(num_text_tokens=2, text_depth=2, pack_text=False)), 2),
    "lora": (lambda: tuned(LoraConfig(target_modules=["q_proj", "v_proj"])), 0),
    "SiglipModel": (lambda: SPECS["SiglipModel"].build(), 0),
    "BlipModel": (lambda: SPECS["BlipModel"].build(), 0),
}


@pytest.mark.filterwarnings("ignore:.*BlipModel. is going to be deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_chunks_have_the_features_of_one_piece(name):
    build, slots = MODELS[name]
    model, tokenizer = build(), tiny_processor().tokenizer
    if name in SPECS:
        tokenizer = tokenizer_for(SPECS[name].tok, SPECS[name].max_length)
    classifier = ZeroShotClassifier(model, SimpleNamespace(tokenizer=tokenizer, image_processor=None), TEMPLATE)
    texts = class_prompts(MANY, TEMPLATE, slots, tokenizer, model=model)
    found = classifier.text_features(MANY)
    torch.testing.assert_close(found, encode_texts(model, **texts), atol=2e-5, rtol=1e-4)
    assert classifier.text_features(MANY) is found
    few = [3, 255, 256, 400, 529]  # of every chunk, in a list of their own
    torch.testing.assert_close(classifier.text_features([MANY[i] for i in few]), found[few], atol=2e-5, rtol=1e-4)


def test_a_damaged_name_of_a_later_chunk_is_named():
    model = MODELS["prompts, not packed"][0]()  # a row of several texts is damaged as a whole
    with torch.no_grad():
        model.get_base_model().text_model.embeddings.token_embedding.weight[5 + WORDS.index("fish")] = torch.nan
    names = [*[name for name in MANY if "fish" not in name][:300], "white fish", "fish"]
    with pytest.raises(ValueError, match="class 'white fish' are not finite"):
        ZeroShotClassifier(model, tiny_processor()).text_features(names)


@pytest.mark.parametrize(("images", "names", "k"), [(1, 3, 2), (5, 17, 17), (64, 140_003, 6), (1, 4_200_000, 3)])
def test_best_of_blocks(images, names, k):
    """Against a softmax over all names in float64; the last two have three blocks."""
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.randn(n, 2, generator=generator) for n in (names, images))
    logits = (image @ text.T).double()
    expected = logits.softmax(1).topk(k)
    values, numbers, probabilities = best_names(lambda part: image @ part.T, text, images, k)
    torch.testing.assert_close(probabilities.double(), expected.values, rtol=1e-4, atol=0)
    torch.testing.assert_close(values.double(), logits.topk(k).values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.gather(1, numbers), logits.topk(k).values, rtol=1e-6, atol=1e-6)
    assert all(len(set(row)) == k for row in numbers.tolist())


@pytest.mark.parametrize("views", [1, 5])
def test_top_names_are_those_of_the_probabilities(views):
    classifier = ZeroShotClassifier(tuned(NPTConfig(num_text_tokens=2, num_vision_tokens=2)), tiny_processor())
    found = classifier.top_k(IMAGES, MANY, k=4, batch_size=3, num_test_views=views)
    best = classifier.predict_proba(IMAGES, MANY, num_test_views=views).topk(4)
    assert [[name for name, _ in row] for row in found] == [[MANY[i] for i in row] for row in best.indices.tolist()]
    np.testing.assert_allclose([[p for _, p in row] for row in found], best.values, rtol=1e-4)
    assert classifier.predict(IMAGES, MANY, 3, views) == [row[0][0] for row in found]
    assert len(classifier.top_k(IMAGES[0], NAMES)) == 1
    assert classifier.top_k([], NAMES) == []


def test_all_names_where_there_are_fewer_than_k():
    found = ZeroShotClassifier(tiny_clip(), tiny_processor()).top_k(IMAGES, NAMES[:3])
    assert [sorted(name for name, _ in row) for row in found] == [sorted(NAMES[:3])] * len(IMAGES)
    assert [sum(p for _, p in row) for row in found] == pytest.approx([1] * len(IMAGES))


def test_what_is_refused():
    classifier = ZeroShotClassifier(tiny_clip(), tiny_processor())
    for arguments in ({"k": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            classifier.top_k(IMAGES, NAMES, **arguments)
    with torch.no_grad():
        classifier.model.logit_scale.fill_(torch.inf)
    for call in (classifier.predict, classifier.top_k):
        with pytest.raises(ValueError, match="image 0.*not finite"):
            call(IMAGES, NAMES)


def test_texts_of_several_calls_of_the_tokenizer():
    """Padded as the tokenizer pads them, and two equal texts are found however far apart."""
    tokenizer = tiny_processor().tokenizer
    names = list(islice((" ".join(words) for n in (1, 2, 3, 4) for words in product(WORDS[5:17], repeat=n)), 2100))
    own = tokenizer([TEMPLATE.replace("{}", name) for name in names], padding=True, return_tensors="pt")
    texts = class_prompts(names, TEMPLATE, 2, tokenizer)
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(texts[key], own[key])
    with pytest.raises(ValueError, match="Duplicate class names: 'red' and 'RED'"):
        class_prompts([*names[1:], "RED"], TEMPLATE, 2, tokenizer)
