"""The command line: what its commands train, print, write and refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers.image_utils import load_image
from typer.testing import CliRunner

from peft_ncgeo import FewShotClassifier, ZeroShotClassifier
from peft_ncgeo.cli import app
from peft_ncgeo.cli.errors import explain
from peft_ncgeo.cli.run.classifiers import read_names
from peft_ncgeo.data import load_demo, load_images
from peft_ncgeo.metrics.accuracy import accuracy
from peft_ncgeo.training import Recipe
from peft_ncgeo.training.recipe_files import find_recipe, recipe_names

from ..conftest import tiny_vit
from ..import_graph import graph
from ..launching import launch_script

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run(*words: object, code: int = 0) -> str:
    """Run a command and return what it prints; an error that is not explained in one line is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def write(folder: Path, part: str, counts: list[int]) -> None:
    """Write `counts[k]` of the demo's drawings of class k as files."""
    images = load_demo(shots=8).splits["train" if part in ("", "train") else "validation"]
    names, labels = images.features["label"].names, images["label"][:]
    for label, count in enumerate(counts):
        place = folder / part / names[label]
        place.mkdir(parents=True)
        for i, row in enumerate([i for i, found in enumerate(labels) if found == label][:count]):
            images[row]["image"].save(place / f"{i}.png")


@pytest.fixture(scope="module")
def tail(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tail")
    write(folder, "train", [8, 4, 2])
    write(folder, "test", [6, 6, 6])
    return folder


@pytest.fixture(scope="module")
def trained(tail, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ("--model", "demo", "--recipe", "demo/coop", "--output_dir", folder, "--max_steps", "2")
    return folder, run("train", tail, *words, "--learning_rate", "0.02")


def rows(printed: str) -> dict[str, list[float]]:
    found = re.findall(r"^\| (\w[^|]*) \| ([\d.]+) \| ([\d.]+) \|$", printed, flags=re.MULTILINE)
    return {title: [float(value) for value in values] for title, *values in found}


def test_accuracies_before_and_after_are_those_of_zero_shot_and_of_the_saved_adapter(tail, trained):
    folder, printed = trained
    test = load_images(tail, split="test")
    names, (_, processor, model) = test.features["label"].names, load_demo()
    shown = rows(printed)["test accuracy"]
    for classifier, value in zip(
        (ZeroShotClassifier(model, processor), ZeroShotClassifier.from_pretrained(folder)), shown, strict=True
    ):
        predicted = [names.index(name) for name in classifier.predict(test["image"][:], names)]
        assert accuracy(predicted, test["label"][:]) == pytest.approx(value, abs=6e-4)
    assert "train 11, validation 3, test 18" in printed  # 1 of 8, of 4 and of 2
    assert {"README.md", "processor_config.json", "adapter_config.json"} <= {path.name for path in folder.iterdir()}
    assert "test accuracy, classes with few images" in rows(printed)


def test_the_length_of_a_training_is_printed(trained):
    """A batch holds all 11 images, so that a step is an epoch; two steps are asked for."""
    batch = Recipe.read("demo/coop").args["batch_size"]
    assert batch >= 11
    assert f"Training: 11 images, batch {batch}, 2 steps (2 epochs).\n" in trained[1]


MISTAKES = [
    ("train {tail}", ["--model"]),
    ("train {tail} --model demo --learning_rat 1", ["--learning_rat'", "--learning_rate'"]),
    ("train {tail} --model demo --recipe lora_bugdet", ["lora_bugdet", "lora_budget"]),
    ("train --max_steps many", ["max_steps", "many"]),
    ("train {tail} --model demo --output_dir {folder}", ["--resume"]),
    ("train {tail} --model {tail}", ["cannot be loaded"]),
    ("compare {tail} --model demo", ["4 classes", "--all_classes"]),
    ("compare --seeds one", ["--seeds one"]),
    ("compare {tail} --model demo --recipes demo/coop demo/maple", ["demo/maple", "commas"]),
    ("describe {tail}", ["cannot be loaded"]),
]


def test_a_mistake_is_one_line(tail, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, told in MISTAKES:
        printed = run(*words.format(tail=tail, folder=trained[0]).split(), code=2)
        (line,) = [line for line in printed.splitlines() if line.startswith("Error: ")]
        assert printed.splitlines()[-1] == line
        assert all(word in line for word in told), line


def test_every_command_has_help_that_needs_no_training_code():
    for command in ("train", "predict", "evaluate", "compare", "recipes", "describe", "demo"):
        printed = run(command, "--help")
        assert "Usage: " in printed
        assert "  -h, --help " in printed
    edges, reached = graph(), {"peft_ncgeo.cli.app"}
    for _ in edges:
        reached |= {other for name in reached for other in edges[name]}
    assert "peft_ncgeo.cli.run" in reached
    assert {name.split(".")[1] for name in reached if "." in name} == {"cli"}


@pytest.mark.slow
def test_recipes_are_listed_with_what_they_are(tmp_path):
    lines = run("recipes").splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    (line,) = [line for line in lines if line.startswith("clip_lora ")]
    assert "CLIP-LoRA, arXiv 2405.18541, for openai/clip-vit-base-patch16" in line
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    assert "ViTModel" in run("describe", tmp_path)


@pytest.mark.slow
def test_a_training_is_resumed_as_if_it_had_not_stopped(tail, tmp_path):
    words = ("--model", "demo", "--recipe", "demo/coop", "--lr_scheduler_type", "constant", "--save_steps", "1")
    words += ("--save_strategy", "steps")
    run("train", tail, *words, "--max_steps", 4, "--output_dir", tmp_path / "whole")
    assert "from step" not in run("train", tail, *words, "--max_steps", 2, "--output_dir", tmp_path / "parts")
    printed = run("train", tail, *words, "--max_steps", 4, "--output_dir", tmp_path / "parts", "--resume")
    assert "4 steps (4 epochs), going on from step 2." in printed
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(whole[name].equal(parts[name]) for name in whole)


def test_a_head_on_the_tuned_features_is_saved_beside_the_adapter(tail, tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("{peft: {LoraConfig: {target_modules: [q_proj]}}, head: {TipAdapter: {alpha: 3, beta: 20}}}")
    words = ("train", tail, "--model", "demo", "--recipe", recipe, "--max_steps", 2, "--learning_rate", 0.05)
    printed = run(*words, "--output_dir", tmp_path / "run")
    test = load_images(tail, split="test")
    names, folder = test.features["label"].names, tmp_path / "run"
    for classifier, pattern in (
        (FewShotClassifier.from_pretrained(folder), r"TipAdapter, .*test accuracy (.*)\."),
        (ZeroShotClassifier.from_pretrained(folder), r"\| test accuracy \| .* \| (.*) \|"),
    ):
        predicted = [names.index(name) for name in classifier.predict(test["image"][:], class_names=names)]
        (shown,) = re.findall(pattern, printed)
        assert accuracy(predicted, test["label"][:]) == pytest.approx(float(shown), abs=6e-4)
    card = (folder / "README.md").read_text()
    assert re.search(r"TipAdapter, .*(test accuracy .*)\.", printed)[1] in card
    assert 'FewShotClassifier.from_pretrained("run")' in card
    image = next((tail / "test" / names[0]).glob("*.png"))
    (said,) = FewShotClassifier.from_pretrained(folder).predict([load_image(str(image))])
    assert said in run("predict", folder, image, "--output", tmp_path / "said.csv")
    for more, told in ((("--push_to_hub", "True"), "hf upload"), (("--head", "linear"), "dual encoder")):
        printed = run(*words, *more, "--output_dir", tmp_path / "none", code=2)
        assert told in printed.splitlines()[-1]
        assert not (tmp_path / "none" / "adapter_config.json").exists()
    assert "nothing to train" in run("train", "--recipe", "demo/tip_adapter", code=2).splitlines()[-1]


@pytest.mark.slow
def test_a_head_and_stages(tail, tmp_path):
    words = ("--model", "demo", "--max_steps", 2)
    run("train", tail, *words, "--recipe", "images/lora", "--output_dir", tmp_path / "head")
    assert (
        json.loads((tmp_path / "head" / "class_names.json").read_text())
        == load_images(tail, split="test").features["label"].names
    )
    printed = run("train", tail, *words, "--recipe", "demo/two_stages", "--output_dir", tmp_path / "two")
    assert "zero-shot" in printed
    assert printed.count(" 2 steps ") == 2  # of each stage
    assert (tmp_path / "two" / "class_rows.safetensors").exists()


@pytest.mark.slow
def test_a_head_is_resumed_with_the_images_and_the_start_of_its_training_alone(tail, tmp_path):
    words = (
        "--model",
        "demo",
        "--head",
        "cosine",
        "--max_steps",
        1,
        "--output_dir",
        tmp_path / "run",
        "--save_steps",
        1,
    )
    run("train", tail, *words)
    write(tmp_path / "others", "train", [0, 4, 4, 4])
    shutil.rmtree(next((tmp_path / "others" / "train").glob("christmas*")))
    held = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    for data, more in ((tmp_path / "others", ()), (tail, ("--init", "random")), (tail, ("--head", "linear"))):
        assert "--resume" in run("train", data, *words, "--resume", *more, code=2).splitlines()[-1]
    assert held == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.safetensors")}
    assert "Adapter" in run("train", tail, *words, "--resume")


@pytest.mark.slow
def test_a_folder_of_two_classes_is_compared(tmp_path):
    write(tmp_path / "two", "", [4, 4])
    words = ("--model", "demo", "--max_steps", "1", "--seeds", "1", "--recipes", "demo/coop", "--all_classes")
    printed = run("compare", tmp_path / "two", *words, "--output_dir", tmp_path / "out", "--validation_share", "0.5")
    (cell,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"][1:]
    assert f"| all images | coop | {cell['accuracy']:.1f} | {cell['balanced_accuracy']:.1f} |" in printed


@pytest.mark.slow
def test_two_processes_give_the_same_adapter(tail, trained, tmp_path):
    script, folder = tmp_path / "command.py", tmp_path / "adapter"
    script.write_text("from peft_ncgeo.cli.app import main\nmain()\n")
    words = ["train", str(tail), "--model", "demo", "--recipe", "demo/coop", "--output_dir", str(folder)]
    printed = launch_script(script, *words, "--max_steps", "2", "--learning_rate", "0.02", out=tmp_path)
    assert printed.count("test accuracy |") == 1
    one, two = (load_file(made / "adapter_model.safetensors") for made in (trained[0], folder))
    for name, tensor in one.items():
        assert tensor.allclose(two[name], atol=1e-4, rtol=1e-3), name  # Adam steps by 0.02


@pytest.mark.slow
def test_predictions_are_those_of_the_classifier(tail, trained, tmp_path):
    (tmp_path / "images").mkdir()
    test = load_images(tail, split="test")
    for i, image in enumerate(test["image"][:3]):
        image.save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    output = tmp_path / "predictions.csv"
    names = test.features["label"].names
    words = ("--output", output, "--class_names", ",".join(names), "--top_k", "2")
    assert "1 of them could not be read" in run("predict", trained[0], tmp_path / "images", *words)
    header, *lines = (line.split(",") for line in output.read_text().splitlines())
    assert header == ["path", "name", "probability", "name_2", "probability_2", "error"]
    expected = ZeroShotClassifier.from_pretrained(trained[0]).predict(test["image"][:3], names)
    assert [line[1] for line in lines if "broken" not in line[0]] == expected


def test_names_of_the_data_are_matched_in_any_order(tail, trained, tmp_path):
    names = load_images(tail, split="test").features["label"].names
    told = [run("evaluate", trained[0], tail, "--class_names", ",".join(some)) for some in (names, names[::-1])]
    assert told[0] == told[1] == run("evaluate", trained[0], tail)
    mixed = ",".join([names[1], "a fish", names[2]])
    assert f"'{names[1]}'" in run("evaluate", trained[0], tail, "--class_names", mixed, code=2).splitlines()[-1]
    assert "a fish" in run("evaluate", trained[0], tail, "--class_names", ",".join(["a fish", *names[1:]]))


def test_names_of_any_length_and_of_a_file_of_windows(tmp_path):
    names = ["Käfer, groß", *(f"thing {i}" for i in range(60))]
    (tmp_path / "names.txt").write_bytes("\r\n".join(names).encode("utf-8-sig"))
    assert read_names(str(tmp_path / "names.txt")) == names
    assert read_names(", ".join(names[1:])) == names[1:]


def test_an_unexpected_error_keeps_its_traceback():
    """One that the interpreter or a library raises, be it in this package's code; others are explained."""
    found = []
    for fails in (lambda: find_recipe(3.5), lambda: find_recipe(), lambda: int("x"), lambda: find_recipe("nothing")):
        try:
            fails()
        except Exception as error:
            found.append(explain(error) is not None)
    assert found == [False, False, False, True]
    assert explain(BrokenPipeError(32, "Broken pipe")) is None  # the reader of a pipe, such as `head`, stopped first
