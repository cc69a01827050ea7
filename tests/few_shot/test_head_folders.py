"""The folder of a head on cached features: it comes back in a fresh process, and bad ones are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from peft_ncgeo import CoPAConfig, FewShotClassifier, ZeroShotClassifier, adapt
from peft_ncgeo.hub import save_adapter
from peft_ncgeo.hub.few_shot_record import record_few_shot

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_vit
from ..errors import message
from ..launching import launch_script
from .test_cached import HEADS, LABELS, OTHERS, PICTURES, PROCESSOR, fitted, lora, siglip, siglip_processor

HEAD = "head.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, classifier = tmp_path_factory.mktemp("saved"), fitted(HEADS["tip"], template="the {}.")
    classifier.save_pretrained(folder / "head")
    return folder / "head", classifier


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    (tmp_path / HEAD).write_bytes((saved[0] / HEAD).read_bytes())
    return tmp_path


def load(folder, model=None, processor=PROCESSOR):
    return FewShotClassifier.from_pretrained(folder, model or tiny_clip(), processor)


@pytest.mark.parametrize("name", HEADS)
def test_round_trip(name, tmp_path):
    """To the last bit, settings, names and template included; and once more."""
    classifier = fitted(HEADS[name], template="the {} in a tree")
    classifier.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["README.md", HEAD]
    model = tiny_clip().train()
    loaded = load(tmp_path / "new" / "folder", model)
    assert model.training
    assert (loaded.head, loaded.classes, loaded.template) == (HEADS[name], NAMES, "the {} in a tree")
    assert torch.equal(loaded.predict_proba(OTHERS), classifier.predict_proba(OTHERS))
    if classifier.head.takes_new_names:
        names = ["red tree", NAMES[2]]
        found = [c.predict_proba(OTHERS, class_names=names) for c in (loaded, classifier)]
        assert torch.equal(*found)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again").predict_proba(OTHERS), classifier.predict_proba(OTHERS))


PROGRAM = """
import sys, torch
from transformers import CLIPModel, CLIPProcessor
from peft_ncgeo import FewShotClassifier
from tests.conftest import tiny_images, tiny_processor
folder = sys.argv[1]
classifier = FewShotClassifier.from_pretrained(folder + "/head", folder + "/base", tiny_processor())
images, names = tiny_images(10, seed=3)["image"][:], ["red tree", "red cat"]
torch.save(classifier.predict_proba(images, class_names=names), folder + "/said")
"""


@pytest.mark.slow
def test_a_fresh_process_says_the_same(tmp_path):
    tiny_clip().save_pretrained(tmp_path / "base")
    classifier = fitted(HEADS["gda"], CLIPModel.from_pretrained(tmp_path / "base").eval())
    classifier.save_pretrained(tmp_path / "head")
    (tmp_path / "program.py").write_text(PROGRAM)
    launch_script(tmp_path / "program.py", str(tmp_path), out=tmp_path, processes=1)
    expected = classifier.predict_proba(OTHERS, class_names=["red tree", "red cat"])
    torch.testing.assert_close(torch.load(tmp_path / "said"), expected, atol=1e-6, rtol=0)
    assert str(tmp_path) not in (tmp_path / "head" / "README.md").read_text()
    assert str(tmp_path).encode() not in (tmp_path / "head" / HEAD).read_bytes()  # the path of the base model


def test_a_head_of_a_tuned_model_needs_that_model(tmp_path):
    """The folder holds the head alone; the tuned model is passed."""
    classifier = fitted(HEADS["gda"], lora())
    classifier.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path, lora()).predict_proba(OTHERS), classifier.predict_proba(OTHERS))
    assert "base_model" in message(lambda: load(tmp_path))
    assert "tuned model" in message(lambda: FewShotClassifier.from_pretrained(tmp_path, None, PROCESSOR))
    assert "tuned model" in (tmp_path / "README.md").read_text()


def test_a_head_in_the_folder_of_its_adapter_is_loaded_with_it(tmp_path):
    classifier = fitted(HEADS["gda"], lora())
    save_adapter(classifier.model, tmp_path, PROCESSOR)
    classifier.save_pretrained(tmp_path / "head")
    assert torch.equal(load(tmp_path).predict_proba(OTHERS), classifier.predict_proba(OTHERS))
    other = lora()
    with torch.no_grad():
        for name, weight in other.named_parameters():
            weight += 0.5 * ("lora_B" in name)
    save_adapter(other, tmp_path, PROCESSOR)  # the head stays, and is of the adapter before
    model = tiny_clip()
    assert "other image features" in message(lambda: load(tmp_path, model))
    assert type(model.vision_model.encoder.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_other_models_are_refused(folder):
    """By what they answer: other images' features, other texts' features, another width."""
    assert "image features" in message(lambda: load(folder, lora()))
    model = tiny_clip()
    with torch.no_grad():
        model.text_model.embeddings.token_embedding.weight.normal_()
    assert "text features" in message(lambda: load(folder, model))
    assert "width 24" in message(lambda: load(folder, siglip(), siglip_processor()))
    assert "neither text features" in message(lambda: load(folder, tiny_vit()))
    assert load(folder, tiny_clip().to(torch.bfloat16)).predict_proba(OTHERS).isfinite().all()
    assert "names no base model" in message(lambda: FewShotClassifier.from_pretrained(folder, None, PROCESSOR))
    with pytest.raises(OSError, match="pass base_model"):
        FewShotClassifier.from_pretrained(folder, str(folder / "nowhere"), PROCESSOR)


def rewritten(folder, header=None, **tensors):
    with safe_open(folder / HEAD, "pt") as file:
        told = json.loads(file.metadata()["peft_ncgeo"])
    kept = {name: value for name, value in {**load_file(folder / HEAD), **tensors}.items() if value is not None}
    save_file(kept, folder / HEAD, {"peft_ncgeo": json.dumps({**told, **(header or {})})})


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        ({"head": "NoHead"}, {}),
        ({"head": ["TipAdapter"]}, {}),
        ({"settings": {"gamma": 1}}, {}),
        ({"settings": {"alpha": -1}}, {}),
        ({"settings": 3}, {}),
        ({"classes": NAMES[:4]}, {}),
        ({"classes": [*NAMES[:4], NAMES[0]]}, {}),
        ({"classes": [0, 1, 2, 3, 4]}, {}),
        ({"template": "no place"}, {}),
        ({"tuned": "no"}, {}),
        ({"base_model": None}, {}),
        ({"more": 1}, {}),
        ({}, {"keys": None}),
        ({}, {"extra": torch.zeros(1)}),
        ({}, {"keys": torch.zeros(15, 23)}),
        ({}, {"keys": torch.full((15, 24), torch.nan)}),
        ({}, {"keys": torch.zeros(15, 24, dtype=torch.int64)}),
        ({}, {"labels": torch.full((15,), 5)}),
        ({}, {"labels": torch.zeros(15)}),
        ({}, {"probe": None}),
        ({}, {"probe": torch.zeros(2, 24)}),
    ],
    ids=str,
)
def test_damaged_files(folder, header, tensors):
    rewritten(folder, header, **tensors)
    assert message(lambda: load(folder)).startswith(f"{HEAD} in {folder} is damaged: ")


def test_files_of_others(folder):
    content = (folder / HEAD).read_bytes()
    for damaged in (content[:-40], b"", b"\xff" * 100):
        (folder / HEAD).write_bytes(damaged)
        assert "is damaged" in message(lambda: load(folder))
    save_file({"weight": torch.zeros(2, 2)}, folder / HEAD)
    assert "does not describe a head" in message(lambda: load(folder))


def test_folders_that_hold_something_else(saved, tmp_path):
    """An adapter beside a head would leave open which of them is meant."""
    classifier = saved[1]
    lora().save_pretrained(tmp_path / "adapter")
    assert "holds an adapter" in message(lambda: classifier.save_pretrained(tmp_path / "adapter"))
    tiny_clip().save_pretrained(tmp_path / "model")
    assert "holds a model" in message(lambda: classifier.save_pretrained(tmp_path / "model"))
    copa = adapt(get_peft_model(tiny_vit(), CoPAConfig()), torch.randn(4, 3, 16, 16), [0, 1, 0, 1], 1)
    copa.save_pretrained(tmp_path / "both")
    (tmp_path / "both" / HEAD).write_bytes((saved[0] / HEAD).read_bytes())
    assert "both" in message(lambda: load(tmp_path / "both", tiny_vit()))


def test_a_head_is_written_over_by_another(saved, tmp_path):
    saved[1].save_pretrained(tmp_path)
    other = fitted(HEADS["lp"])
    other.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).predict_proba(OTHERS), other.predict_proba(OTHERS))


# For others: the card and the processor


def test_the_folder_for_others(tmp_path):
    """With card and processor, which is then found beside the head."""
    classifier = fitted(replace(HEADS["tip"], alpha=2.0, beta=3.0))
    save_adapter(classifier, tmp_path, base_model_id="user/base", license="mit")
    card = (tmp_path / "README.md").read_text()
    for part in ("base_model: user/base", "license: mit", "TipAdapter(alpha=2.0, beta=3.0)", "red cat", "num_views=2"):
        assert part in card
    assert "FewShotClassifier.from_pretrained(" in card
    assert "PeftModel" not in card
    assert "zhang2022tip" in card
    loaded = FewShotClassifier.from_pretrained(tmp_path, tiny_clip())
    assert torch.equal(loaded.predict_proba(OTHERS), classifier.predict_proba(OTHERS))


def test_a_head_of_a_tuned_model_is_not_made_for_others(tmp_path):
    classifier = adapt(lora(), PICTURES, LABELS, processor=PROCESSOR, class_names=NAMES, head=HEADS["lp"], num_views=0)
    assert "adapter" in message(lambda: save_adapter(classifier, tmp_path / "head"))
    assert not (tmp_path / "head").exists()


def test_the_record_compares_with_zero_shot():
    classifier, images = fitted(HEADS["gda"]), tiny_images(10, seed=3)
    record = record_few_shot(classifier, images, class_counts=[3] * 5)
    zero_shot = ZeroShotClassifier(tiny_clip(), PROCESSOR).predict(OTHERS, NAMES)
    for moment, found in (("before", zero_shot), ("after", classifier.predict(OTHERS))):
        right = sum(a == NAMES[b] for a, b in zip(found, images["label"], strict=True))
        assert record.sets["test"][moment]["accuracy"] == pytest.approx(right / 10)
    assert record.adapter.name == "GaussianDiscriminant"
    assert type(record).from_dict(record.to_dict()) == record
