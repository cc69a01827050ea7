"""The search for settings: the same number of runs for every method, from data, with a log."""

from __future__ import annotations

import json
import random
import runpy
import sys
from pathlib import Path

import pytest

from peft_ncgeo.files import read_yaml
from peft_ncgeo.protocols import Results
from peft_ncgeo.training import Recipe

from .test_examples import ROOT, run_example

RECIPES = ROOT / "examples" / "recipes"
DEMO, TAIL = RECIPES / "demo", ROOT / "examples" / "search" / "image_tail.yaml"
SPACES = sorted(set(TAIL.parent.glob("*.yaml")) - {TAIL})
LOGS = sorted((ROOT / "examples" / "results" / "search").glob("*.json"))


@pytest.fixture(scope="module")
def script() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))  # as Python does for a script
        return runpy.run_path(str(ROOT / "examples" / "search_recipes.py"))


def test_each_axis_starts_from_the_best_so_far(script):
    """By hand: rate 2 of (1, 2), then budget 5 of (5, 7), then rate 2 * 3; a configuration is run once."""
    start = {"args": {"rate": 1, "epochs": 15}, "losses": [{"A": {"budget": 3}}, {"B": {"budget": 3}}]}
    axes = [
        [{"args.rate": 1}, {"args.rate": 2}],
        [{"losses.0.A.budget": 5}, {"losses.0.A.budget": 7}],
        [{"args.rate": {"times": 3}}, {"args.rate": 2}, {"args.rate": 1, "losses.*.*.budget": {"times": 0.1}}],
        [{"args.rate": 9}],
    ]

    def score(recipes):
        first = [recipe["losses"][0]["A"]["budget"] for recipe in recipes]
        rates = [recipe["args"]["rate"] for recipe in recipes]
        return [{"score": -abs(r - 6) - abs(a - 5), "validation": -r} for r, a in zip(rates, first, strict=True)]

    runs = script["search"](start, axes, score, most=6)
    assert [run["changes"] for run in runs] == [
        {"args.rate": 1},
        {"args.rate": 2},
        {"args.rate": 2, "losses.0.A.budget": 5},
        {"args.rate": 2, "losses.0.A.budget": 7},
        {"args.rate": 6, "losses.0.A.budget": 5},
        {"args.rate": 1, "losses.0.A.budget": 0.5, "losses.1.B.budget": 0.3},
    ]
    assert runs[4]["recipe"] == {
        "args": {"rate": 6, "epochs": 15},
        "losses": [{"A": {"budget": 5}}, start["losses"][1]],
    }
    log = script["log_of"]("any", start, runs, script["BaseToNew"]())
    assert (log["chosen"]["run"], log["chosen"]["score"]) == (5, 0)
    assert log["by_validation_alone"] == {"run": 1, "score": -7}
    for wrong in ({"losses.2.A.budget": 1}, {"other.rate": 1}, {"losses": {"times": 2}}):
        with pytest.raises(ValueError, match="does not fit the recipe"):
            script["changed"](start, wrong)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_method_has_twelve_runs_whatever_they_score(script, path):
    """Those of demo.yaml; what is fitted on cached features may have less to choose."""
    spaces, raw = script["read_space"](path, DEMO), read_yaml(path, "")["methods"]
    for method, (start, axes) in spaces.items():
        for draw in map(random.Random, range(30)):
            runs = script["search"](
                start, axes, lambda recipes, draw=draw: [{"score": draw.random()} for _ in recipes]
            )
            assert len(runs) == 12 or (path.stem != "demo" and 0 < len(runs) < 12), method
            assert len({json.dumps(run["recipe"], sort_keys=True) for run in runs}) == len(runs)
            # a search of what a search has written is the same search
            again = script["changed"](runs[-1]["recipe"], raw[method]["start"])[0]
            if "args.learning_rate" not in raw[method]["start"] and "args" in start:
                assert len({run["recipe"]["args"]["learning_rate"] for run in runs[:4]}) == 4, method
                again["args"]["learning_rate"] = start["args"]["learning_rate"]
            assert again == start, method


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"start": {}, "axes": ["rate"]}, "no 'rate'"),
        ({"strat": {}, "axes": ["rates"]}, "no 'start'"),
        ({"start": {}, "axes": [[]]}, "no change"),
        ({"start": {}, "axes": [{"args.learning_rate": 1}]}, "lists of changes"),
        ({"start": {}, "axes": [[{"args.learning_ratee": 1}]]}, "'learning_rate'"),
    ],
)
def test_a_mistake_in_a_space_is_named_before_any_run(script, tmp_path, space, named):
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps({"shared": {"rates": [{"args.learning_rate": 1}]}, "methods": {"coop": space}}))
    with pytest.raises(ValueError, match=named) as error:
        script["read_space"](path, DEMO)
    assert str(path) in str(error.value)


def test_the_choice_is_logged_and_written(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "coop.yaml").write_text("# Head.\n" + (DEMO / "coop.yaml").read_text())
    space = tmp_path / "space" / "own.yaml"
    space.parent.mkdir()
    axes = [["rates", [{"classification_loss": {"LogitAdjustment": {}}}]], ["rates"]]
    methods = {name: {"start": {"args.num_train_epochs": 15}, "axes": axes[0]} for name in ("coop",)}
    space.write_text(
        json.dumps({"shared": {"rates": [{"args.learning_rate": 1}, {"args.learning_rate": 2}]}, "methods": methods})
    )
    few = {"seconds": 1.0, "cpu_seconds": 1.0, "base": 1.0, "new": None, "new_other": None, "H": None, "H_other": None}

    def score(recipes):
        rates = [recipe["args"]["learning_rate"] for recipe in recipes]
        return [{**few, "score": rate, "validation": rate, "base_other": rate} for rate in rates]

    monkeypatch.setitem(script["main"].__globals__, "scorer", lambda method, folder, task: score)
    arguments = ["--spaces", str(space), "--recipes", str(tmp_path), "--log_dir", str(tmp_path), "--write"]
    monkeypatch.setattr(sys, "argv", ["search_recipes.py", *arguments])
    script["main"]()
    log = json.loads((tmp_path / "coop.json").read_text())
    assert [run["axis"] for run in log["runs"]] == [1, 1, 2]
    assert log["chosen"]["run"] == 2
    assert Recipe.read(tmp_path / "coop.yaml").source == log["chosen"]["recipe"]
    assert (tmp_path / "coop.yaml").read_text().startswith("# Head.\n# CoOp, on the built-in demo.\n")
    assert "| **2: args.learning_rate: 2** | 2.0 | - | - | 1.0 |" in capsys.readouterr().out
    other = tmp_path / "space" / "tail.yaml"  # the same name in another task is another search
    tail = {"long_tail": {"recipes": "", "logs": "tail", "imbalance_factors": [9], "n_max": 20, "seed": 1}}
    other.write_text(json.dumps({"task": tail, **json.loads(space.read_text())}))
    monkeypatch.setattr(script["LongTail"], "scores", ("validation",))
    monkeypatch.setattr(
        sys, "argv", ["search_recipes.py", "--spaces", str(other), *arguments[1:], "--methods", "coop"]
    )
    script["main"]()
    assert {path.parent.name for path in tmp_path.rglob("coop.json")} == {tmp_path.name, "tail"}
    monkeypatch.setattr(sys, "argv", ["search_recipes.py", *arguments, "--methods", "cop"])
    with pytest.raises(SystemExit):
        script["main"]()
    assert "method 'cop'" in capsys.readouterr().err


def test_every_image_classifier_has_twelve_runs_over_the_same_epochs(script):
    task, spaces = script["read_task"](TAIL), script["read_space"](TAIL, RECIPES / "images" / "demo")
    assert (task.imbalance_factors, task.recipes, task.logs) == ([10, 100], "images/demo", "image_tail")
    losses = {"ce", "balanced_softmax", "logit_adjustment", "ldam", "lift", "budget"}
    losses |= {f"spa_{way}" for way in ("reg", "slerp", "proj", "post_hoc")}
    fixed = {"etf", "minority_margin", "minority_margin_balanced"}
    pairs = {f"{adapter}_{m}" for adapter in ("lora", "prompts") for m in losses | fixed}
    assert set(spaces) == pairs | {f"adaptformer_{m}" for m in losses}
    for method, (start, axes) in spaces.items():
        for draw in map(random.Random, range(10)):
            runs = script["search"](start, axes, lambda rs, draw=draw: [{"score": draw.random()} for _ in rs])
            assert len(runs) == 12, method
            epochs = {run["recipe"]["args"]["num_train_epochs"] for run in runs}
            assert epochs == {8, 16, 30}, method
    assert spaces["prompts_balanced_softmax"][0]["classification_loss"] == {"BalancedSoftmax": {}}
    assert spaces["lora_budget"][0]["peft"]["LoraConfig"]["target_modules"] == "all-linear"
    assert spaces["lora_ce"][0]["peft"]["LoraConfig"]["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.slow
@pytest.mark.usefixtures("small_demo")
def test_a_tail_is_searched_on_validation_photographs_and_tabled_on_test_ones(script, tmp_path, monkeypatch):
    """Real trainings of two short runs; prototypes get the counts of their tail, and a turned head is another head."""
    spaces = script["read_space"](TAIL, RECIPES / "images" / "demo")
    short = {"args.num_train_epochs": 1}
    task = script["LongTail"]("images/demo", "image_tail", [100], 20, 11)
    found, counts = {}, []
    make = Recipe.from_dict

    def seen(name: str, content: dict, path: str | None = None) -> Recipe:
        counts.extend(c["class_counts"] for c in content["peft"].values() if "class_counts" in c)
        return make(name, content, path)

    monkeypatch.setattr(Recipe, "from_dict", seen)
    for method in ("adaptformer_ce", "adaptformer_spa_post_hoc", "prompts_minority_margin"):
        recipe = script["changed"](spaces[method][0], short)[0]
        (run,) = script["scorer"](method, tmp_path / method, task)([recipe])
        found[method] = run["validation"]
        log = script["log_of"](method, recipe, [{"changes": {}, "recipe": recipe, **run}], task)
        assert log["chosen"]["score"] == run["validation"]
        assert "IF 100" in log["criterion"]
        assert round(5 * run["validation"], 6) == round(5 * run["validation"])  # 500 photographs
        (tmp_path / "logs").mkdir(exist_ok=True)
        (tmp_path / "logs" / f"{method}.json").write_text(json.dumps(log))
    assert found["adaptformer_ce"] != found["adaptformer_spa_post_hoc"]
    tail = [max(1, int(20 * 0.01 ** (k / 9) + 1e-6)) for k in range(10)]
    assert sorted(counts[0], reverse=True) == tail
    assert counts[0] != tail  # the seed draws the classes
    arguments = ["--logs", str(tmp_path / "logs"), "--output_dir", str(tmp_path / "table"), "--seeds", "1"]
    arguments += ["--imbalance_factors", "100", "--num_train_epochs", "1", "--methods", "adaptformer_ce"]
    run_example("benchmark_image_tail.py", *arguments, monkeypatch=monkeypatch)
    (row,) = json.loads((tmp_path / "table" / "results.json").read_text())["rows"]
    assert row["method"] == "adaptformer_ce"
    assert round(20 * row["all"], 6) == round(20 * row["all"])  # 2,000 photographs
    assert all(row[c] is not None for c in ("many", "few", "all_alignment", "all_nc1", "trainable", "seconds"))
    with pytest.raises(SystemExit):
        run_example("benchmark_image_tail.py", *arguments, "coop", monkeypatch=monkeypatch)


def test_the_page_of_tails_compares_under_the_same_adapter(tmp_path, monkeypatch):
    shift = {"lora_balanced_softmax": 0, "lora_minority_margin": -2, "prompts_balanced_softmax": 5, "prompts_ce": 1}
    shift["lora_budget"] = 8
    rows = [
        {"setting": s, "method": m, "seed": seed, "all": 50 + d + seed, "few": 40 + 2 * d + seed, "cpu_seconds": 900}
        for s in ("IF 10", "IF 100")
        for m, d in shift.items()
        for seed in (1, 2, 3)
    ]
    Results(rows, ["all"], "A note.").save(tmp_path / "outputs")
    runs = [{"run": 1, "changes": {"args.learning_rate": 0.5}, "validation": 51.0, "cpu_seconds": 1800.0}]
    (tmp_path / "logs").mkdir()
    log = {"method": "lora_ce", "runs": runs, "chosen": {"run": 1}}
    (tmp_path / "logs" / "lora_ce.json").write_text(json.dumps(log))
    page, arguments = tmp_path / "page.md", ["--kept", str(tmp_path), "--logs", str(tmp_path / "logs")]
    arguments += ["--page", str(tmp_path / "page.md"), "--outputs"]
    with pytest.raises(SystemExit):
        run_example("write_image_tail.py", *arguments, str(tmp_path / "none"), monkeypatch=monkeypatch)
    run_example("write_image_tail.py", *arguments, str(tmp_path / "outputs"), monkeypatch=monkeypatch)
    text = page.read_text()
    assert "| prompts_ce | -4.0 ± 0.0 | -4.0 ± 0.0 | -4.0 ± 0.0 |" in text
    everything, _, few = text.partition("## The third of the classes")
    assert everything.count("| balanced_softmax | 52.0 ± 1.0 | 57.0 ± 1.0 |") == 2  # a table for each tail
    assert few.count("| ce |  | 44.0 ± 1.0 |") == 2
    assert "- IF 10: +3.0 to `prompts_balanced_softmax`, beyond" in everything
    assert page.with_suffix(".png").exists()
    wider = text.split("## Wider angles")[1]
    assert "| lora_minority_margin | -2.0 ± 0.0 |" in wider
    assert "| lora_minority_margin | -4.0 ± 0.0 |" in wider  # few
    assert "| lora_ce | 1 | 0.50 | `args.learning_rate: 0.5` | 51.0 |" in text
    assert "A note. 7.5 CPU hours." in text
    run_example("write_image_tail.py", *arguments, str(tmp_path / "none"), monkeypatch=monkeypatch)
    assert page.read_text() == text


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_demo_recipes_hold_what_the_search_chose(path: Path):
    log = json.loads(path.read_text())
    assert len(log["runs"]) <= 12
    keys = ("validation", "base_other") if log["runs"][0]["H"] is None else ("H", "H_other")
    best = max(log["runs"], key=lambda run: sum(run[key] for key in keys))
    assert best["run"] == log["chosen"]["run"]
    assert Recipe.read(DEMO / f"{path.stem}.yaml").source == log["chosen"]["recipe"]


def test_the_recipe_for_images_holds_what_the_search_chose():
    log = json.loads((ROOT / "examples" / "results" / "search" / "image_tail" / "lora_budget.json").read_text())
    assert Recipe.read(RECIPES / "images" / "demo" / "lora_budget.yaml").source == log["chosen"]["recipe"]


def test_the_page_compares_all_rows_with_ours(tmp_path, monkeypatch):
    """Ours is 3 ahead of `plain` in each seed, with another artist 1 behind; `means` knows no new classes."""
    shift = {"zero-shot": -9.0, "plain": 0.0, "ours": 3.0, "means": None}
    rows = []
    alone = ("IF 50, twemoji alone", "tau=1, twemoji alone", "tau=1, emojione alone")
    for setting in ("tau=1", "IF 50", *alone):
        for method, more in shift.items():
            for seed in (1, 2, 3):
                h = None if more is None else 40.0 + more + seed
                rows.append({"setting": setting, "method": method, "seed": seed, "base": 50.0, "new": h, "H": h})
                if setting.endswith("alone"):
                    rows[-1] |= {"H_other": None if more is None else 30 - more / 3 + seed, "trainable": 1234}
    Results(rows, ["base", "new", "H"], "A note.").save(tmp_path / "outputs")
    (tmp_path / "search").mkdir()
    scores = {"cpu_seconds": 1800.0, "validation": 50.0}
    runs = [
        {"run": 1, "score": 41.0, "changes": {"args.learning_rate": 0.5}, **scores},
        {"run": 2, "score": 40.0, **scores},
    ]
    log = {"method": "plain", "runs": runs, "chosen": {"run": 1}, "by_validation_alone": {"score": 40.0}}
    (tmp_path / "search" / "plain.json").write_text(json.dumps(log))
    page, readme = tmp_path / "page" / "base_to_new.md", tmp_path / "README.md"
    readme.write_text("<!-- results table -->\nold\n<!-- end of results table -->\n")
    arguments = ["--outputs", str(tmp_path / "outputs"), "--kept", str(tmp_path), "--page", str(page)]
    arguments += ["--root", str(tmp_path)]
    run_example("write_base_to_new.py", *arguments, "--ours", "ours", monkeypatch=monkeypatch)
    text = page.read_text()
    assert "| plain | 42.0 ± 1.0 | 42.0 ± 1.0 |" in text
    assert "| ours | 45.0 ± 1.0 | 31.0 ± 1.0 |" in readme.read_text()
    assert "old" not in readme.read_text()
    assert "- IF 50: +3.0 to `plain`, beyond one standard deviation (1.0)" in text
    assert "- IF 50, twemoji alone: -4.0 to `zero-shot`" in text
    assert "| plain | -3.0 ± 0.0 | -3.0 ± 0.0 | -3.0 ± 0.0 |" in text
    assert "| plain | +1.0 ± 0.0 | +1.0 ± 0.0 |" in text
    assert "| plain | 2 | 1.00 | `args.learning_rate: 0.5` | 41.0 | 50.0 | 40.0 |" in text
    assert page.with_suffix(".png").exists()
    kept = json.loads((tmp_path / "base_to_new_demo.json").read_text())["rows"]
    assert len(kept) == len(rows)
    assert kept[-1]["H"] is None
    again = ["--outputs", str(tmp_path / "none"), *arguments[2:], "--ours", "ours"]
    run_example("write_base_to_new.py", *again, monkeypatch=monkeypatch)
    assert page.read_text() == text
    with pytest.raises(SystemExit):
        run_example("write_base_to_new.py", *again[:-1], "theirs", monkeypatch=monkeypatch)


def test_collapse_of_texts_is_related_to_new_classes_over_runs_with_prompts(tmp_path, monkeypatch):
    """CoOp's runs lie off the line of the others, on which more NC2 goes with less accuracy; LoRA's do not count."""
    near = {"coop": 9.0, "vpt": 1.0, "maple": 2.0, "budget": 4.0, "lora_budget": 0.0}
    rows = [
        {"setting": s, "method": m, "seed": seed, "base": 1.0, "new": 50 + (m == "coop") * 30 - nc2, "H": 9.0 + seed}
        | {"H_other": 9.0 + seed, "base_text_nc2": nc2, "new_text_nc2": nc2}
        for s in ("tau=1", "IF 50", "tau=1, twemoji alone")
        for m, nc2 in near.items()
        for seed in (1, 2)
    ]
    Results(rows, ["base", "new", "H"], "A note.").save(tmp_path / "outputs")
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    readme.write_text("".join(f"<!-- {m} table -->\n<!-- end of {m} table -->\n" for m in ("results", "collapse")))
    arguments = ["--outputs", str(tmp_path / "outputs"), "--kept", str(tmp_path), "--page", str(page)]
    run_example("write_base_to_new.py", *arguments, "--root", str(tmp_path), monkeypatch=monkeypatch)
    text = readme.read_text()
    assert "| new, without CoOp | 12 | -1.00 | -1.00 | -1.00 |" in text
    assert "| new | 16 | 0.89 |" in text  # the same, by CoOp alone, the other way round
    assert (tmp_path / "new_text_nc2.png").exists()
