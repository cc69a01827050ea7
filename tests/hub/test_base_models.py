"""The base model that an adapter names: at its revision, from where it is, and without code of anybody's."""

from __future__ import annotations

import json

import peft
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoImageProcessor, AutoProcessor

from peft_ncgeo import NPTConfig, ZeroShotClassifier
from peft_ncgeo.classifiers.image_features import ImageFeatures
from peft_ncgeo.data.processors import find_processor
from peft_ncgeo.hub import load_adapter
from peft_ncgeo.models.templates import find_tokenizer

from ..conftest import tiny_clip, tiny_images, tiny_vit
from .test_hub_errors import one_line

pytestmark = pytest.mark.slow

CONFIG = "adapter_config.json"


@pytest.fixture
def pinned(hub, author) -> list:
    """An adapter for the branch "old" of a base whose main has other weights; what the model says on each."""
    return author.run("""
    config = tuned.tiny_clip().config
    tuned.torch.manual_seed(5)
    CLIPModel(config).push_to_hub("user/moving")
    peft_ncgeo.hub.push.HfApi().create_branch("user/moving", branch="old", exist_ok=True)
    tuned.torch.manual_seed(6)
    CLIPModel(config).push_to_hub("user/moving")
    tuned.tiny_processor().push_to_hub("user/moving")
    base = lambda revision: CLIPModel.from_pretrained("user/moving", revision=revision)
    model = tuned.get_peft_model(base("old"), tuned.LoraConfig(target_modules=["q_proj"], r=2), revision="old")
    push_adapter(tuned.far(model), "user/pinned", tuned.tiny_processor())
    other = tuned.PeftModel.from_pretrained(base("main"), "user/pinned")
    result = [tuned.answers(model), tuned.answers(other)]
    """)


def test_the_base_is_loaded_at_its_revision(hub, pinned, reader):
    said, on_main = pinned
    assert json.loads(hub.files("user/pinned")[CONFIG])["revision"] == "old"
    assert reader.run("result = tuned.answers(load_adapter('user/pinned'))") == said != on_main
    assert reader.run("result = tuned.answers(load_adapter('user/pinned', 'user/moving'))") == said
    # another base has revisions of its own
    assert reader.run(f"result = load_adapter('user/pinned', {'user/tiny-clip'!r}).active_adapter") == "default"
    assert reader.run("result = tuned.answers(ZeroShotClassifier.from_pretrained('user/pinned').model)") == said


def test_a_folder_stands_in_for_no_revision(hub, pinned, reader):
    reader.run("""
    import os
    other = tuned.get_peft_model(tuned.tiny_clip(), tuned.NPTConfig(num_text_tokens=2))
    other.save_pretrained("user/pinned")
    """)
    try:
        loaded = "load_adapter('user/pinned', revision='main')"
        assert reader.run(f"result = tuned.answers({loaded})") == pinned[0]
        assert reader.run("result = load_adapter('user/pinned', tuned.tiny_clip()).peft_type.value") == "NCGEO_NPT"
        here = "load_adapter(os.path.abspath('user/pinned'), revision='main')"
        one_line(reader, here, "ValueError", "has no revisions")
        reader.run("tuned.tiny_clip().save_pretrained('user/moving')")
        one_line(reader, loaded, "ValueError", "user/moving at revision old", "pass base_model")
    finally:
        reader.run("import shutil; shutil.rmtree('user')")


def test_another_base_takes_no_revision_along(author, hub, pinned):
    author.run("push_adapter(model, 'user/unpinned', tuned.tiny_processor(), base_model_id=tuned.CLIP)")
    config = json.loads(hub.files("user/unpinned")[CONFIG])
    assert config["base_model_name_or_path"] == "user/tiny-clip"
    assert config["revision"] is None


def test_no_push_over_a_model(author, hub, pinned):
    before = len(hub.commits("user/moving"))
    one_line(author, "push_adapter(model, 'user/moving')", "ValueError", "user/moving holds a model")
    one_line(author, "push_adapter(model, 'moving')", "ValueError", "user/moving holds a model")
    assert len(hub.commits("user/moving")) == before


def test_a_relative_path_does_not_become_an_id(author):
    """A base loaded by a relative path, before the working folder changed."""
    author.run("""
    import json, os
    from pathlib import Path
    from peft_ncgeo.hub import create_card, save_adapter
    os.makedirs("elsewhere", exist_ok=True)
    tuned.tiny_clip().save_pretrained("my/base")
    model = tuned.get_peft_model(CLIPModel.from_pretrained("my/base"), tuned.LoraConfig(target_modules=["q_proj"]))
    os.chdir("elsewhere")
    """)
    try:
        base, named, card = author.run("""
        save_adapter(model, "saved", tuned.tiny_processor())
        card = create_card(model)
        config = json.loads(Path("saved", "adapter_config.json").read_text())
        result = [config["base_model_name_or_path"], card.data.base_model, str(card)]
        """)
        assert base is None
        assert named is None
        assert "my/base" not in card
        one_line(author, "push_adapter(model, 'user/never')", "ValueError", "folder 'base'")
    finally:
        author.run("os.chdir('..')")


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """A base, tokenizer and processor that need code; it would leave a file. Nobody is there to be asked."""
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass C: pass\n"
    auto = {"AutoConfig": "c.C", "AutoModel": "c.C", "AutoProcessor": "c.C", "AutoImageProcessor": "c.C"}
    auto["AutoTokenizer"] = ["c.C", None]
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "custom", "auto_map": auto}))
    (tmp_path / "c.py").write_text(code)
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    yield tmp_path
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_nothing_asks_to_run_code(custom):
    for kind in (AutoProcessor, AutoImageProcessor):
        assert find_processor(kind, custom) is None
    assert find_tokenizer(str(custom)) is None
    model = get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=2, tokenizer_name_or_path=str(custom)))
    model.peft_config["default"].task_type = "FEATURE_EXTRACTION"  # no class of the base is named
    model.save_pretrained(custom / "adapter")
    with pytest.raises(OSError, match="cannot be loaded; pass base_model"):
        load_adapter(custom / "adapter", str(custom))
    (custom / "adapter" / "processor_config.json").write_text((custom / "processor_config.json").read_text())
    with pytest.raises(ValueError, match="No processor beside the adapter"):
        ZeroShotClassifier.from_pretrained(custom / "adapter", tiny_clip())
    backbone = tiny_vit()
    backbone.name_or_path = str(custom)
    with pytest.raises(ValueError, match="pass processor"):
        ImageFeatures(backbone).inputs(tiny_images(1)["image"][:])


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LoraConfig(target_modules=["q_proj"]), {"peft_type": "XLORA", "hidden_size": 16, "adapters": {"0": "a/b"}}),
        (LoraConfig(target_modules=["q_proj"]), {"peft_type": "SHADOW", "shadow_model": "a/b"}),
    ],
    ids=["xlora", "shadow"],
)
def test_weights_of_other_places_are_not_read(tmp_path, kind, config):
    if config["peft_type"] not in peft.PeftType.__members__:
        pytest.skip("this PEFT has no such type")
    get_peft_model(tiny_clip(), kind).save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a/b.* beside its own file") as refusal:
        load_adapter(tmp_path, tiny_clip())
    assert "\n" not in str(refusal.value)
