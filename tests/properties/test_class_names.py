"""Class names in any script and of any kind: texts that hold every one of them whole, or a refusal that names one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import event, example, given
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import CLIPProcessor

from peft_ncgeo import NPTConfig, ZeroShotClassifier
from peft_ncgeo.data import EpisodeSampler, class_counts, class_prompts, few_shot
from peft_ncgeo.data.demo import ASSETS
from peft_ncgeo.models.templates import padded_template

from ..conftest import WORDS, tiny_clip, tiny_images, tiny_processor
from ..profiles import cases
from ..training.runs import lora_clip, trainer
from .outcomes import said_well

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
TOKENIZERS = {
    "words": tiny_processor().tokenizer,
    "bytes": CLIPProcessor.from_pretrained(ASSETS / "mini_clip").tokenizer,
}
WITHOUT_SURROGATES = st.characters(exclude_categories=["Cs"])
ODD = ["", " ", "_", "\n", "\x00", "\u200b", "\u202ex", "e\u0301", "\ufeff", "<eos>", "a <bos>", "<|endoftext|>", "{}"]

good = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)
names = st.text(WITHOUT_SURROGATES, max_size=8) | good | st.sampled_from(ODD)
long_names = st.lists(st.sampled_from(WORDS), min_size=3, max_size=90).map(" ".join)
anything = names | long_names | st.none() | st.integers() | st.binary(max_size=3) | st.floats() | st.just("\ud800")
templates = (
    st.sampled_from(["a photo of a {}.", "{}", "the{}", "{} {}", "{}\n<eos>"]) | names.map("{{}} {}".format) | anything
)


right = {
    "given": st.lists(good | st.text(WITHOUT_SURROGATES, min_size=1), min_size=1, max_size=4, unique=True),
    "template": st.just("a photo of a {}."),
    "slots": st.integers(0, 6),
    "max_length": st.none(),
}
wild = {
    "given": st.lists(good | names, max_size=6, unique=True) | st.lists(anything, max_size=4) | anything,
    "template": templates,
    "slots": st.sampled_from([-1, 13, 10**12, True, 1.5, None, "4"]),
    "max_length": st.sampled_from([0, 7, 77, 10**9, "9"]),
}


@cases(4)
@given(data=st.data(), odd=st.sampled_from(["none", "given", *wild]), tokenizer=st.sampled_from(sorted(TOKENIZERS)))
def test_texts_hold_every_name_or_one_is_refused(data, odd, tokenizer):
    """Words of any script; one argument at most is of any kind."""
    drawn = {name: data.draw((wild if name == odd else right)[name], name) for name in right}
    given, template, slots, max_length = drawn.values()
    read = TOKENIZERS[tokenizer]
    found = said_well(lambda: class_prompts(given, template, slots, read, max_length))
    event(f"taken: {found is not None}")
    if found is None:
        return
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)]
    whole = padded_template(template, slots, read)
    assert rows == [read(whole.replace("{}", name.replace("_", " "))).input_ids for name in given]
    assert len(set(map(tuple, rows))) == len(given)
    for name, row in zip(given, rows, strict=True):
        assert len(row) <= (read.model_max_length if max_length is None else max_length)
        # the model reads up to the first end, and from slot n + 1 on
        assert row.index(read.eos_token_id) == len(row) - 1
        assert row[1 : 1 + slots] == rows[0][1 : 1 + slots]
        assert len(row) > len(read(whole.replace("{}", "")).input_ids) or name


@pytest.fixture(scope="module")
def classifier() -> ZeroShotClassifier:
    torch.manual_seed(0)
    return ZeroShotClassifier(get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=4)), tiny_processor())


IMAGES = tiny_images(2)["image"][:]
KINDS = {
    "list": list,
    "tuple": tuple,
    "generator": iter,
    "array": lambda given: np.array(given, dtype=object),
    "set": set,
    "dict": lambda given: dict.fromkeys(given, 1),
    "text": " ".join,
    "nothing": lambda given: None,
}


@cases(2)
@given(
    given=st.lists(good, min_size=2, max_size=5, unique=True) | st.lists(good | names, max_size=5),
    kind=st.sampled_from(["list", *KINDS]),
    size=st.integers(-1, 3),
)
@example(given=["cat", "dog"], kind="set", size=1)
def test_every_name_has_its_own_probability(classifier, given, kind, size):
    """Any container of names works; the share of each of two names does not depend on its position."""
    found = said_well(lambda: classifier.predict_proba(IMAGES, KINDS[kind](given), batch_size=size))
    best = said_well(lambda: classifier.predict(IMAGES, KINDS[kind](given), batch_size=size))
    assert (found is None) == (best is None)
    event(f"taken: {found is not None}")
    if found is None:
        return
    assert found.shape == (2, len(given))
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert best == [given[i] for i in found.argmax(1)]
    turned = classifier.predict_proba(IMAGES, given[::-1]).flip(1)
    torch.testing.assert_close(turned, found, atol=1e-5, rtol=1e-4)


@cases(0.5)
@given(given=st.lists(good | names, min_size=1, max_size=4, unique=True))
def test_a_trainer_takes_names_or_refuses_one(tmp_path_factory, model, given):
    images = tiny_images(len(given) * 2, [f"class {i}" for i in range(len(given))])
    images = images.cast_column("label", ClassLabel(names=given))
    run = said_well(lambda: trainer(tmp_path_factory.getbasetemp(), model, train=images))
    if run is not None:
        assert run.class_names == given
        assert len(run.task.texts(given)["input_ids"]) == len(given)


@pytest.fixture(scope="module")
def model():
    return lora_clip()


def counted(classes: int, each: int) -> Dataset:
    feature = ClassLabel(names=[f"class {i}" for i in range(classes)])
    rows: dict[str, Any] = {"label": np.arange(classes).repeat(each), "row": np.arange(classes * each)}
    return Dataset.from_dict(rows, features=Features({"label": feature, "row": Value("int64")}))


@pytest.mark.slow
def test_twenty_thousand_classes():
    many = counted(20_000, 2)
    assert (class_counts(many) == 2).all()
    episode = EpisodeSampler(many, ways=50, shots=1)[0]
    assert (episode.support // 2 == episode.classes).all()
    some = few_shot(counted(5_000, 2), 1)
    assert some["label"][:] == list(range(5_000))
    rows = class_prompts([f"{i}" for i in range(20_000)], "a {}.", 2, TOKENIZERS["bytes"])["input_ids"]
    assert len(rows) == 20_000
