"""Template, class names and trained rows travel over the Hub, into a process that has seen nothing of the author's."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow

TRAIN = """
from peft import get_peft_model
from peft_ncgeo.training import Recipe, train_stages

def lora(folder, repo_id):
    config = tuned.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tuned.base(tuned.CLIP), config)
    run = tuned.trainer(folder, model, max_steps=2, template="the {} in the tree.", hub_model_id=repo_id)
    run.train()
    run.push_to_hub()
    return run

def stages(folder, repo_id):
    stages = [{"peft": {"LNTuningConfig": {"target_modules": ["layer_norm1"]}}}, {"rows": "texts"}]
    recipe = Recipe.from_dict("two", {"stages": stages, "args": {"max_steps": 2, "learning_rate": 0.1}})
    args = {"template": "the {} in the tree.", "hub_model_id": repo_id, "disable_tqdm": True}
    run = train_stages(recipe, tuned.base(tuned.CLIP), tuned.tiny_images(20), tuned.tiny_processor(), folder, args)
    run.push_to_hub()
    return run
"""


@pytest.mark.parametrize("kind", ["lora", "stages"])
def test_a_fresh_process_reads_names_as_the_author_did(hub, author, reader, kind, tmp_path):
    repo_id, template = f"user/setting-{kind}", "the {} in the tree."
    author.run(TRAIN)
    said = author.run(f"""
    run = {kind}({str(tmp_path / "run")!r}, {repo_id!r})
    classifier = ZeroShotClassifier(run.model.eval(), tuned.tiny_processor(), {template!r})
    names = [*tuned.NEW, *tuned.NAMES[:2]]
    result = [classifier.predict_proba(tuned.IMAGES, n).tolist() for n in (names, tuned.NAMES)]
    """)
    found = reader.run(f"""
    classifier = ZeroShotClassifier.from_pretrained({repo_id!r})
    names = [*tuned.NEW, *tuned.NAMES[:2]]
    probabilities = [classifier.predict_proba(tuned.IMAGES, n).tolist() for n in (names, None)]
    result = [probabilities, classifier.template, classifier.class_names == tuned.NAMES]
    """)
    assert found == [said, template, True]
    assert reader.run(f"result = hypothesis_template({repo_id!r})") == template
    files = hub.files(repo_id)
    assert "geometry.json" in files
    assert ("class_rows.safetensors" in files) == (kind == "stages")
    assert ("pipeline(" in files["README.md"].decode()) == (kind == "lora")
