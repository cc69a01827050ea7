"""A Space is pushed beside its adapter, and its files load that adapter."""

from __future__ import annotations

import ast

import pytest
from huggingface_hub import RepoCard

from peft_ncgeo.hub import write_space
from peft_ncgeo.hub.push import push_adapter

from ..conftest import tiny_clip, tiny_vit, tiny_vit_classifier
from .user import UserError

PROMPTS = "tuned.get_peft_model(tuned.base(tuned.CLIP), peft_ncgeo.NPTConfig(num_text_tokens=2))"
OPTIONS = "{'class_names': ['red cat', \"dog's bowl\"], 'requirement': 'peft_ncgeo[demo] @ git+https://example.org/a'}"


@pytest.mark.slow
def test_a_space_is_pushed_with_the_adapter(hub, author):
    push = f"push_adapter({PROMPTS}, 'shown', space_id='user/shown-demo', space_options={OPTIONS})"
    author.run(push)
    files = {name: content.decode() for name, content in hub.files("spaces/user/shown-demo").items()}
    assert files.keys() == {".gitattributes", "README.md", "app.py", "requirements.txt"}
    assert files["requirements.txt"].split() == ["peft_ncgeo[demo]", "@", "git+https://example.org/a"]
    metadata = RepoCard(files["README.md"]).data.to_dict()
    assert (metadata["sdk"], metadata["app_file"], metadata["models"]) == ("gradio", "app.py", ["user/shown"])
    # its own lines load the adapter, here without the page
    said = author.run(
        f"""
import sys, types
page = sys.modules["peft_ncgeo.demo_app"] = types.ModuleType("peft_ncgeo.demo_app")
page.build_app = lambda classifier, **options: (classifier.predict(tuned.IMAGES, options["class_names"]), options)
found = {{"__name__": "app"}}
exec({files["app.py"]!r}, found)
model = tuned.load_adapter("user/shown")
names = ZeroShotClassifier(model, tuned.tiny_processor()).predict(tuned.IMAGES, found["app"][1]["class_names"])
result = found["app"], names
"""
    )
    (predicted, options), expected = said
    assert predicted == expected
    assert options == {"class_names": ["red cat", "dog's bowl"], "title": "shown"}

    hub.refuse_writes = True  # of a second push, nothing arrives
    with pytest.raises(UserError, match="not pushed"):
        author.run(push)
    assert len(hub.commits("spaces/user/shown-demo")) == 2


def test_a_space_of_another_branch_and_the_spaces_that_are_refused(tmp_path):
    write_space(tmp_path, tiny_clip(), "user/adapter", revision="dev", title="Crabs: and more")
    code = ast.parse((tmp_path / "app.py").read_text())
    calls = [ast.unparse(node) for node in ast.walk(code) if isinstance(node, ast.Call)]
    assert "ZeroShotClassifier.from_pretrained('user/adapter', revision='dev')" in calls
    assert RepoCard.load(tmp_path / "README.md").data.title == "Crabs: and more"
    write_space(tmp_path, tiny_vit_classifier(), "user/head")
    assert "TrainedClassifier.from_pretrained('user/head')" in (tmp_path / "app.py").read_text()
    with pytest.raises(ValueError, match="classes of its own"):
        write_space(tmp_path, tiny_vit_classifier(), "user/head", class_names=["a", "b"])
    for model, options, message in (
        (tiny_vit(), {"space_id": "user/demo"}, "reads class names"),
        (tiny_clip(), {"space_id": "not/an/id"}, "space_id='not/an/id'"),
        (tiny_clip(), {"space_id": "user/demo", "create_pr": True}, "pull request"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            push_adapter(model, "user/adapter", **options)
        assert "\n" not in str(caught.value)
