"""Protocols on tiny models: what is trained and tested on what, and that a killed run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset
from transformers import CLIPModel, TrainerCallback

from peft_ncgeo import NPTConfig
from peft_ncgeo.data import base_new_split, few_shot, long_tailed
from peft_ncgeo.losses import OTPreservation
from peft_ncgeo.protocols import (
    Task,
    base_to_new,
    cross_dataset,
    domain_generalisation,
    long_tail,
    run_cells,
    runs,
)
from peft_ncgeo.protocols.fingerprints import dataset_fingerprint
from peft_ncgeo.training import Recipe

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor

pytestmark = pytest.mark.slow

ARGS = {"num_train_epochs": 1, "batch_size": 8, "learning_rate": 0.01, "max_steps": 2}
COOP = Recipe.from_dict("coop", {"peft": {"NPTConfig.coop": {"num_text_tokens": 4}}, "args": ARGS})
DEEP = Recipe.from_dict(
    "deep",
    {
        "peft": {"NPTConfig.ivlp": {"text_init": [6, 7, 8, 6], "text_depth": 2, "vision_depth": 2}},
        "losses": [{"OTPreservation": {"budget": 0.1}}],
        "classification_loss": {"LogitAdjustment": {}},
        "callbacks": [{"PromptAveraging": {"mean": 1}}],
        "args": ARGS,
    },
)
SIX = [*NAMES, "red tree"]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def run(protocol, *data, output_dir, recipes=(COOP,), **arguments):
    return protocol(list(recipes), *data, tiny_clip, tiny_processor(), output_dir, seeds=(1, 2), **arguments)


def test_base_to_new(tmp_path, monkeypatch):
    tasks = []
    real = runs._run
    monkeypatch.setattr(runs, "_run", lambda recipe, task, *a: tasks.append(task) or real(recipe, task, *a))
    train, test = tiny_images(120, SIX), tiny_images(30, SIX, seed=1)
    tails = {"balanced": {"tau": 1.0, "n_max": 4}, "tail": {"imbalance_factor": 4, "n_max": 8}}
    results = run(
        base_to_new, train, test, output_dir=tmp_path, recipes=(Recipe("zero-shot"), COOP, DEEP), tails=tails
    )
    assert len(results.rows) == 2 * 3 * 2
    config = tiny_clip().config
    text, vision = config.text_config.hidden_size, config.vision_config.hidden_size
    trainable = {"coop": 4 * text, "deep": 2 * 4 * (text + vision)}
    for row in results.rows:
        expected = 2 * row["base"] * row["new"] / (row["base"] + row["new"]) if row["base"] + row["new"] else 0
        assert row["H"] == pytest.approx(expected)
        assert (row.get("few") is not None) == (row["setting"] == "tail")
        assert ("loss/ot" in row) == (row["method"] == "deep")
        assert row.get("trainable") == trainable.get(row["method"])
        assert row["base_text_nc2"] > 0
    assert next(r["base"] for r in results.rows if r["method"] == "zero-shot") == results.rows[1]["base"]
    halves = base_new_split(train)
    for task in tasks[-2:]:
        assert task.train.features["label"].names == SIX[:3] == task.test["base"].features["label"].names
        assert task.test["new"].features["label"].names == SIX[3:]
    expected = long_tailed(halves["base"], imbalance_factor=4, n_max=8, seed=2, shuffle_classes=True)
    assert tasks[-1].train["label"][:] == expected["label"][:]
    assert tasks[-1].train["image"][0].tobytes() == expected["image"][0].tobytes()


def test_base_to_new_takes_its_own_images(tmp_path):
    halves = dict(base_new_split(tiny_images(120, SIX)))
    asked = []

    def train(seed, n_max):
        asked.append((seed, n_max))
        return halves["base"]

    other = {f"{half}_other": images.select(range(9)) for half, images in halves.items()}
    test = {**halves, "kept": tiny_images(6, NAMES[:2]), "base_alone": halves["base"], **other}
    tails = {"a": {"tau": 1.0}, "b": {"tau": 1, "n_max": 3}}
    results = run(base_to_new, train, test, output_dir=tmp_path, tails=tails)
    assert asked == [(1, 16), (2, 16), (1, 3), (2, 3)]
    pair = ["base_other", "new_other", "H_other"]
    assert results.columns == ["base", "new", "H", "many", "medium", "few", *pair, "kept", "base_alone"]
    for row in results.rows:
        base, new, mean = (row[column] for column in pair)
        assert mean == pytest.approx(2 * base * new / (base + new) if base + new else 0)
    for taken in ("H", "H_other", "few"):
        with pytest.raises(ValueError, match=f"set named '{taken}'"):
            run(base_to_new, train, {**test, taken: halves["new"]}, output_dir=tmp_path)
    with pytest.raises(ValueError, match="test must hold a set named 'new'"):
        run(base_to_new, train, {"base": halves["base"]}, output_dir=tmp_path)


def test_cross_dataset_trains_on_all_classes_and_averages_the_targets(tmp_path):
    train, other, third = tiny_images(40), tiny_images(12, ["blue tree", "red fish", "dog"]), tiny_images(8, NAMES[:2])
    targets = {"other": other, "third": third}
    results = run(cross_dataset, train, targets, output_dir=tmp_path, source=tiny_images(10, seed=3), shots=2)
    for row in results.rows:
        assert row["average"] == pytest.approx((row["other"] + row["third"]) / 2)
    assert results.columns == ["source", "other", "third", "average"]
    for bad in ({}, {"source": other}):
        with pytest.raises(ValueError, match="targets must be"):
            run(cross_dataset, train, bad, output_dir=tmp_path)


def test_domain_generalisation_wants_classes_of_the_source(tmp_path):
    train = tiny_images(40)
    results = run(domain_generalisation, train, {"some": tiny_images(6, NAMES[2:4])}, output_dir=tmp_path, shots=1)
    assert len(results.rows) == 2
    with pytest.raises(ValueError, match="Target 'other' has the class 'tree'"):
        run(domain_generalisation, train, {"other": tiny_images(6, [NAMES[0], "tree"])}, output_dir=tmp_path)


def test_long_tail(tmp_path):
    sets = tiny_images(100), tiny_images(20)
    results = run(long_tail, *sets, output_dir=tmp_path, imbalance_factors=(1, 5), n_max=20)
    assert [r["realised_imbalance_factor"] for r in results.rows] == [1, 1, 5, 5]
    flat, tail = results.rows[0], results.rows[2]
    assert flat["medium"] is None
    assert flat["few"] == flat["all"]
    assert tail["many"] is None
    assert tail["few"] is not None
    assert "| IF 5 | coop |" in (tmp_path / "results.md").read_text()


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    settings = {"a": lambda seed: Task(few_shot(tiny_images(20), 2, seed), {"test": tiny_images(10)})}

    def go(**arguments):
        return run_cells([COOP, DEEP], settings, tiny_clip, tiny_processor(), tmp_path, (1, 2), **arguments)

    real, done = runs._run, []

    def until_the_third(recipe, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(recipe.name)
        return real(recipe, *rest)

    monkeypatch.setattr(runs, "_run", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        go()
    (tmp_path / "a" / "coop" / "seed-2.part").write_text('{"half')  # killed while writing
    monkeypatch.setattr(runs, "_run", lambda recipe, *rest: done.append(recipe.name) or real(recipe, *rest))
    rows = go()
    assert done == ["coop", "deep", "coop", "deep"]
    assert [(row["method"], row["seed"]) for row in rows] == [("coop", 1), ("coop", 2), ("deep", 1), ("deep", 2)]
    assert [path.name for path in tmp_path.rglob("*.part")] == ["seed-2.part"]  # and no other
    assert go() == rows
    assert len(done) == 4
    whole = run_cells([COOP, DEEP], settings, tiny_clip, tiny_processor(), tmp_path / "whole", (1, 2))
    for interrupted, plain in zip(rows, whole, strict=True):
        assert without_time(interrupted) == without_time(plain)


def without_time(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.endswith("seconds")}


def one_cell(folder, recipe=COOP, images=None, args=(), names=("a",), seeds=(1,), test=None, **others):
    images = tiny_images(10) if images is None else images
    settings = {name: lambda seed: Task(images, {"test": images if test is None else test}) for name in names}
    others = {"model": tiny_clip, "processor": tiny_processor(), **others}
    return run_cells([recipe], settings, output_dir=folder, seeds=seeds, args=dict(args), **others)


def python_recipe(weight: float) -> Recipe:
    def losses():
        return [OTPreservation(weight=weight)]

    return Recipe("mine", config=lambda: NPTConfig.coop(num_text_tokens=4), losses=losses, args=ARGS)


@pytest.mark.parametrize(("args", "steps"), [({}, 2), ({"num_train_epochs": 3}, 6)])
def test_epochs_given_for_all_recipes_replace_the_steps_of_one(tmp_path, args, steps):
    ends = []

    class Ends(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            ends.append(state.global_step)

    one_cell(tmp_path, replace(python_recipe(1.0), callbacks=lambda: [Ends()]), args=args)
    assert ends == [steps]


def test_cells_of_something_else_are_refused(tmp_path):
    first = one_cell(tmp_path)
    assert one_cell(tmp_path) == first
    renamed = tiny_images(10).cast_column("label", ClassLabel(names=[*NAMES[1:], "tree"]))
    other = Recipe.from_dict("coop", {**COOP.source, "args": {**ARGS, "learning_rate": 0.02}})
    other_words = tiny_processor()
    other_words.tokenizer.model_max_length = 12
    changes = [
        {"recipe": other},
        {"args": {"max_steps": 3}},
        {"images": tiny_images(10, seed=1)},
        {"images": renamed},
        {"images": tiny_images(9)},
        {"test": tiny_images(5)},
        {"model": lambda: CLIPModel._from_config(tiny_clip().config)},
        {"processor": other_words},
        {"finish": lambda metrics: {**metrics, "more": 1}},
        {"after": lambda trainer, evaluate: {"more": 1}},
        {"after": partial(lambda number, trainer, evaluate: {"more": number}, 2)},
    ]
    for change in changes:
        with pytest.raises(ValueError, match="was.*another"):
            one_cell(tmp_path, **change)
    one_cell(tmp_path / "mine", python_recipe(1.0))
    with pytest.raises(ValueError, match="was made by another recipe"):
        one_cell(tmp_path / "mine", python_recipe(2.0))
    written = (tmp_path / "a" / "coop" / "seed-1.json").read_text()
    damaged = [
        "{",
        "[]",
        "3",
        "{}",
        "[" * 10**5,
        '{"metrics": {}}',
        "9" * 10**5,
        "\x00",
        "",
        '{"made_of": 1, "more": 2}',
    ]
    for text in [*damaged, written.replace('"metrics": {', '"metrics": 1, "more": {'), written[:-9]]:
        (tmp_path / "a" / "coop" / "seed-1.json").write_text(text)
        with pytest.raises(ValueError, match=r"seed-1.json.*\(.*\)\.$"):
            one_cell(tmp_path)


def test_images_are_known_by_their_bytes_not_by_their_files_names(tmp_path):
    images = [image.resize((8, 8)) for image in tiny_images(6)["image"]]
    cells = [{"path": str(tmp_path / f"{i}.png"), "bytes": None} for i in range(6)]
    features = tiny_images(1).features

    def description(order):
        for cell, i in zip(cells, order, strict=True):
            images[i].save(cell["path"])
        folder = Dataset.from_dict({"image": cells, "label": [0, 1] * 3}, features=features)
        embedded = [{"path": None, "bytes": Path(cell["path"]).read_bytes()} for cell in cells]
        copy = Dataset.from_dict({"image": embedded, "label": [0, 1] * 3}, features=features)
        assert dataset_fingerprint(copy, "label") == dataset_fingerprint(folder, "label")
        return dataset_fingerprint(folder, "label")

    assert description(range(6)) == description(range(6)) != description([1, 0, 2, 3, 4, 5])


def test_what_would_fail_late_fails_first(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_run", lambda *a: pytest.fail("a cell was run"))
    for arguments in ({"names": ("n=4", "n 4")}, {"seeds": (1, 1)}):
        with pytest.raises(ValueError, match="2 cells would share"):
            one_cell(tmp_path, **arguments)
    (tmp_path / "...yaml").write_text("args: {}")
    for strange in (Recipe.read(tmp_path / "...yaml"), Recipe("a/b"), Recipe("x" * 300), Recipe("")):
        with pytest.raises(ValueError, match="of a recipe cannot be a file's"):
            one_cell(tmp_path / "cells", strange)
    with pytest.raises(ValueError, match="'../x'.*cannot.*file's"):
        one_cell(tmp_path / "cells", names=("../x",))
    with pytest.raises(TypeError, match="seed='/x' must be a whole number"):
        one_cell(tmp_path / "cells", seeds=("/x",))
    assert [path.name for path in tmp_path.iterdir()] == ["...yaml"]
    wrong = Recipe.from_dict("wrong", {**COOP.source, "args": {"learning_rat": 1}})
    with pytest.raises(ValueError, match="Recipe.*unknown.*'learning_rat'.*'learning_rate'"):
        one_cell(tmp_path, wrong)
    with pytest.raises(ValueError, match="unknown argument 'output_dir'"):
        one_cell(tmp_path, args={"output_dir": "elsewhere"})
    images = tiny_images(60, SIX)
    with pytest.raises(ValueError, match="Tail 'b' has 'taus'"):
        run(base_to_new, images, images, output_dir=tmp_path, tails={"a": {"tau": 1.0}, "b": {"taus": 1}})
    tails = {"a": {"tau": 1.0, "n_max": 2}, "b": {"tau": 1.0, "n_max": 99}}
    with pytest.raises(ValueError, match="fewer than the 99 asked for"):
        run(base_to_new, images, images, output_dir=tmp_path, tails=tails)


def test_other_columns(tmp_path):
    images = tiny_images(60, SIX).rename_columns({"image": "img", "label": "fine"})
    arguments = {"output_dir": tmp_path, "label_column": "fine", "args": {"image_column": "img"}}
    assert run(base_to_new, images, images, tails={"a": {"tau": 1.0, "n_max": 2}}, **arguments).rows
    assert run(long_tail, images, images, imbalance_factors=(2,), **arguments).rows
    assert run(cross_dataset, images, {"again": images}, shots=1, **arguments).rows


def test_groups_go_by_name_not_by_place(tmp_path):
    """The same test images with the classes in another order give the same many, medium and few."""
    train, test = tiny_images(100), tiny_images(40, seed=1)
    turned = test.cast_column("label", ClassLabel(names=NAMES))
    order = [3, 0, 4, 1, 2]
    labels = [order.index(label) for label in turned["label"]]
    feature = ClassLabel(names=[NAMES[c] for c in order])
    turned = turned.remove_columns("label").add_column("label", labels, feature=feature)
    rows = [
        run(
            long_tail, train, images, output_dir=tmp_path / name, imbalance_factors=(5,), n_max=20, thresholds="thirds"
        )
        for name, images in (("a", test), ("b", turned))
    ]
    for a, b in zip(rows[0].rows, rows[1].rows, strict=True):
        assert [a[g] for g in ("all", "many", "medium", "few")] == pytest.approx(
            [b[g] for g in ("all", "many", "medium", "few")]
        )
    with pytest.raises(ValueError, match="Class 'tree' was not trained"):
        run(long_tail, train, tiny_images(5, [*NAMES[:4], "tree"]), output_dir=tmp_path / "c", imbalance_factors=(5,))


@pytest.mark.slow
def test_two_processes_share_cells_and_rows(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command += [
        str(root / "examples" / "accelerate" / "cpu_2proc.yaml"),
        "-m",
        "tests.protocols.worker",
        str(tmp_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks, again = (
        [json.loads((tmp_path / f"{time}-{rank}.json").read_text()) for rank in range(2)]
        for time in ("first", "again")
    )
    assert ranks[0] == ranks[1]
    assert (tmp_path / "cells").read_text() == "2"
    assert again[0] == again[1] == json.loads((tmp_path / "results.json").read_text())["rows"]
    assert again[0][0] == ranks[0][0]
    assert again[0][1]["base"] == pytest.approx(ranks[0][1]["base"])
    assert [(tmp_path / f"group-{rank}").read_text() for rank in range(2)] == ["False 0"] * 2  # its threads have ended
    assert [(tmp_path / f"kept-{rank}").read_text() for rank in range(2)] == ["0"] * 2


def test_a_template_reaches_prompts_and_plain_models(tmp_path, monkeypatch):
    seen = []
    real = runs.GeometryTrainer

    def note(**arguments):
        trainer = real(**arguments)
        seen.append(trainer.task.template)
        return trainer

    monkeypatch.setattr(runs, "GeometryTrainer", note)
    settings = {"a": lambda seed: Task(tiny_images(10), {"test": tiny_images(10)})}
    template = "a photo of a {}, a tree."
    run_cells([Recipe("zero"), COOP], settings, tiny_clip, tiny_processor(), tmp_path, (1,), {"template": template})
    assert seen == [template, template]
