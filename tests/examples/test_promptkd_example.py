"""The example on distillation: the demo, short, and models and images of one's own."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel

from peft_ncgeo import ImageClassifier
from peft_ncgeo.data import load_demo
from peft_ncgeo.hub import load_adapter

from .test_examples import ROOT, run_example

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("small_demo")]
SHORT = ["--num_train_epochs", "1", "--batch_size", "40", "--teacher_epochs", "1", "--disable_tqdm", "True"]
MARK = "transductive: unlabelled images of all classes"


def printed(out: str) -> dict[str, list[str]]:
    found = re.findall(r"^\| (zero-shot|teacher|student) \| (.*) \|$", out, flags=re.MULTILINE)
    return {title: cells.split(" | ") for title, cells in found}


@pytest.mark.slow
def test_a_student_of_the_demos_tuned_clip(tmp_path, monkeypatch, capsys):
    run_example("train_promptkd.py", *SHORT, "--output_dir", str(tmp_path), monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    unlabelled = 30 * 16 + len(load_demo().splits["new"]) // 2
    assert f"promptkd: {unlabelled} unlabelled images, 60 classes" in out
    table = printed(out)
    assert list(table) == ["zero-shot", "teacher", "student"]
    assert [cells[-1] for cells in table.values()] == ["none", "labelled images of base classes", MARK]
    # what was saved scores what the table says, on the base classes among their own names
    base, processor = load_demo().splits["base"], load_demo().processor
    pixels = processor.image_processor(base["image"][:], return_tensors="pt")["pixel_values"]
    native = PeftModel.from_pretrained(ImageClassifier.from_pretrained(tmp_path / "base"), tmp_path).eval()
    with torch.no_grad():
        for model in (load_adapter(tmp_path), native):
            predicted = torch.cat([model(pixel_values=part).logits[:, :30].argmax(1) for part in pixels.split(480)])
            right = (predicted == torch.tensor(base["label"][:])).float().mean()
            assert float(table["student"][0]) == pytest.approx(100 * float(right), abs=0.06)
    base_share, new, mean = map(float, table["student"][:3])
    assert mean == pytest.approx(2 / (1 / base_share + 1 / new), abs=0.1)


@pytest.mark.slow
def test_models_and_images_of_ones_own(tmp_path, monkeypatch, capsys):
    demo = load_demo()
    for name in ("student", "teacher"):
        demo.model.save_pretrained(tmp_path / name)
        demo.processor.save_pretrained(tmp_path / name)
    for part, images in (("train", demo.splits["train"]), ("test", demo.splits["base"])):
        for label, name in enumerate(images.features["label"].names[:3]):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in [i for i, y in enumerate(images["label"][:]) if y == label][:10]:
                images[i]["image"].save(folder / f"{i}.png")
    arguments = ["--num_train_epochs", "2", "--batch_size", "10", "--model_name_or_path", str(tmp_path / "student")]
    arguments += ["--teacher_name_or_path", str(tmp_path / "teacher"), "--dataset_name", str(tmp_path / "images")]
    run_example("train_promptkd.py", *arguments, "--output_dir", str(tmp_path / "out"), monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "27 unlabelled images, 3 classes" in out  # a tenth became a part `validation`
    table = printed(out)
    assert table["zero-shot"][0] == table["teacher"][0]
    assert len(table["student"]) == 2
    assert table["student"][1] == MARK


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", str(ROOT / "examples/recipes/vpt.yaml")], "projector"),
        (["--dataset_name", "somewhere"], "--teacher_name_or_path"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(arguments, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        run_example("train_promptkd.py", *arguments, "--output_dir", str(tmp_path), monkeypatch=monkeypatch)
