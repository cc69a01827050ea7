"""The protocol examples, short; and the recipes and logs that they go with."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from peft_ncgeo.data import load_demo
from peft_ncgeo.data.demo import ASSETS
from peft_ncgeo.protocols import Results
from peft_ncgeo.training import Recipe

from ..small_demo import PHOTOGRAPHS, VIEWS
from .test_examples import ROOT, run_example

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.usefixtures("small_demo")]
RECIPES = sorted((ROOT / "examples" / "recipes").rglob("*.yaml"))
DEMO = ROOT / "examples" / "recipes" / "demo"
MODEL = str(ASSETS / "mini_clip")
OF_PEFT = {"clip_lora", "ln_tuning"}
HEADS = {"tip_adapter", "tip_adapter_f", "gda", "lp_plus_plus", "clap", "nearest_class_mean", "linear_probe"}
METHODS = {"coop", "vpt", "ivlp", "maple", "promptsrc", "prompt_ot", "npt_v1", "npt_v2", "cpt"}


def test_every_recipe_is_read():
    for path in RECIPES:
        recipe = Recipe.read(path)
        for part in [] if path.stem in HEADS else recipe.stages or [recipe]:
            assert part.config is not None or part.rows, path
            assert part.args.get("num_train_epochs", 0) > 0 or part.args["max_steps"] > 0, path


def test_there_is_a_recipe_for_every_method():
    assert {path.stem for path in RECIPES if path.parent.name == "recipes"} >= METHODS
    extra = {"budget", "ot_budget", "two_stages", "adaptformer"}
    ours = {"lora_budget"}
    assert all(Recipe.read(DEMO / f"{name}.yaml").source.keys() == {"head"} for name in HEADS)
    assert METHODS | OF_PEFT | HEADS | extra | ours == {path.stem for path in DEMO.glob("*.yaml")}


@pytest.mark.slow
def test_base_new_on_the_demo(tmp_path, monkeypatch, capsys):
    arguments = ["--recipes", str(DEMO / "budget.yaml"), "--seeds", "1"]
    arguments += ["--tails", "tau=0.06", "--split", "development", "--num_train_epochs", "1"]
    run_example("benchmark_base_new.py", *arguments, "--output_dir", str(tmp_path), monkeypatch=monkeypatch)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [(m, 1) for m in ("zero-shot", "budget")]
    assert all(0 < row[c] < 100 for row in rows for c in ("base", "new", "H", "many", "medium", "few", "kept"))
    assert rows[0]["realised_imbalance_factor"] == 16
    out = capsys.readouterr().out
    assert "| tau=0.06 | budget |" in out
    assert "mini-CLIP on the demo's development split" in out


def test_base_new_trains_on_each_artist_too(tmp_path, monkeypatch, capsys):
    script, asked = runpy.run_path(str(ROOT / "examples" / "benchmark_base_new.py")), []

    def protocol(recipes, train, test, *others, tails, **arguments):
        asked.append(({name: len(images) for name, images in test.items()}, list(tails), len(train(1, 2))))
        (extra,) = [c for c in ("H", "H_other") if c == "H" or "base_other" in test][-1:]
        return Results([{"setting": s, "method": "zero-shot", "seed": 1, extra: 1.0} for s in tails], [extra])

    monkeypatch.setitem(script["main"].__globals__, "base_to_new", protocol)
    arguments = ["--tails", "tau=1", "IF 10", "--recipes", str(DEMO / "coop.yaml"), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmark_base_new.py", *arguments])
    script["main"]()
    views, kept = 30 * VIEWS, 10 * PHOTOGRAPHS  # of one artist
    both, one = {"base": 2 * views, "new": 2 * views, "kept": kept}, {"base": views, "new": views, "kept": kept}
    one |= {"base_other": views, "new_other": views}
    alone = [(one, [f"tau=1, {artist} alone"], 60) for artist in ("twemoji", "emojione")]
    assert asked == [(both, ["tau=1", "IF 10"], 60), *alone]
    assert json.loads((tmp_path / "results.json").read_text())["columns"] == ["H", "H_other", "trainable", "seconds"]


@pytest.fixture(scope="module")
def own_set(small_demo, tmp_path_factory) -> tuple[Path, Path]:
    """An image folder of six classes, and the YAML file that describes it."""
    folder = tmp_path_factory.mktemp("own")
    images = load_demo("development", shots=40).splits["train"]
    for part, first in (("train", 0), ("test", 20)):
        for label, name in enumerate(images.features["label"].names[:6]):
            (folder / part / name).mkdir(parents=True)
            for i in range(20):
                images[40 * label + first + i]["image"].save(folder / part / name / f"{i}.png")
    described = folder / "own.yaml"
    described.write_text(
        f"path: {folder}\nnum_classes: 6\ntemplate: 'an emoji of a {{}}.'\nshots: 4\nimbalance_factor: 5\nn_max: 10\n"
    )
    return folder, described


@pytest.mark.slow
def test_base_new_on_a_set_of_ones_own(own_set, tmp_path, monkeypatch):
    folder, described = own_set
    arguments = ["--dataset", str(described), "--data_dir", str(folder), "--recipes", str(DEMO / "coop.yaml")]
    with pytest.raises(SystemExit):
        run_example("benchmark_base_new.py", *arguments, monkeypatch=monkeypatch)
    arguments += ["--model_name_or_path", MODEL]
    arguments += ["--seeds", "1", "--tails", "tau=1", "--num_train_epochs", "1", "--output_dir", str(tmp_path)]
    run_example("benchmark_base_new.py", *arguments, monkeypatch=monkeypatch)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["zero-shot", "coop"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("protocol", "own"),
    [("cross_dataset", True), ("domain_generalisation", False), ("long_tail", True)],
    ids=["cross_dataset, own", "domain_generalisation, demo", "long_tail, own"],
)
def test_transfer(protocol, own, own_set, tmp_path, monkeypatch, capsys):
    arguments = [protocol, "--recipes", str(DEMO / "ivlp.yaml"), "--seeds", "1", "--num_train_epochs", "1"]
    arguments += ["--output_dir", str(tmp_path)]
    if own:
        arguments += ["--model_name_or_path", MODEL, "--data_dir", str(own_set[0])]
        arguments += ["--source", str(own_set[1]), "--targets", str(own_set[1])]
    run_example("benchmark_transfer.py", *arguments, monkeypatch=monkeypatch)
    rows = json.loads((tmp_path / protocol / "results.json").read_text())["rows"]
    assert sorted(row["method"] for row in rows) == ["ivlp", "zero-shot"]
    column = "all" if protocol == "long_tail" else "average"
    assert all(0 < row[column] < 100 for row in rows)
    assert "| ivlp |" in capsys.readouterr().out


@pytest.mark.slow
def test_npt(own_set, tmp_path, monkeypatch, capsys):
    short = ["--num_train_epochs", "1", "--output_dir", str(tmp_path)]
    run_example("train_npt.py", *short, monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    images = sum(max(1, round(16 * 0.06 ** (k / 29))) for k in range(30))
    assert f"npt_v2: {images} images, 16 to 1 a class" in out
    assert "| harmonic mean |" in out
    assert (tmp_path / "adapter_model.safetensors").exists()
    run_example("train_npt.py", *short, "--dataset_name", str(own_set[0]), "--shots", "8", monkeypatch=monkeypatch)
    assert "8 to 1 a class" in capsys.readouterr().out


def test_import_benchmark_compares_what_comes_on_top_of_an_empty_process(capsys, monkeypatch):
    script = runpy.run_path(str(ROOT / "examples" / "benchmark_import.py"))
    seconds = {script["NOTHING"]: 0.5, script["HOST"]: 4.5, script["PLUGIN"]: 5.5}
    monkeypatch.setitem(script["main"].__globals__, "cpu_seconds", seconds.get)
    monkeypatch.setattr(sys, "argv", ["benchmark_import.py"])
    script["main"]()
    host, plugin, ratio = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (float(host[0]), float(plugin[0]), float(ratio[0])) == (4.0, 5.0, 1.25)
    assert script["cpu_seconds"]("sum(range(10**6))") > 0


@pytest.mark.slow
def test_geometry_benchmark_measures_a_size_in_its_own_process(monkeypatch, capfd):
    run_example("benchmark_geometry.py", "--classes", "40", "--dim", "16", monkeypatch=monkeypatch)
    rows = [line.split("|")[1:-1] for line in capfd.readouterr().out.splitlines()]
    assert [row[0].strip() for row in rows] == ["classes", "---", "40"]
    assert all(float(cell.replace(",", "")) >= 0 for row in rows[2:] for cell in row)


@pytest.mark.slow
def test_names_benchmark_measures_on_top_of_the_model(monkeypatch, capfd):
    run_example("benchmark_names.py", "--names", "400", "--layers", "1", monkeypatch=monkeypatch)
    row = capfd.readouterr().out.splitlines()[-1].split("|")[1:-1]
    names, a_thousand, ranked, above, model = (float(cell.replace(",", "")) for cell in row)
    assert names == 400
    assert a_thousand > 0 <= ranked
    assert 0 <= above < 1024  # 0 where making the model took more
    assert model > 100
