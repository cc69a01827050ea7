"""The carried demo: what the loader promises, and facts on which the rest of the library's tests rely."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from peft_ncgeo.data.demo import (
    ASSETS,
    FASHION_NAMES,
    VENDORS,
    VIEW_PARAMETERS,
    Demo,
    draw_views,
    load_concepts,
    load_demo,
    load_drawings,
    load_fashion_mnist,
)

MODEL = ASSETS / "mini_clip"


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load_demo()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def names(dataset) -> list[str]:
    return dataset.features["label"].names


def pixels(dataset) -> np.ndarray:
    return np.stack([np.asarray(image) for image in dataset[:]["image"]])


def test_sizes_and_labels(demo):
    assert {part: len(data) for part, data in demo.splits.items()} == {
        "train": 480,
        "validation": 1440,
        "base": 1440,
        "new": 1440,
        "fashion_mnist": 2000,
    }
    for part, data in demo.splits.items():
        counts = np.bincount(data["label"])
        assert counts.tolist() == [len(data) // len(names(data))] * len(names(data)), part
        image = data[0]["image"]
        assert image.mode == "RGB"
        assert image.size == ((28, 28) if part == "fashion_mnist" else (32, 32))
    assert names(demo.splits["train"]) == names(demo.splits["base"])
    assert names(demo.splits["fashion_mnist"]) == list(FASHION_NAMES)
    assert not demo.model.training


def test_concepts_are_distinct_and_disjoint():
    table = load_concepts()
    known = {concept["name"]: row for row, concept in enumerate(table["concepts"])}
    chosen = [name for parts in table["splits"].values() for part in parts.values() for name in part]
    assert set(table["splits"]) == {"report", "development"}
    assert len(chosen) == len(set(chosen)) == 120
    for parts in table["splits"].values():
        assert {part: len(part_names) for part, part_names in parts.items()} == {"base": 30, "new": 30}
        groups = {table["concepts"][known[name]]["group"] for part in parts.values() for name in part}
        assert len(groups) == 5
    for name in chosen:
        assert 1 <= len(name.split()) <= 2
        assert all(known[name] in load_drawings()[vendor] for vendor in VENDORS)


def test_splits_follow_the_name(demo):
    development = load_demo("development", shots=2)
    table = load_concepts()["splits"]
    for part in ("base", "new"):
        assert names(demo.splits[part]) == table["report"][part]
        assert names(development.splits[part]) == table["development"][part]


def test_seeds_decide_the_training_views_only(demo):
    again, other = load_demo(shots=16, seed=1), load_demo(shots=16, seed=2)
    assert (pixels(demo.splits["train"]) == pixels(again.splits["train"])).all()
    same = (pixels(demo.splits["train"]) == pixels(other.splits["train"])).all(axis=(1, 2, 3))
    assert not same.any()
    for part in ("base", "new", "fashion_mnist"):
        assert (pixels(demo.splits[part]) == pixels(other.splits[part])).all()


def views_of(dataset) -> list[tuple[bytes, int]]:
    return [(view.tobytes(), label) for view, label in zip(pixels(dataset), dataset["label"], strict=True)]


def test_one_artist_trains_and_the_other_tests(demo):
    """The artists' images are those of both artists in two parts, and training shows one artist's alone."""
    splits = {artist: load_demo(shots=8, train_artist=artist).splits for artist in VENDORS}
    for part in ("validation", "base", "new"):
        whole = views_of(demo.splits[part])
        for own, artist in enumerate(VENDORS):
            views = [view for i in range(24 * own, len(whole), 48) for view in whole[i : i + 24]]
            assert views_of(splits[artist][part]) == views
            if part != "validation":
                assert views_of(splits[VENDORS[1 - own]][f"{part}_other_artist"]) == views
    names = demo.splits["base"].features["label"].names
    row = {concept["name"]: i for i, concept in enumerate(load_concepts()["concepts"])}[names[3]]
    for vendor, artist in enumerate(VENDORS):
        drawing = np.repeat(load_drawings()[artist][row][None], 24, axis=0)
        drawn = draw_views(drawing, np.random.default_rng([0, 0, row, vendor]).random((24, VIEW_PARAMETERS)))
        assert views_of(splits[artist]["base"])[72:96] == [(view.tobytes(), 3) for view in drawn]
        drawn = draw_views(drawing[:8], np.random.default_rng([1, 1, row, vendor]).random((8, VIEW_PARAMETERS)))
        assert views_of(splits[artist]["train"])[24:32] == [(view.tobytes(), 3) for view in drawn]
        trained = {view for view, _ in views_of(splits[artist]["train"])}
        for part in {*splits[artist]} - {"train", "fashion_mnist"}:
            assert not trained & {view for view, _ in views_of(splits[artist][part])}
    assert list(load_demo(shots=8).splits) == list(demo.splits)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_training_view_is_a_test_view(demo, seed):
    train = {view.tobytes() for view in pixels(load_demo(seed=seed).splits["train"])}
    assert len(train) == 480
    assert not train & {view.tobytes() for view in pixels(demo.splits["base"])}


@pytest.mark.parametrize("shots", [1, 3, 8])
def test_fewer_shots_are_among_the_more(demo, shots):
    few = load_demo(shots=shots).splits["train"]
    assert np.bincount(few["label"]).tolist() == [shots] * 30
    more = {view.tobytes() for view in pixels(demo.splits["train"])}
    assert all(view.tobytes() in more for view in pixels(few))


def test_views_are_a_pure_function():
    drawings = np.stack(list(load_drawings()["twemoji"].values())[:3])
    parameters = np.random.default_rng(0).random((3, VIEW_PARAMETERS))
    views = draw_views(drawings, parameters)
    assert views.shape == (3, 32, 32, 3)
    assert views.dtype == np.uint8
    for i in range(3):
        assert (draw_views(drawings[i : i + 1], parameters[i : i + 1])[0] == views[i]).all()


def test_views_are_the_same_on_any_number_of_threads_which_stays():
    drawings = np.stack(list(load_drawings()["twemoji"].values())[:24])
    parameters = np.random.default_rng(0).random((24, VIEW_PARAMETERS))
    before, views = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with ThreadPoolExecutor(3) as pool:
                views += pool.map(draw_views, [drawings] * 3, [parameters] * 3)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all((view == views[0]).all() for view in views)


PRINT_VIEWS = """
import hashlib
from peft_ncgeo.data.demo import load_test_views

pixels = b"".join(image.tobytes() for image in load_test_views("report", "base")["image"])
print(hashlib.sha256(pixels).hexdigest())
"""


def test_views_are_the_same_on_processors_of_other_makers(demo):
    # MKL takes this path where it does not know the processor; a matrix product then ends in other bits
    environment = {**os.environ, "MKL_CBWR": "COMPATIBLE"}
    other = subprocess.run([sys.executable, "-c", PRINT_VIEWS], env=environment, capture_output=True, check=True)
    assert other.stdout.decode().split()[-1] == hashlib.sha256(pixels(demo.splits["base"]).tobytes()).hexdigest()


@pytest.mark.parametrize("split", ["report", "development"])
@torch.no_grad()
def test_zero_shot_is_well_above_chance(split):
    splits, processor, model = load_demo(split, shots=1)
    for part in ("base", "new", "fashion_mnist"):
        data = splits[part].select(range(0, len(splits[part]), 4))
        prompts = [f"a photo of a {name}." for name in names(data)]
        inputs = processor(text=prompts, images=data[:]["image"], padding=True, return_tensors="pt")
        predicted = model(**inputs).logits_per_image.argmax(dim=1)
        accuracy = (predicted == torch.tensor(data[:]["label"])).float().mean().item()
        assert accuracy > 3 / len(prompts), (part, accuracy)


def test_tokenization(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2, 3)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    assert len(tokenizer) == 2000
    assert len(ids("a photo of a")) == 4
    assert ids("A Photo OF a Red Apple.") == ids("a photo of a") + ids("red apple.")
    assert len(ids("X")) == 1
    assert ids("X X X X red apple.") == 4 * ids("x") + ids("red apple.")
    # 16 context tokens, a name and a full stop leave room for both ends of every text.
    chosen = [name for parts in load_concepts()["splits"].values() for part in parts.values() for name in part]
    for name in [*chosen, *FASHION_NAMES]:
        text = tokenizer("X " * 16 + f"{name}.").input_ids
        assert text[0] == 2
        assert text[-1] == 3
        assert len(text) <= 32 == tokenizer.model_max_length
        assert tokenizer.unk_token_id not in text


@torch.no_grad()
def test_text_features_do_not_depend_on_padding(demo):
    tokenizer = demo.processor.tokenizer
    assert demo.model.config.text_config.eos_token_id == 3
    text = "a photo of a red panda."
    short = tokenizer(text, return_tensors="pt")
    padded = tokenizer(text, return_tensors="pt", padding="max_length", max_length=32)
    features = [demo.model.get_text_features(**inputs).pooler_output for inputs in (short, padded)]
    torch.testing.assert_close(*features)
    hidden = demo.model.text_model(**padded).last_hidden_state
    end = padded.input_ids[0].tolist().index(3)
    torch.testing.assert_close(features[1], demo.model.text_projection(hidden[:, end]))


@pytest.mark.parametrize(
    "loader",
    [CLIPModel, AutoModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection],
    ids=lambda c: c.__name__,
)
def test_every_loader_gives_float32(loader):
    model = loader.from_pretrained(MODEL)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_processor_loads_on_its_own():
    processor = CLIPProcessor.from_pretrained(MODEL)
    images = [np.zeros((28, 28, 3), np.uint8), np.zeros((50, 40, 3), np.uint8)]
    assert processor(images=images, return_tensors="pt")["pixel_values"].shape == (2, 3, 32, 32)


def test_calls_do_not_share_what_can_be_changed():
    first = load_demo(shots=1)
    first.model.logit_scale.data.zero_()
    first.splits["base"].set_transform(lambda rows: {"label": rows["label"]})
    second = load_demo(shots=1)
    assert second.model.logit_scale.item() != 0
    assert set(second.splits["base"][0]) == {"image", "label"}


def test_fashion_mnist_slice():
    images, labels = load_fashion_mnist("train")
    assert images.shape == (3000, 28, 28)
    assert np.bincount(labels).tolist() == [300] * 10


def test_assets_are_small_readable_and_licensed():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)
    notice = (ASSETS / "NOTICE").read_text(encoding="utf-8")
    for source in (
        "Twemoji",
        "EmojiOne",
        "CC-BY 4.0",
        "Noto Emoji",
        "Fluent Emoji",
        "emojibase",
        "Zalando",
        "Unicode",
    ):
        assert source in notice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, r"split must be one of \['development', 'report'\], got 'test'"),
        ({"shots": 0}, "shots must be a whole number of at least 1, got 0"),
        ({"shots": 2.5}, "shots must be a whole number of at least 1, got 2.5"),
        ({"train_artist": "noto"}, r"train_artist must be one of \['emojione', 'twemoji'\] or None, got 'noto'"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_bad_input_gets_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_demo(**arguments)
    assert "\n" not in str(caught.value)
