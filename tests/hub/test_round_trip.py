"""A model pushed over HTTP gives the same outputs, bit for bit, in another process with another cache."""

from __future__ import annotations

import ast
import json
import math
import re

import pytest

from .test_hub_errors import one_line
from .tuned import CLIP, IMAGES, KINDS, NEW, THREE

pytestmark = pytest.mark.slow

TEXT_KINDS = ("trained", "prompts", "lora")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
modes = pytest.mark.parametrize("lfs", [False, True], ids=["regular", "lfs"])


def softmax(row: list[float]) -> list[float]:
    exponents = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponents) for value in exponents]


# Ways to load


@modes
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_says_the_same(hub, pushed, reader, kind, lfs):
    repo_id, said = pushed[kind, lfs]
    files = hub.repos[repo_id].at("main").files
    assert files[WEIGHTS].lfs == lfs
    assert len(hub.commits(repo_id)) == 2  # the repository, and all the files in one commit
    assert reader.run(f"result = tuned.answers(tuned.load({kind!r}, {repo_id!r}))") == said


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_far_from_its_base(pushed, author, kind):
    """So that an adapter left out would be noticed above."""
    name = {"head": "VIT", "prototypes": "VIT", "copa": "BACKBONE"}.get(kind, "CLIP")
    base = author.run(f"result = tuned.answers(tuned.base(tuned.{name}))")
    said = pushed[kind, False][1]
    assert base.keys() <= said.keys()
    assert all(base[key] != said[key] for key in base)


@modes
@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_zero_shot_classifier_finds_processor_and_new_names(hub, pushed, reader, kind, lfs):
    repo_id, said = pushed[kind, lfs]
    got = reader.run(f"""
    classifier = ZeroShotClassifier.from_pretrained({repo_id!r})
    result = classifier.predict_proba(tuned.IMAGES, tuned.NEW).tolist()
    """)
    assert got == said["probabilities"]
    assert {"processor_config.json", "tokenizer.json", "tokenizer_config.json"} <= hub.files(repo_id).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_alone(pushed, reader, kind):
    repo_id, said = pushed[kind, False]
    got = reader.run(f"result = tuned.answers(tuned.plain({kind!r}, {repo_id!r}))")
    assert got
    assert got == {key: said[key] for key in got}


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_transformers_alone(pushed, reader, kind):
    repo_id, said = pushed[kind, True]
    assert reader.run(f"result = tuned.answers(tuned.aligned(CLIPModel.from_pretrained({repo_id!r})))") == said


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_zero_shot_pipeline(pushed, reader, kind):
    repo_id, said = pushed[kind, False]
    got = reader.run(f"""
    classify = pipeline("zero-shot-image-classification", model={repo_id!r})
    template = hypothesis_template({repo_id!r})
    found = classify(tuned.IMAGES, candidate_labels=tuned.NEW, hypothesis_template=template)
    result = tuned.scores(found, tuned.NEW)
    """)
    assert len(got) == len(IMAGES)
    for row, expected in zip(got, said["probabilities"], strict=True):
        assert row == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("kind", "names"), [("head", THREE), ("prototypes", ["LABEL_0", "LABEL_1", "LABEL_2"])])
def test_image_pipeline_gives_the_names(hub, pushed, author, reader, kind, names):
    """The base's head has five outputs; names and number of classes come with the adapter."""
    repo_id, _ = pushed[kind, False]
    assert json.loads(hub.files(repo_id)["class_names.json"]) == names
    code = f"""
    from transformers import AutoImageProcessor
    model, processor = tuned.load({kind!r}, {repo_id!r}), AutoImageProcessor.from_pretrained({repo_id!r})
    pixels = processor(images=tuned.IMAGES, return_tensors="pt")["pixel_values"]
    with tuned.torch.no_grad():
        result = [model(pixel_values=pixels).logits.tolist()]
    """
    expected = author.run(code)[0]
    logits, found = reader.run(f"""{code}
    classify = pipeline("image-classification", model=model, image_processor=processor)
    result.append(tuned.scores(classify(tuned.IMAGES), {names!r}))
    """)
    assert logits == expected
    for row, of_image in zip(found, expected, strict=True):
        assert row == pytest.approx(softmax(of_image), abs=1e-6)


# The card's snippets


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.split("## Use it")[1].split("\n## ")[0], flags=re.DOTALL)


def printed(out: str) -> list:
    """Return the last list that a snippet printed."""
    return ast.literal_eval([line for line in out.splitlines() if line.startswith("[")][-1])


@pytest.mark.parametrize(
    ("kind", "count", "expected"),
    [
        ("trained", 2, "ZeroShotClassifier(model, tuned.tiny_processor()).predict(image, tuned.THREE)"),
        ("lora", 2, "ZeroShotClassifier(model, tuned.tiny_processor()).predict(image, ['cat', 'dog'])"),
        ("copa", 1, "FewShotClassifier.from_pretrained(repo_id).predict([image])"),
        ("head", 1, "[tuned.THREE[int(model(pixel_values=pixels(image)).logits.argmax())]]"),
    ],
)
def test_snippets_run_as_written(hub, pushed, author, reader, kind, count, expected):
    repo_id, _ = pushed[kind, False]
    codes = snippets(hub.files(repo_id)["README.md"].decode())
    assert len(codes) == count
    assert all(code.startswith("import peft_ncgeo\n") for code in codes)
    for user in (author, reader):
        user.run("tuned.IMAGES[1].save('image.png')")
    best = author.run(f"""
    repo_id, image = {repo_id!r}, tuned.IMAGES[1]
    model = tuned.load({kind!r}, repo_id)
    pixels = lambda image: tuned.tiny_processor().image_processor(images=image, return_tensors="pt")["pixel_values"]
    result = {expected}
    """)
    reader.run(codes[0])
    first = printed(reader.out)
    if kind == "head":
        first = [answer["label"] for answer in first]
        assert sorted(first) == sorted(THREE)
        first = first[:1]
    assert first == best
    if count == 2:
        reader.run(codes[1])
        assert printed(reader.out)[0]["label"] == best[0]


def test_a_process_that_knows_nothing_else(hub, pushed, reader):
    """The card's first snippet and PEFT alone, where `import peft_ncgeo` is all that was said of the package."""
    repo_id, said = pushed["trained", True]
    for i, image in enumerate(IMAGES):
        image.save(reader.work / f"{i}.png")
    IMAGES[0].save(reader.work / "image.png")
    code = snippets(hub.files(repo_id)["README.md"].decode())[0]
    out = reader.fresh(f"""
{code}
from peft import PeftModel
from transformers import CLIPModel
model = PeftModel.from_pretrained(CLIPModel.from_pretrained({CLIP!r}), {repo_id!r}).eval()
again = peft_ncgeo.ZeroShotClassifier(model, classifier.processor)
result = again.predict_proba([Image.open(f"{{i}}.png") for i in range({len(IMAGES)})], {NEW!r}).tolist()
""")
    assert out == said["probabilities"]
    assert printed(reader.out)[0] in THREE


# Which adapter, which revision, which base


def test_files_lie_at_the_root_whatever_the_adapter_is_called(hub, pushed):
    for kind in ("prompts", "copa"):  # adapters "second" and "birds"
        files = hub.files(pushed[kind, False][0])
        assert {CONFIG, WEIGHTS, "README.md"} <= files.keys()
        assert not any("/" in path for path in files)


def test_the_active_adapter_is_pushed(author, hub, reader):
    said = author.run("""
    model = tuned.far(tuned.get_peft_model(tuned.base(tuned.CLIP), tuned.NPTConfig(num_text_tokens=2)))
    model.add_adapter("other", tuned.NPTConfig(num_text_tokens=3))
    model.set_adapter("other")
    tuned.far(model)
    push_adapter(model, "active")
    result = tuned.answers(model)
    """)
    assert json.loads(hub.files("user/active")[CONFIG])["num_text_tokens"] == 3
    assert reader.run("result = tuned.answers(load_adapter('user/active'))") == said


def test_an_earlier_commit_by_its_hash(author, hub, reader):
    said = author.run("""
    model, result = tuned.push("lora", "user/twice"), []
    for _ in range(2):
        tuned.far(model)
        commit = push_adapter(model, "user/twice", commit_message="Train longer")
        result.append([commit.oid, tuned.answers(model)])
    """)
    assert [commit.title for commit in hub.commits("user/twice")][2:] == ["Train longer"] * 2
    for sha, expected in [*said, (None, said[-1][1])]:
        assert reader.run(f"result = tuned.answers(load_adapter('user/twice', revision={sha!r}))") == expected
    assert said[0][1] != said[1][1]


def test_a_branch_of_its_own(author, hub, reader):
    said = author.run("""
    model = tuned.push("lora", "user/branches")
    result = [tuned.answers(model)]
    push_adapter(tuned.far(model), "user/branches", revision="longer")
    result.append(tuned.answers(model))
    """)
    for revision, expected in zip(("main", "longer"), said, strict=True):
        assert reader.run(f"result = tuned.answers(load_adapter('user/branches', revision={revision!r}))") == expected


def test_another_base_by_name_and_by_module(hub, pushed, author, reader):
    repo_id, said = pushed["prompts", False]
    author.run("""
    tuned.torch.manual_seed(9)
    CLIPModel(tuned.tiny_clip().config).push_to_hub("user/other-clip")
    """)
    ways = reader.run(f"""
    other = lambda: CLIPModel.from_pretrained("user/other-clip")
    loaded = [
        tuned.PeftModel.from_pretrained(other(), {repo_id!r}),
        load_adapter({repo_id!r}, base_model="user/other-clip"),
        load_adapter({repo_id!r}, base_model=other()),
        ZeroShotClassifier.from_pretrained({repo_id!r}, "user/other-clip").model,
    ]
    result = [tuned.answers(model) for model in loaded]
    """)
    assert ways[0] != said
    assert all(way == ways[0] for way in ways)


def test_a_base_that_others_lack_is_refused(hub, author):
    author.run("""
    tuned.tiny_clip().save_pretrained("of-mine")
    import os
    config = tuned.NPTConfig(num_text_tokens=2)
    local = tuned.get_peft_model(CLIPModel.from_pretrained("of-mine"), config)
    absolute = tuned.get_peft_model(CLIPModel.from_pretrained(os.path.abspath("of-mine")), config)
    nowhere = tuned.get_peft_model(tuned.tiny_clip(), config)
    """)
    for model, said in (("local", "the folder 'of-mine'"), ("absolute", "the folder 'of-mine'"), ("nowhere", "")):
        message = one_line(author, f"push_adapter({model}, 'user/never')", "ValueError", said, "base_model_id")
        assert str(author.work) not in message
    for name in ("user/missing", "of-mine", "not/an/id"):
        code = f"push_adapter(local, 'user/never', base_model_id={name!r})"
        one_line(author, code, "ValueError", f"base_model_id={name!r}", "push it as a repository of its own")
    assert "user/never" not in hub.repos
    author.run(f"push_adapter(local, 'user/mended', base_model_id={CLIP!r})")
    assert json.loads(hub.files("user/mended")[CONFIG])["base_model_name_or_path"] == CLIP


def test_a_private_repository_needs_the_token(hub, author, reader):
    said = author.run("""
    model = tuned.push("lora", "user/hidden", private=True)
    result = tuned.answers(model)
    """)
    assert hub.repos["user/hidden"].private
    one_line(reader, "load_adapter('user/hidden')", "OSError", "user/hidden", "no valid token")
    assert reader.run(f"result = tuned.answers(load_adapter('user/hidden', token={hub.token!r}))") == said


def test_few_shot_over_a_backbone_with_a_head(hub, author, reader):
    """The head's classes are not those of the classifier, so `class_names.json` would be wrong."""
    said = author.run("""
    model = tuned.get_peft_model(tuned.base(tuned.VIT), tuned.CoPAConfig())
    classifier = tuned.few_shot(model)
    push_adapter(classifier, "user/few-shot-head")
    result = tuned.answers(classifier)
    """)
    assert "class_names.json" not in hub.files("user/few-shot-head")
    got = reader.run("result = tuned.answers(FewShotClassifier.from_pretrained('user/few-shot-head'))")
    assert got == said


def test_few_shot_reads_images_as_its_own_processor_does(hub, author, reader):
    """Also where the base model came without one."""
    hub.add("other/bare", {k: v for k, v in hub.files("user/tiny-backbone").items() if "processor" not in k})
    said = author.run("""
    model = tuned.get_peft_model(tuned.ViTModel.from_pretrained("other/bare"), tuned.CoPAConfig())
    classifier = tuned.few_shot(model, tuned.tiny_processor().image_processor)
    push_adapter(classifier, "user/own-processor")
    result = tuned.answers(classifier)
    """)
    got = reader.run("result = tuned.answers(FewShotClassifier.from_pretrained('user/own-processor'))")
    assert got == said


def test_a_saved_folder_still_knows_its_base(author):
    """`save_adapter` without an id keeps what PEFT wrote."""
    author.run("""
    from peft_ncgeo.hub import save_adapter
    model = tuned.push("lora", "user/saved")
    save_adapter(model, "saved")
    assert tuned.answers(load_adapter("saved")) == tuned.answers(model)
    """)
