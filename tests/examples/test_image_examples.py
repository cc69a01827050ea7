"""The examples on image classifiers: space alignment and prototypes, on the demo and on images of one's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_ncgeo import ZeroShotClassifier
from peft_ncgeo.data import load_demo, load_image_demo
from peft_ncgeo.hub import load_adapter
from peft_ncgeo.models.heads import linear_classifier
from peft_ncgeo.protocols import Results
from peft_ncgeo.training import Recipe

from ..launching import launch_script
from .test_examples import ROOT, run_example, updated

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("small_demo")]
DEMO, RESULTS = ROOT / "examples" / "recipes" / "images" / "demo", ROOT / "examples" / "results"
SHORT = ["--num_train_epochs", "1"]


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> list[str]:
    """A model folder and an image folder of four classes, as arguments."""
    folder = tmp_path_factory.mktemp("own")
    demo = load_image_demo()
    demo.model.save_pretrained(folder / "model")
    demo.processor.save_pretrained(folder / "model")
    for part in ("train", "test"):
        images = demo.splits[part]
        labels = images["label"][:]
        for label, name in enumerate(images.features["label"].names[:4]):
            (folder / "images" / part / name).mkdir(parents=True)
            rows = [i for i, y in enumerate(labels) if y == label][:24]
            for i in rows:
                images[i]["image"].save(folder / "images" / part / name / f"{i}.png")
    return ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "images")]


def printed(out: str) -> dict[str, list[float]]:
    """The rows of the table that was printed."""
    found = re.findall(r"^\| ([\w ]+?) \| ([\d.-]+) \| ([\d.-]+) \|$", out, flags=re.MULTILINE)
    return {title: [float(a), float(b)] for title, a, b in found}


@pytest.mark.slow
def test_space_alignment(tmp_path, monkeypatch, capsys):
    arguments = [*SHORT, "--align", "slerp", "--imbalance_factor", "10", "--n_max", "50"]
    run_example("train_space_alignment.py", *arguments, "--output_dir", str(tmp_path), monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    images = sum(int(50 * 0.1 ** (k / 9) + 1e-6) for k in range(10))
    assert f"vit_lora, --align slerp: {images} images, 50 to 5 a class" in out
    table = printed(out)
    assert {"accuracy", "alignment", "nc1", "nc2", "nc3", "many", "medium", "few"} <= table.keys()
    assert (tmp_path / "alignment.png").stat().st_size > 10_000
    # the saved adapter has the aligned head: it scores what the table says
    demo = load_image_demo()
    model = PeftModel.from_pretrained(demo.model, tmp_path).eval()
    test = demo.splits["test"]
    pixels = demo.processor(images=test["image"][:], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        predicted = torch.cat([model(pixel_values=part).logits.argmax(1) for part in pixels.split(500)])
    right = (predicted == torch.tensor(test["label"][:])).float().mean()
    assert table["accuracy"][1] == pytest.approx(float(right), abs=6e-4)


@pytest.mark.slow
def test_space_alignment_of_own_images(own, tmp_path, monkeypatch, capsys):
    arguments = [*SHORT, *own, "--align", "reg", "--imbalance_factor", "4", "--output_dir", str(tmp_path)]
    run_example("train_space_alignment.py", *arguments, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "images, 22 to 5 a class" in out  # two of 24 were held out for validation
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 18  # q and v of four layers, and the head


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train_space_alignment.py", ["--align", "other"], "--align other must be one of none, reg, slerp, proj"),
        ("train_space_alignment.py", ["--imbalance_factor", "0", "--n_max", "5"], "--n_max needs a tail"),
        ("train_image_classifier.py", ["--adapter", "other"], "--adapter other must be one of lora, prompts"),
        ("train_prototypes.py", ["--recipe", str(DEMO / "vit_lora.yaml")], "names no PrototypeConfig"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(name, arguments, message, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        run_example(name, *arguments, "--output_dir", str(tmp_path), monkeypatch=monkeypatch)


@pytest.mark.slow
def test_prototypes(tmp_path, monkeypatch, capsys):
    arguments = [*SHORT, "--geometry", "minority_margin", "--ratio", "50", "--output_dir", str(tmp_path)]
    run_example("train_prototypes.py", *arguments, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "prototypes, minority_margin: 1275 images, 250 to 5 a class" in out
    table = printed(out)
    assert table["of large classes"][1] > table["of large classes"][0]
    assert table["test images"][1] == pytest.approx(
        (table["of large classes"][1] + table["of small classes"][1]) / 2, abs=2e-3
    )
    assert (tmp_path / "prototypes.png").stat().st_size > 10_000
    model = PeftModel.from_pretrained(load_image_demo().model, tmp_path)
    weight = linear_classifier(model).weight
    cosines = (weight @ weight.T).fill_diagonal_(-1)
    assert cosines[5:, 5:].max() < cosines[:5, :5].max() - 0.1  # wider angles between the small classes


@pytest.mark.slow
def test_prototypes_of_own_images(own, tmp_path, monkeypatch, capsys):
    run_example(
        "train_prototypes.py", *SHORT, *own, "--ratio", "0", "--output_dir", str(tmp_path), monkeypatch=monkeypatch
    )
    out = capsys.readouterr().out
    assert "88 images, 22 to 22 a class" in out
    assert "of small classes" not in out


@pytest.mark.slow
def test_an_image_classifier_of_the_demos_clip(tmp_path, monkeypatch, capsys):
    """It starts at zero-shot, and loads without a word about its base."""
    run_example("train_image_classifier.py", *SHORT, "--output_dir", str(tmp_path), monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "cosine head from texts, lora: 480 images" in out
    table, demo = printed(out), load_demo()
    names, test = demo.splits["base"].features["label"].names, demo.splits["base"]
    zero_shot = ZeroShotClassifier(demo.model, demo.processor).predict(test["image"][:], names)
    right = [names[label] == name for label, name in zip(test["label"][:], zero_shot, strict=True)]
    assert table["accuracy"][0] == pytest.approx(sum(right) / len(right), abs=6e-4)
    model = load_adapter(tmp_path)
    pixels = demo.processor.image_processor(images=test["image"][:], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        predicted = torch.cat([model(pixel_values=part).logits.argmax(1) for part in pixels.split(500)])
    accuracy = (predicted == torch.tensor(test["label"][:])).float().mean()
    assert table["accuracy"][1] == pytest.approx(float(accuracy), abs=6e-4)
    assert table["accuracy"][1] > table["accuracy"][0]


@pytest.mark.slow
def test_an_image_classifier_of_a_backbone(own, tmp_path, monkeypatch, capsys):
    """The images of one's own, and a ViT without its head."""
    load_image_demo().model.base_model.save_pretrained(tmp_path / "vit")
    load_image_demo().processor.save_pretrained(tmp_path / "vit")
    arguments = [*SHORT, "--dataset_name", own[3], "--model_name_or_path", str(tmp_path / "vit")]
    arguments += ["--init", "means", "--head", "linear", "--adapter", "prompts"]
    run_example(
        "train_image_classifier.py", *arguments, "--output_dir", str(tmp_path / "out"), monkeypatch=monkeypatch
    )
    out = capsys.readouterr().out
    assert "linear head from means, prompts: 88 images" in out
    assert printed(out)["accuracy"][0] > 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_space_alignment.py", "train_prototypes.py"])
def test_two_processes_end_and_report_once(name, own, tmp_path):
    arguments = [*SHORT, *own, "--output_dir", str(tmp_path)]
    printed = launch_script(ROOT / "examples" / name, *arguments, out=tmp_path)
    assert printed.count(f"Adapter and figure in {tmp_path}") == 1


@pytest.mark.slow
def test_table_of_space_alignment(tmp_path, monkeypatch, capsys):
    """Plain runs bring a post-hoc row, aligned ones do not; the control is there for cross-entropy only."""
    arguments = ["--adapters", "lora", "--losses", "CE", "--imbalance_factors", "200", "--seeds", "1"]
    arguments += ["--num_train_epochs", "0.2", "--output_dir", str(tmp_path)]
    run_example("benchmark_space_alignment.py", *arguments, monkeypatch=monkeypatch)
    content = json.loads((tmp_path / "results.json").read_text())
    rows = {row["method"]: row for row in content["rows"]}
    assert list(rows) == ["CE", "CE + Reg", "CE + SLERP", "CE + Proj", "CE - Reg", "CE + post-hoc"]
    for row in rows.values():
        assert 0 < row["all"] < 100
        assert {"many", "medium", "few", "nc1", "nc2", "nc3", "exponent_ratio", "class_exponent"} <= row.keys()
        assert -1 <= row["alignment"] <= 1
    assert rows["CE + post-hoc"]["nc1"] == pytest.approx(rows["CE"]["nc1"])  # features are the same
    assert rows["CE + post-hoc"]["alignment"] > rows["CE"]["alignment"]
    assert rows["CE"]["realised_imbalance_factor"] == 200
    assert "| lora, IF 200 | CE + post-hoc |" in capsys.readouterr().out


@pytest.mark.slow
def test_table_of_prototypes(tmp_path, monkeypatch, capsys):
    arguments = ["--backbones", "resnet", "--ratios", "100", "--seeds", "1", "--output_dir", str(tmp_path)]
    run_example(
        "benchmark_prototypes.py", *arguments, "--copies", "10", "--num_train_epochs", "0.05", monkeypatch=monkeypatch
    )
    rows = {row["method"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert list(rows) == [
        "SupCon, no prototypes",
        "etf, 10 copies",
        "etf, cross-entropy",
        "minority_margin, 10 copies",
        "minority_margin, cross-entropy",
        "trained prototypes, 100 copies",
    ]
    for row in rows.values():
        assert 0 <= row["train_gram_distance"] <= 2
        assert all(0 <= row[c] <= 100 for c in ("all", "many", "few", "mean_all", "mean_many", "mean_few"))
        assert row["all"] == pytest.approx((row["many"] + row["few"]) / 2)
    assert "majority, nearest mean" in capsys.readouterr().out


@pytest.mark.slow
def test_cost_of_copies(monkeypatch, capsys):
    """Memory kept for the backward pass does not depend on the number of copies; concatenated, it does."""
    run_example("benchmark_prototypes.py", "--cost", "--rounds", "1", monkeypatch=monkeypatch)
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if re.match(r"\| \d", line)]
    assert [int(line[1]) for line in lines] == [10, 50, 100, 1000]
    assert len({line[3] for line in lines}) == 1
    assert float(lines[-1][5]) > 50 * float(lines[0][5]) > 0


def test_recipes_hold_what_validation_chose():
    log = json.loads((RESULTS / "tune_space_alignment.json").read_text())
    for adapter, recipe in (("lora", "vit_lora"), ("prompts", "vit_prompts")):
        rates = [entry for entry in log if (entry["adapter"], entry["step"]) == (adapter, "learning_rate")]
        best = max(rates, key=lambda entry: sum(entry["validation"]))
        source = Recipe.read(DEMO / f"{recipe}.yaml").source
        assert source["args"]["learning_rate"] == best["part"]["args"]["learning_rate"]
    text = (ROOT / "examples" / "benchmark_space_alignment.py").read_text()
    for step, written in (("Reg", '{{"weight": {}}}'), ("SLERP", '{{"alpha": {}}}')):
        totals: dict[float, float] = {}
        for entry in log:
            if entry["step"] == step:
                (((term,),),) = (part.values() for part in (entry["part"],))
                ((value,),) = (fields.values() for fields in term.values())
                totals[value] = totals.get(value, 0) + sum(entry["validation"])
        best = max(totals, key=totals.get)
        shown = f"{best:g}".replace("e-0", "e-")
        assert f'" + {step}"' in text
        assert written.format(shown) in text.split(f'" + {step}"')[1].splitlines()[0]


def test_prototype_settings_are_those_of_the_search():
    path = RESULTS / "tune_prototypes.json"
    log = json.loads(Path(path).read_text())
    text = (ROOT / "examples" / "benchmark_prototypes.py").read_text()
    for backbone in ("vit", "resnet"):
        best = max((e for e in log if e["backbone"] == backbone), key=lambda entry: sum(entry["validation"]))
        assert (
            f'"{backbone}": {{"learning_rate": {best["learning_rate"]:g}, "temperature": {best["temperature"]:g}}}'
            in text
        )


def fake_rows(settings, methods, columns):
    return [
        {"setting": s, "method": m, "seed": seed, **{c: 10.0 * j + i + seed for i, c in enumerate(columns)}}
        for s in settings
        for j, m in enumerate(methods)
        for seed in (1, 2, 3)
    ]


def test_tables_are_written_into_the_page(tmp_path, monkeypatch):
    """Paired changes against the plain run of the same loss, over settings and seeds; figures and logs beside it."""
    columns = ["all", "few", "alignment", "nc1", "fraction"]
    turns = ["CE", "CE + Reg", "CE + SLERP", "CE - Reg", "CE + post-hoc"]
    rows = fake_rows(["lora, IF 10", "lora, IF 100", "prompts, IF 10"], turns, columns)
    for row in rows:
        if row["method"] == "CE + SLERP" and row["seed"] == 3:
            row["all"] += 3
    folder = tmp_path / "outputs" / "space_alignment"
    Results(rows, columns, "a note").save(folder)
    for adapter in ("lora", "prompts"):
        sweep = [{"fraction": f, "accuracy": f / 2} for f in (0.0, 0.5, 1.0)]
        kept = {"setting": "IF 100", "method": "CE", "seed": 1, "validation_sweep": sweep}
        Results([kept], [], "").save(folder / adapter)
    methods = ["SupCon, no prototypes", "etf, 10 copies", "etf, cross-entropy", "trained prototypes, 100 copies"]
    rows = fake_rows(["vit, R = 10"], methods, ["train_gram_distance", "all", "few"])
    Results(rows, ["all"], "another note").save(tmp_path / "outputs" / "prototypes_table")
    page = tmp_path / "README.md"
    page.write_text("".join(f"<!-- {m} table -->\n<!-- end of {m} table -->\n" for m in ("alignment", "prototypes")))
    text = updated(page, monkeypatch)
    assert "| lora, all | plain | Reg | SLERP | Proj | - Reg | post-hoc |" in text
    # 20 above plain, and 23 in two of the six runs
    assert "| CE | 2.0 | +10.0 ± 0.0 | +21.0 ± 0.6 |  | +30.0 ± 0.0 | +40.0 ± 0.0 |" in text
    assert "| lora, IF 100 | CE + post-hoc |" in text
    assert "| lora, IF 10 |" not in text  # one setting in full; all of them in the file
    results = tmp_path / "examples" / "results"
    assert "| prompts, IF 10 | CE + Reg |" in (results / "space_alignment_demo.md").read_text()
    assert "| vit, R = 10 | etf, 10 copies |" in text
    assert (results / "post_hoc_fraction.png").exists()
    assert (results / "prototype_copies.png").exists()
    assert len(json.loads((results / "prototypes_demo.json").read_text())["rows"]) == 12


@pytest.mark.slow
def test_an_image_classifier_by_the_recipe_of_lift(tmp_path, monkeypatch, capsys):
    """The demo's CLIP has 4 blocks and 30 classes: bottlenecks of 2. Five crops of a test image are classified."""
    recipe = ROOT / "examples" / "recipes" / "images" / "lift_cifar100_lt.yaml"
    arguments = ["--recipe", str(recipe), *SHORT, "--output_dir", str(tmp_path), "--batch_size", "64"]
    run_example("train_image_classifier.py", *arguments, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    images = sum(int(16 * 0.01 ** (k / 29) + 1e-6) or 1 for k in range(30))
    assert f"cosine head from texts, lift_cifar100_lt: {images} images" in out
    model, demo = load_adapter(tmp_path), load_demo()
    config = model.peft_config["default"]
    assert (config.peft_type.value, config.bottleneck_dim) == ("NCGEO_ADAPTFORMER", 2)
    size, test = demo.processor.image_processor.crop_size["width"], demo.splits["base"]
    wide = round(size * 248 / 224)
    far = wide - size
    corners = [(0, 0), (far, 0), (0, far), (far, far), (round(far / 2), round(far / 2))]
    logits, images = [], [image.convert("RGB").resize((wide, wide), 3) for image in test["image"]]
    for x, y in corners:
        crops = [image.crop((x, y, x + size, y + size)) for image in images]
        pixels = demo.processor.image_processor(images=crops, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits.append(torch.cat([model(pixel_values=part).logits for part in pixels.split(500)]))
    right = (torch.stack(logits).mean(0).argmax(1) == torch.tensor(test["label"][:])).float().mean()
    assert printed(out)["accuracy"][1] == pytest.approx(float(right), abs=6e-4)
