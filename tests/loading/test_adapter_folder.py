"""Adapters written over others: whole, or as before, or refused; never a mixture, and never over a model."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_ncgeo import CoPAConfig, FewShotClassifier, NPTConfig, adapt
from peft_ncgeo.hub import load_adapter, save_adapter
from peft_ncgeo.loading.adapter_folder import writing_adapter
from peft_ncgeo.loading.converted import ImportedPrompts
from peft_ncgeo.training.state.checkpoints import why_not_resumable

from ..conftest import NAMES, pixels, tiny_clip, tiny_images, tiny_processor, tiny_vit, tiny_vit_classifier
from ..training.runs import trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*use of fork:DeprecationWarning")
CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.copyfile", "shutil.rmtree"}


def few_shot(which: int) -> FewShotClassifier:
    torch.manual_seed(which)
    model = get_peft_model(tiny_vit(), CoPAConfig())
    classes = [["owl", "wren"], ["crab", "crow"]][which]
    return adapt(model, pixels(4) + which, [classes[i % 2] for i in range(4)], steps=3, lr=0.1)


def prompted(which: int) -> PeftModel:
    torch.manual_seed(which)
    return get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=2, template=["a {}.", "the {} there."][which]))


def with_head(which: int) -> PeftModel:
    model = tiny_vit_classifier()
    names = [NAMES, NAMES[::-1]][which]
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    torch.manual_seed(which)
    model.classifier.weight.data.normal_()
    return get_peft_model(model, NPTConfig.vpt(modules_to_save=["classifier"]))


def save_by_trainer(model: PeftModel, folder: Path) -> None:
    images = tiny_images(10, list(model.get_base_model().config.id2label.values()))
    trainer(folder, model, train=images, processor=tiny_processor().image_processor).save_model()


def save_imported(model: PeftModel, folder: Path) -> None:
    ImportedPrompts(model.peft_config["default"], get_peft_model_state_dict(model)).save_pretrained(folder)


def weights(model: PeftModel) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in get_peft_model_state_dict(model).items()}


def read_few_shot(folder: Path) -> tuple:
    loaded = FewShotClassifier.from_pretrained(folder, tiny_vit())
    return loaded.classes, loaded.prototypes.tolist(), weights(loaded.model)


def read_prompts(folder: Path) -> tuple:
    model = load_adapter(folder, tiny_clip())
    return model.peft_config["default"].template, weights(model)


def read_head(folder: Path) -> tuple:
    model = load_adapter(folder, tiny_vit_classifier())
    return model.get_base_model().config.id2label, weights(model)


def save_with_card(model, folder: Path) -> None:
    save_adapter(model, folder, tiny_processor().image_processor)


CASES = {
    "few_shot": (few_shot, FewShotClassifier.save_pretrained, read_few_shot),
    "few_shot_with_card": (few_shot, save_with_card, read_few_shot),
    "prompts": (prompted, save_with_card, read_prompts),
    "imported": (prompted, save_imported, read_prompts),
    "trainer": (with_head, save_by_trainer, read_head),
}


def save_until(save, model, folder: Path, killed_at: int) -> None:
    """Save, in a process that is killed in place of its n-th change to a file."""
    left = killed_at

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in CHANGES and (event != "open" or "w" in str(arguments[1])):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(model, folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["few_shot_with_card", "prompts", "imported", "trainer"])
def test_a_kill_at_any_time_leaves_no_mixture(tmp_path, case):
    make, save, read = CASES[case]
    old, new = make(0), make(1)
    save(new, tmp_path / "new")
    expected = [None, read(tmp_path / "new")]
    seen, killed_at, folder = [], 0, tmp_path / "saved"
    while not seen or seen[-1] != "ended":
        killed_at += 1
        if seen[-1:] != ["old"]:
            save(old, folder)
        expected[0] = expected[0] or read(folder)
        child = multiprocessing.get_context("fork").Process(target=save_until, args=(save, new, folder, killed_at))
        child.start()
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
        if (folder / "adapter_config.json").exists():
            seen.append(["old", "new"][expected.index(read(folder))])
        else:
            with pytest.raises(ValueError, match=r"has no adapter_config.json"):
                read(folder)
            seen.append("refused")
        if child.exitcode == 0:
            assert seen[-1] == "new"
            seen.append("ended")
    assert seen == sorted(seen, key=["old", "refused", "new", "ended"].index)
    assert seen.count("old") >= 3
    assert expected[0] != expected[1]


@pytest.mark.parametrize("name", ["default", "birds"])
def test_heads_that_another_wrote_over_the_prototypes_own(tmp_path, name):
    classifier = adapt(get_peft_model(tiny_vit(), CoPAConfig(), name), pixels(4), [0, 1, 0, 1], steps=2, lr=0.1)
    classifier.save_pretrained(tmp_path)
    folder = tmp_path / ("" if name == "default" else name)
    assert torch.equal(FewShotClassifier.from_pretrained(folder, tiny_vit()).prototypes, classifier.prototypes)
    adapt(classifier.model, pixels(4) + 1, ["x", "y", "x", "y"], steps=2, lr=0.1)
    classifier.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="other heads") as refusal:
        FewShotClassifier.from_pretrained(folder, tiny_vit())
    assert "\n" not in str(refusal.value)


def test_prototypes_of_version_0_1_0_are_read(tmp_path):
    """Their file names no heads."""
    classifier = few_shot(0)
    classifier.save_pretrained(tmp_path)
    file = tmp_path / "prototypes.safetensors"
    with safe_open(file, "pt") as content:
        classes = content.metadata()["classes"]
    save_file(load_file(file), file, {"classes": classes})
    loaded = FewShotClassifier.from_pretrained(tmp_path, tiny_vit())
    assert loaded.classes == classifier.classes
    assert torch.equal(loaded.prototypes, classifier.prototypes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", ["few_shot", "few_shot_with_card", "prompts", "imported"])
def test_the_folder_of_a_model_stays_as_it_is(tmp_path, case):
    make, save, _ = CASES[case]
    tiny_clip().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds a model") as refusal:
        save(make(0), tmp_path)
    assert "\n" not in str(refusal.value)
    assert contents(tmp_path) == before


def test_a_processor_that_no_adapter_left_stays(tmp_path):
    """Also where none is found to be saved."""
    tiny_processor().save_pretrained(tmp_path)
    before = contents(tmp_path)
    save_adapter(prompted(0), tmp_path)
    assert before.items() <= contents(tmp_path).items()


def test_what_an_adapter_of_another_kind_left_goes(tmp_path):
    save_adapter(few_shot(0), tmp_path, tiny_processor())
    (tmp_path / "notes.txt").write_text("mine")
    left = {"prototypes.safetensors", "tokenizer.json"}
    assert left <= contents(tmp_path).keys()
    save_adapter(prompted(0), tmp_path)
    assert not left & contents(tmp_path).keys()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == contents(tmp_path).keys()  # nothing half written


def test_a_card_outlives_another_save(tmp_path):
    """PEFT adds to the one that is there."""
    save_adapter(few_shot(0), tmp_path, tiny_processor())
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nWritten by hand.\n")
    few_shot(1).save_pretrained(tmp_path)
    assert "Written by hand." in (tmp_path / "README.md").read_text()


def test_what_a_killed_save_left_spoils_no_checkpoint(tmp_path):
    """A checkpoint that is killed and written again: what was half written the first time lies in it."""
    options = {"train": tiny_images(8), "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, max_steps=1, **options).train()
    checkpoint = tmp_path / "checkpoint-1"
    child = multiprocessing.get_context("fork").Process(target=save_and_die, args=(checkpoint,))
    child.start()
    child.join(60)
    assert [path.name for path in checkpoint.rglob("adapter_config.json")] == ["adapter_config.json"] * 2
    assert why_not_resumable(checkpoint) == ""
    again = trainer(tmp_path, max_steps=2, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2
    assert list(again.model.peft_config) == ["default"]


def save_and_die(folder: Path) -> None:
    with writing_adapter(folder) as part:
        prompted(0).save_pretrained(part)
        os.kill(os.getpid(), signal.SIGKILL)
