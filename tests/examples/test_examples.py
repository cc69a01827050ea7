"""The examples run as users run them, on the demo and on a model and image folder of one's own."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_ncgeo import FewShotClassifier, GeometryTrainer, GeometryTrainingArguments, NPTConfig
from peft_ncgeo.data import load_demo
from peft_ncgeo.losses import OTPreservation
from peft_ncgeo.training import Recipe

from ..launching import launch_script

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("small_demo")]


def run_example(name: str, *arguments: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as Python does for a script
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


SHORT = ("--num_train_epochs", "1", "--shots", "2", "--batch_size", "20", "--seeds", "1", "2")


@pytest.fixture(scope="module")
def demo_run(small_demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ("--demo_split", "development", "--output_dir", str(folder), "--methods", "zero-shot", "ot-budget")
        run_example("train_prompt_ot.py", *SHORT, *arguments, monkeypatch=patch)
    return folder


@pytest.mark.slow
def test_demo_prints_a_table_and_saves_adapters(demo_run):
    results = json.loads((demo_run / "results.json").read_text())["results"]
    assert list(results) == ["zero-shot", "deep prompts + OT, budget 0.05"]
    for rows in results.values():
        assert len(rows) == 2
        assert all(0 < row[column] < 100 for row in rows for column in ("base", "new", "H", "kept"))
    zero_shot = results["zero-shot"]
    assert {**zero_shot[0], "seconds": 0} == {**zero_shot[1], "seconds": 0}  # seeds draw training images only
    table = (demo_run / "results.md").read_text()
    assert "| method | base | new | H | knowledge kept | seconds |" in table
    assert (demo_run / "ot-budget" / "seed-2" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_row_of_ours_is_what_its_saved_classifier_says(tmp_path, monkeypatch):
    arguments = ("--demo_split", "development", "--output_dir", str(tmp_path))
    arguments += ("--methods", "lora-budget", "--lora_epochs", "1")
    run_example("train_prompt_ot.py", *SHORT[:-1], *arguments, monkeypatch=monkeypatch)
    ((row,),) = json.loads((tmp_path / "results.json").read_text())["results"].values()
    classifier = FewShotClassifier.from_pretrained(tmp_path / "lora-budget" / "seed-1", load_demo().model)
    for part in ("base", "new"):
        images = load_demo("development").splits[part]
        names = images.features["label"].names
        predicted = [names.index(name) for name in classifier.predict(images["image"][:], class_names=names)]
        assert 100 * np.mean(np.array(predicted) == images["label"][:]) == pytest.approx(row[part], abs=0.1)


@pytest.mark.slow
def test_two_processes_give_the_same_adapter(demo_run, tmp_path):
    """`batch_size` counts the images of both."""
    arguments = (*SHORT[:-1], "--demo_split", "development", "--output_dir", str(tmp_path), "--methods", "ot-budget")
    assert "2 process(es)" in launch_script(ROOT / "examples" / "train_prompt_ot.py", *arguments, out=tmp_path)
    one, two = (
        load_file(folder / "ot-budget" / "seed-1" / "adapter_model.safetensors") for folder in (demo_run, tmp_path)
    )
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_search_trains_and_saves_its_best_trial(tmp_path, monkeypatch, capsys):
    arguments = ("--n_trials", "2", "--max_steps", "1", "--shots", "2", "--output_dir", str(tmp_path))
    run_example("search_hyperparameters.py", *arguments, monkeypatch=monkeypatch)
    accuracy, weight, rate = re.search(
        r"validation accuracy ([\d.]+) with .*'ot_weight': ([\d.]+), 'learning_rate': ([\d.]+)",
        capsys.readouterr().out,
    ).groups()
    assert 100 / 30 < float(accuracy) < 100
    assert 0.1 <= float(weight) <= 30
    assert 1e-3 <= float(rate) <= 2e-2
    adapter = PeftModel.from_pretrained(load_demo("development").model, tmp_path)
    assert adapter.active_peft_config.peft_type == NPTConfig().peft_type


@pytest.mark.slow
def test_own_model_and_image_folder(tmp_path, monkeypatch, capsys):
    demo = load_demo("development", shots=2)
    demo.model.save_pretrained(tmp_path / "clip")
    demo.processor.save_pretrained(tmp_path / "clip")
    test = demo.splits["base"].select(range(0, len(demo.splits["base"]), 3))
    for split, images in (("train", demo.splits["train"]), ("test", test)):
        names = images.features["label"].names
        for i, sample in enumerate(images):
            folder = tmp_path / "images" / split / names[sample["label"]]
            folder.mkdir(parents=True, exist_ok=True)
            sample["image"].save(folder / f"{i}.png")
    arguments = ("--model_name_or_path", str(tmp_path / "clip"), "--dataset_name", str(tmp_path / "images"))
    arguments += ("--num_train_epochs", "1", "--shots", "2", "--seeds", "1", "--methods", "ot-weight", "coop")
    run_example("train_prompt_ot.py", *arguments, "--output_dir", str(tmp_path / "out"), monkeypatch=monkeypatch)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert set(results) == {"deep prompts + OT, weight 10", "CoOp"}
    assert "kept" not in results["CoOp"][0]
    assert f"Over all {len(test) // 2} test images" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "coop" / "seed-1" / "adapter_config.json").read_text())
    assert config["num_text_tokens"] == 16


def test_unknown_method_is_named(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="Unknown methods"):
        run_example("train_prompt_ot.py", "--methods", "magic", "--output_dir", str(tmp_path), monkeypatch=monkeypatch)


def updated(page: Path, monkeypatch) -> str:
    """The file after the script wrote what it finds in `outputs` beside it."""
    folder = page.parent
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as Python does for a script
    script = runpy.run_path(str(ROOT / "examples" / "update_docs.py"))
    script["main"].__globals__["ROOT"] = folder
    (folder / "examples").mkdir()
    arguments = ["--outputs", str(folder / "outputs"), "--root", str(folder)]
    monkeypatch.setattr(sys, "argv", ["update_docs.py", *arguments])
    script["main"]()
    return page.read_text()


@pytest.mark.slow
def test_results_are_written_into_the_page(demo_run, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- demo table -->\nold\n<!-- end of demo table -->\nafter\n")
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "prompt_ot").symlink_to(demo_run)
    text = updated(page, monkeypatch)
    assert text.startswith("before\n<!-- demo table -->\n| method")
    assert text.endswith("<!-- end of demo table -->\nafter\n")
    assert "old" not in text
    assert (tmp_path / "examples" / "results" / "prompt_ot_demo.json").exists()


@pytest.mark.slow
def test_a_recipe_is_trained_and_overridden(tmp_path, monkeypatch):
    recipe = str(ROOT / "examples/recipes/demo/ot_budget.yaml")
    arguments = ("--recipe", recipe, "--demo_split", "development", "--output_dir", str(tmp_path))
    run_example("train_prompt_ot.py", *SHORT[:-1], *arguments, monkeypatch=monkeypatch)
    report = json.loads((tmp_path / "results.json").read_text())
    assert list(report["results"]) == ["zero-shot", "ot_budget"]
    assert "1 epochs, batch 20" in report["note"]  # the command line had the last word
    assert (tmp_path / "ot_budget" / "seed-1" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_recipe_of_stages_is_trained_and_overridden(tmp_path, monkeypatch, capsys):
    recipe = str(ROOT / "examples/recipes/demo/two_stages.yaml")
    arguments = ("--recipe", recipe, "--demo_split", "development", "--output_dir", str(tmp_path), "--max_steps", "2")
    run_example("train_prompt_ot.py", *SHORT[:-1], *arguments, monkeypatch=monkeypatch)
    report = json.loads((tmp_path / "results.json").read_text())
    assert list(report["results"]) == ["zero-shot", "two_stages"]
    folder = tmp_path / "two_stages" / "seed-1"
    steps = [json.loads((folder / f"stage-{i}" / "trainer_state.json").read_text())["global_step"] for i in (1, 2)]
    assert steps == [2, 2]
    assert (folder / "class_rows.safetensors").exists()


@pytest.mark.slow
def test_comparison_fills_cells_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    arguments = ("--split", "development", "--seeds", "1", "--num_train_epochs", "0.25", "--output_dir", str(tmp_path))
    variants = ("--variants", "joint exact")
    run_example("compare_transport.py", *arguments, *variants, monkeypatch=monkeypatch)
    table = capsys.readouterr().out
    cells = sorted(path.parent.name for path in tmp_path.rglob("seed-1.json"))
    assert cells == ["joint_exact_budget", "joint_exact_weight", "no_transport"]
    cell = tmp_path / "development" / "no_transport" / "seed-1.json"
    cell.write_text(cell.read_text().replace('"H": ', '"H": 1'))  # a cell that is there is not run again
    run_example("compare_transport.py", *arguments, *variants, monkeypatch=monkeypatch)
    assert table != capsys.readouterr().out
    budget, weight = (
        json.loads((tmp_path / "development" / f"joint_exact_{kind}" / "seed-1.json").read_text())
        for kind in ("budget", "weight")
    )
    assert weight["factor"] == pytest.approx(budget["factor"])


def test_plain_loop_equals_the_trainer(tmp_path):
    """One batch an epoch holds every image, so that the order cannot matter."""
    loop = runpy.run_path(str(ROOT / "examples" / "accelerate_loop.py"))
    own = loop["train"](Recipe.read(loop["RECIPE"]), epochs=4, split="development", shots=2, seed=5)
    demo = load_demo("development", shots=2, seed=1)
    torch.manual_seed(5)
    model = get_peft_model(demo.model, NPTConfig.prompt_ot())
    arguments = GeometryTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=4,
        per_device_train_batch_size=60,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        disable_tqdm=True,
    )
    GeometryTrainer(
        model=model,
        args=arguments,
        train_dataset=demo.splits["train"],
        processing_class=demo.processor,
        losses=[OTPreservation(budget=0.05)],
    ).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, trained[name], atol=1e-4, rtol=1e-3)
