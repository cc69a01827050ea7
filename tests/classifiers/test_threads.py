"""Eight threads on one model get what one thread gets, and leave nothing behind that a later call would meet."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from weakref import ref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification

from peft_ncgeo import AdaptFormerConfig, CoPAConfig, NPTConfig, PrototypeConfig, ZeroShotClassifier, adapt
from peft_ncgeo.classifiers.text_cache import TextFeatureCache
from peft_ncgeo.hub import export_classifier
from peft_ncgeo.training import align_classifier

from ..conftest import NAMES, pixels, texts, tiny_clip, tiny_images, tiny_processor, tiny_vit, tiny_vit_classifier

IMAGES = tiny_images(12)["image"][:]
LISTS = [[f"{a} {b}" for b in ("cat", "dog", "bird")] for a in ("red", "green", "blue", "black", "white", "tree")]
pytestmark = [pytest.mark.filterwarnings("ignore:The head belongs", "ignore:Slots 1"), pytest.mark.slow]


@pytest.fixture(autouse=True)
def threads_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def check(ask, questions, restart=lambda: None):
    """Compare the answers of eight threads with those of one; `restart` makes what is asked as good as new."""
    restart()
    expected = [ask(question) for question in questions]
    for _ in range(4):
        restart()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, questions))
        again = [ask(question) for question in questions]
        for one, threaded, later in zip(expected, found, again, strict=True):
            torch.testing.assert_close(threaded, one, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(later, one, atol=1e-5, rtol=1e-5)


def prompted(model=None, config=None):
    torch.manual_seed(0)
    config = config or NPTConfig(num_text_tokens=2, num_vision_tokens=2, text_depth=3, vision_depth=3)
    model = get_peft_model(model or tiny_clip(), config)
    for name, parameter in model.named_parameters():
        if "ncgeo" in name:
            parameter.data.normal_(0, 0.5)
    return model.eval()


@pytest.mark.parametrize("train", [False, True])
def test_zero_shot_classifier(train):
    model, processor, made = prompted(), tiny_processor(), {}

    def restart():
        model.train(train)
        made["classifier"] = ZeroShotClassifier(model, processor)

    check(
        lambda asked: made["classifier"].predict_proba(IMAGES[asked[0]], asked[1]),
        list(product(range(4), LISTS)),
        restart,
    )


@torch.no_grad()
def test_plain_passes_under_prompts():
    model, lists = prompted(), [texts(2, classes=k) for k in range(2, 8)]

    def ask(i):
        image = model.get_image_features(pixel_values=pixels(2, seed=i)).pooler_output
        text = model.get_text_features(**lists[i % len(lists)]).pooler_output
        return image, text, model(pixel_values=pixels(2, seed=i), **lists[i % len(lists)]).logits_per_image

    with torch.inference_mode():
        check(lambda i: torch.cat([part.flatten() for part in ask(i)]), range(24))


CLASSIFIERS = {
    "clip": lambda: (prompted(), tiny_processor()),
    "vit": lambda: (tiny_vit_classifier(), tiny_processor().image_processor),
    "lora_head": lambda: (
        get_peft_model(tiny_vit_classifier(), LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"])),
        tiny_processor().image_processor,
    ),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_aligned_classifier(name):
    model, processor = CLASSIFIERS[name]()
    model.train()
    aligned = align_classifier(model, tiny_images(20), 0.5, processor)
    assert model.training

    def ask(i):
        found = torch.tensor([NAMES.index(name) for name in aligned.predict(IMAGES[i : i + 2])])
        return torch.cat([found.float(), aligned.predict_proba(IMAGES[i : i + 2]).flatten()])

    check(ask, list(range(10)) * 2)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "config", [None, CoPAConfig(), CoPAConfig(residual_adapters=True)], ids=["plain", "heads", "maps"]
)
def test_few_shot_classifiers_of_one_backbone(config):
    """Two classifiers, each with weights of its own, in the same threads; a backbone in training mode."""
    model = tiny_vit() if config is None else get_peft_model(tiny_vit(), config)
    settings = {"steps": 3, "lr": 0.05, "adapter_lr": 20.0, "processor": tiny_processor()}
    first, second = (adapt(model, pixels(6, seed=seed), [0, 1, 2, 2, 1, 0], **settings) for seed in (1, 2))
    model.train()
    check(
        lambda asked: (first, second)[asked[0]].predict_proba(pixels(2, seed=asked[1])),
        list(product(range(2), range(5))),
    )
    assert all(module.training for module in model.modules())


@torch.no_grad()
def test_a_model_under_prototypes():
    model = prompted(tiny_vit_classifier(), PrototypeConfig(projection_dim=8, num_vision_tokens=2))
    check(lambda i: model(pixel_values=pixels(2, seed=i)).logits, range(24))


@torch.no_grad()
def test_a_model_under_bottleneck_adapters():
    model = prompted(tiny_vit_classifier(), AdaptFormerConfig(bottleneck_dim=4))
    check(lambda i: model(pixel_values=pixels(2, seed=i)).logits, range(24))


def test_exported_model(tmp_path):
    folder = export_classifier(prompted(), NAMES, tmp_path / "exported", tiny_processor())
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        check(lambda i: model(pixels(2, seed=i)).logits, range(24))


# ---- what is kept of texts ----------------------------------------------------------------------------------------


def test_a_list_of_names_is_encoded_once_whoever_asks():
    known, encoded = TextFeatureCache(), []

    def ask(i):
        names = ("cat", str(i % 3))
        return known.get(names, nn.Identity(), (), lambda: encoded.append(names) or torch.full((2, 1), float(i % 3)))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(60)))
    assert sorted(encoded) == [("cat", "0"), ("cat", "1"), ("cat", "2")]
    assert [int(features[0]) for features in found] == [i % 3 for i in range(60)]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_what_could_not_be_encoded_is_not_kept(kind):
    known, answers = TextFeatureCache(), iter([kind("no"), torch.ones(1)])

    def encode():
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    with pytest.raises(kind):
        known.get(("cat",), nn.Identity(), (), encode)
    assert known.get(("cat",), nn.Identity(), (), encode) == 1


@pytest.mark.parametrize("width", [4096, 16384])
def test_few_lists_are_kept(width):
    """Of 300 lists of 1,000 names no more than 512 MiB; the last one is among them, and so are small ones."""
    known, held = TextFeatureCache(), []

    def features():
        made = torch.zeros(1).expand(1000, width)
        held.append(ref(made))
        return made

    for i in range(300):
        names = tuple(f"{i} {k}" for k in range(1000))
        found = known.get(names, nn.Identity(), (), features)
        assert known.get(names, nn.Identity(), (), lambda: torch.ones(1)) is found
    alive = sum(tensor().nbytes for tensor in held if tensor() is not None)
    assert 2**28 < alive <= 2**29
    small = [known.get((str(i),), nn.Identity(), (), lambda: torch.zeros(1, width)) for i in range(100)]
    assert known.get(("99",), nn.Identity(), (), features) is small[-1]
    del found
    assert sum(tensor() is not None for tensor in held) == 0


def test_a_hundred_thousand_names_stay_beside_short_lists():
    known, names = TextFeatureCache(), tuple(map(str, range(100_000)))
    found = known.get(names, nn.Identity(), (), lambda: torch.zeros(1).expand(100_000, 1024))
    for i in range(20):
        known.get(("cat", str(i)), nn.Identity(), (), lambda: torch.zeros(2, 1024))
    assert known.get(names, nn.Identity(), (), lambda: torch.ones(1)) is found


def test_a_list_that_is_larger_than_all_that_is_kept():
    known, names = TextFeatureCache(), tuple(map(str, range(100)))
    found = known.get(names, nn.Identity(), (), lambda: torch.zeros(1).expand(100, 2**21))
    assert known.get(names, nn.Identity(), (), lambda: torch.ones(1)) is found
