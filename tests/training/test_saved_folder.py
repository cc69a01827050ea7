"""The folder that `save_model` writes: adapter, processor and card."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoImageProcessor

from peft_ncgeo import ZeroShotClassifier
from peft_ncgeo.loading.load import PROCESSOR_FILES

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit_classifier
from .runs import trainer, vit


def test_a_saved_folder_loads_with_its_base_model_alone_and_has_a_card(tmp_path):
    test = tiny_images(15, seed=1)
    run = trainer(tmp_path / "run", eval_dataset=test, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    run.save_model(str(tmp_path / "unmeasured"))
    assert "It was not evaluated." in (tmp_path / "unmeasured" / "README.md").read_text()
    accuracy = run.evaluate()["eval_accuracy"]
    run.create_model_card(license="mit", model_name="user/colours")
    run.save_model(str(tmp_path / "saved"))

    card = (tmp_path / "saved" / "README.md").read_text()
    assert all(words in card for words in ("license: mit", "user/colours", "red cat", f"{100 * accuracy:.1f}"))
    assert "It was not evaluated." not in card
    classifier = ZeroShotClassifier.from_pretrained(str(tmp_path / "saved"), tiny_clip())
    images, expected = test["image"][:], ZeroShotClassifier(run.model, tiny_processor())
    torch.testing.assert_close(classifier.predict_proba(images), expected.predict_proba(images, NAMES))
    kept = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert not kept & set(PROCESSOR_FILES)


@pytest.mark.slow
def test_image_classifiers_and_folders_of_models(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")  # of an adapter of another kind, which is replaced
    run = trainer(tmp_path / "run", vit())
    run.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "tokenizer.json").exists()
    assert AutoImageProcessor.from_pretrained(tmp_path / "adapter").size == tiny_processor().image_processor.size
    assert "image-classification" in (tmp_path / "adapter" / "README.md").read_text()

    whole = trainer(tmp_path / "run", tiny_vit_classifier())
    whole.save_model(str(tmp_path / "whole"))  # no adapter, so no card
    assert AutoImageProcessor.from_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole" / "README.md").exists()

    with pytest.warns(UserWarning, match="holds a model"):
        run.save_model(str(tmp_path / "whole"))
