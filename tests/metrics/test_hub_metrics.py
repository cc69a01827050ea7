"""The metrics of `evaluate` against formulas, by path without a network, and their cards as they stand."""

from __future__ import annotations

import contextlib
import doctest
import io
import math
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import yaml

import peft_ncgeo.evaluation
from peft_ncgeo.evaluation import GroupAccuracyMetric, NeuralCollapseMetric, metric_path
from peft_ncgeo.geometry import NeuralCollapse

from ..geometry.collapse_problems import ALL, CASES, STATISTICS, expected, problem

METRICS = {"neural_collapse": NeuralCollapseMetric, "group_accuracy": GroupAccuracyMetric}
CARDS = {name: Path(metric_path(name), "README.md").read_text() for name in METRICS}


@pytest.fixture(autouse=True, scope="module")
def caches(tmp_path_factory):
    """Put the inputs of this module's metrics and the copies of their scripts in temporary folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path_factory.mktemp("metrics"))
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        patch.setattr(sys, "path", [*sys.path])  # evaluate adds the folder of the copies
        yield
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        del sys.modules[name]


# ---- neural collapse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["few classes", "imbalanced", "absent"])
def test_collapse_is_its_formulas(name):
    counts, dim = CASES[name]
    x, y, weights, bias = problem(counts, dim)
    metric, collapse = NeuralCollapseMetric(), NeuralCollapse(len(counts), dim).update(x, y)
    for arguments in (
        {"weights": weights, "bias": bias},
        {"weights": weights},
        {"weights": weights, "center_weights": False},
        {},
    ):
        got = metric.compute(predictions=x.numpy(), references=y.numpy(), **arguments)
        assert got.keys() == (ALL if arguments else STATISTICS)
        assert all(type(value) is float for value in got.values())
        assert got == pytest.approx(expected(x, y, **arguments), rel=1e-8, abs=1e-12)
        assert got == pytest.approx(collapse.compute(**arguments), rel=1e-12)


def test_batches_are_the_whole():
    x, y, weights, bias = problem([700, 500, 0, 30, 6], 8)
    want = NeuralCollapse(5, 8).update(x, y).compute(weights, bias)
    metric = NeuralCollapseMetric()
    for batch in (57, len(x)):  # the latter is stored in parts
        for features, labels in zip(x.split(batch), y.split(batch), strict=True):
            metric.add_batch(predictions=features, references=labels)
        assert metric.compute(weights=weights, bias=bias) == pytest.approx(want, rel=1e-10)
    for features, label in zip(x, y, strict=True):
        metric.add(prediction=features, reference=label)
    assert metric.compute(weights=weights, bias=bias) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_features_lists_and_arrays(dtype):
    x, y, weights, bias = (t.to(dtype) if t.is_floating_point() else t for t in problem([9, 5, 7], 4))
    want = expected(x, y, weights, bias)
    metric = NeuralCollapseMetric()
    kinds = [(x.requires_grad_(), y.int(), weights.requires_grad_(), bias)]
    plain = [t.detach().double().numpy() if t.is_floating_point() else t.numpy() for t in (x, y, weights, bias)]
    for features, labels, w, b in (*kinds, plain, [a.tolist() for a in plain]):
        got = metric.compute(predictions=features, references=labels, weights=w, bias=b)
        assert got == pytest.approx(want, rel=1e-8)


def test_undefined_is_nan_with_a_warning():
    x, y, _, _ = problem([4, 4], 3)
    with pytest.warns(UserWarning, match="every value is nan"):
        got = NeuralCollapseMetric().compute(predictions=x, references=torch.ones_like(y), num_classes=4)
    assert got.keys() == STATISTICS
    assert all(math.isnan(value) for value in got.values())


# ---- groups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thresholds", [(20, 100), (5, 60), "thirds"])
def test_groups_against_a_loop(thresholds):
    rng = np.random.default_rng(3)
    counts = rng.permutation([500, 101, 100, 21, 20, 1, 0, 60, 5])
    labels = rng.integers(0, 8, 200)  # the last class has no sample
    predictions = np.where(rng.random(200) < 0.6, labels, rng.integers(0, 9, 200))
    metric = GroupAccuracyMetric()
    for part in np.array_split(np.arange(200), 7):
        metric.add_batch(predictions=predictions[part], references=torch.from_numpy(labels[part]))
    arguments = {} if thresholds == (20, 100) else {"thresholds": thresholds}
    got = metric.compute(class_counts=counts.tolist(), **arguments)

    rank = sorted(range(9), key=lambda c: (-counts[c], c)).index
    low, high = (None, None) if thresholds == "thirds" else thresholds
    hits = {name: [] for name in ("many", "medium", "few", *range(8))}
    for prediction, label in zip(predictions.tolist(), labels.tolist(), strict=True):
        n = counts[label]
        if thresholds == "thirds":
            group = ("many", "medium", "few")[rank(label) // 3]
        else:
            group = "many" if n > high else "few" if n <= low else "medium"
        hits[group].append(prediction == label)
        hits[label].append(prediction == label)
    shares = {name: sum(own) / len(own) for name, own in hits.items()}
    want = {name: shares[name] for name in ("many", "medium", "few")}
    want["accuracy"] = sum(predictions == labels) / 200
    want["balanced_accuracy"] = sum(shares[c] for c in range(8)) / 8
    assert got == pytest.approx(want, rel=1e-12)
    assert all(type(value) is float for value in got.values())
    assert got == metric.compute(predictions=predictions, references=labels, class_counts=counts, **arguments)


def test_groups_without_samples_are_none():
    got = GroupAccuracyMetric().compute(predictions=[1, 0], references=[1, 1], class_counts=[5, 30])
    assert got == {"many": None, "medium": 0.5, "few": None, "accuracy": 0.5, "balanced_accuracy": 0.5}


# ---- bad input --------------------------------------------------------------------------------------------------

X, Y, W = [[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]], [0, 1, 2], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
SAMPLES = {"predictions": [0, 2, 1], "references": [0, 1, 2], "class_counts": [500, 60, 5]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": Y[:2]}, r"Mismatch in the number of predictions \(3\) and references \(2\)"),
        ({"references": [0, -1, 2]}, r"In samples 0 to 2: labels must be in 0..2, got -1"),
        ({"num_classes": 2}, r"labels must be in 0..1, got 2"),
        ({"references": [0, 3, 2], "weights": W}, r"labels must be in 0..2, got 3"),
        ({"predictions": [[1.0, 2.0], [3.0], [0.0, 1.0]]}, r"features of one width, got widths \['1', '2'\]"),
        ({"predictions": [[], [], []]}, r"features of one width, got widths \['0'\]"),
        ({"predictions": [[1.0, math.nan], *X[1:]]}, "In samples 0 to 2: features has non-finite entries in 1 rows"),
        ({"predictions": [[1.0, math.inf], *X[1:]]}, "features has non-finite entries"),
        ({"predictions": [[1.0, None], *X[1:]]}, "features has non-finite entries"),
        ({"weights": [row[:1] for row in W]}, r"weights must have shape \(3, 2\), got \(3, 1\)"),
        ({"weights": W, "bias": [0.0]}, r"bias must have shape \(3,\), got \(1,\)"),
        ({"bias": [0.0, 1.0, 2.0]}, "bias was given without weights"),
        ({"predictions": [], "references": []}, "features of one width, got widths"),
    ],
)
def test_bad_features_are_refused(changes, message):
    check_refusal(NeuralCollapseMetric, {"predictions": X, "references": Y} | changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": [0, 1]}, r"Mismatch in the number of predictions \(3\) and references \(2\)"),
        ({"references": [0, 1, 3]}, "Label 3 is not an index of the 3 classes in class_counts"),
        ({"references": [0, 1, -1]}, "Label -1 is not an index of the 3 classes"),
        ({"class_counts": [5, -1, 2]}, "class_counts must be one number of at least 0 for each class"),
        ({"thresholds": (100, 20)}, "must be \\(low, high\\) with low < high"),
        ({"thresholds": "halves"}, "thresholds='halves' must be"),
        ({"predictions": [], "references": []}, "There are no samples"),
    ],
)
def test_bad_groups_are_refused(changes, message):
    check_refusal(GroupAccuracyMetric, SAMPLES | changes, message)


def check_refusal(metric: type[evaluate.Metric], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        metric(keep_in_memory=True).compute(**arguments)
    assert "\n" not in str(error.value)


def test_a_bad_batch_leaves_the_others():
    metric = GroupAccuracyMetric()
    metric.add_batch(predictions=[0], references=[0])
    with pytest.raises(ValueError, match="Mismatch"):
        metric.add_batch(predictions=[0, 1], references=[0])
    metric.add_batch(predictions=[1], references=[0])
    assert metric.compute(class_counts=[5])["few"] == 0.5
    with pytest.raises(ValueError, match="Label 1 is not an index"):
        metric.compute(predictions=[0], references=[1], class_counts=[5])
    assert metric.compute(predictions=[0], references=[0], class_counts=[5])["few"] == 1


# ---- loading ----------------------------------------------------------------------------------------------------


def test_loaded_and_combined_by_path():
    metric = evaluate.combine([metric_path("group_accuracy"), GroupAccuracyMetric(keep_in_memory=True)])
    loaded, imported = metric.evaluation_modules
    assert type(loaded) is not type(imported)  # a copy, in evaluate's cache
    assert loaded.name == imported.name == "group_accuracy_metric"
    assert "training samples" in imported.compute.__doc__
    assert "long tail" in type(imported).__doc__
    got = metric.compute(**SAMPLES)
    assert got["group_accuracy_metric_0_few"] == got["group_accuracy_metric_1_few"] == 0


def test_names_that_are_none():
    with pytest.raises(ValueError, match="no metric 'accuracy'; there are group_accuracy, neural_collapse"):
        metric_path("accuracy")
    with pytest.raises(AttributeError, match="has no attribute 'Accuracy'"):
        peft_ncgeo.evaluation.Accuracy  # noqa: B018


OFFLINE = """
import sys
import peft_ncgeo.evaluation as evaluation
assert "evaluate" not in sys.modules
import socket
socket.socket.connect = socket.getaddrinfo = None  # whoever calls it fails
import evaluate
collapse = evaluate.load(evaluation.metric_path("neural_collapse"))
print(collapse.compute(predictions=[[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], references=[0, 1, 1])["nc1"])
groups = evaluate.load(evaluation.metric_path("group_accuracy"))
print(groups.compute(predictions=[0, 2, 1], references=[0, 1, 2], class_counts=[500, 60, 5])["many"])
"""


@pytest.mark.slow
def test_loads_without_a_network(tmp_path):
    caches = {name: str(tmp_path / name) for name in ("HF_HOME", "HF_MODULES_CACHE")}
    filters = f"{os.environ['PYTHONWARNINGS']},error::UserWarning:evaluate"
    environment = {**os.environ, **caches, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": filters}
    for name in ("HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    want = expected(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1, 1]))["nc1"]
    assert [float(line) for line in done.stdout.split()] == pytest.approx([want, 1])
    copies = {path.stem for path in (tmp_path / "HF_MODULES_CACHE").rglob("*.py")}
    assert METRICS.keys() <= copies
    assert sorted(path.name for path in (tmp_path / "HF_HOME" / "metrics").iterdir()) == [
        "group_accuracy_metric",
        "neural_collapse_metric",
    ]
    assert not [*(tmp_path / "HF_HOME").rglob("*.arrow")]  # inputs are gone with compute


# ---- processes --------------------------------------------------------------------------------------------------


def add_second_half(cache: str, features: np.ndarray, labels: np.ndarray) -> None:
    arguments = {"num_process": 2, "process_id": 1, "experiment_id": "halves", "cache_dir": cache}
    collapse, groups = NeuralCollapseMetric(**arguments), GroupAccuracyMetric(**arguments)
    collapse.add_batch(predictions=features, references=labels)
    assert collapse.compute() is None
    groups.add_batch(predictions=labels, references=labels)
    assert groups.compute() is None


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="spawning would import all again")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_equal_one(tmp_path):
    x, y, weights, bias = (t.numpy() for t in problem([9, 5, 7], 4))
    second = multiprocessing.get_context("fork").Process(target=add_second_half, args=(str(tmp_path), x[8:], y[8:]))
    second.start()
    arguments = {"num_process": 2, "process_id": 0, "experiment_id": "halves", "cache_dir": str(tmp_path)}
    collapse, groups = NeuralCollapseMetric(**arguments), GroupAccuracyMetric(**arguments)
    collapse.add_batch(predictions=x[:8], references=y[:8])
    got = collapse.compute(weights=weights, bias=bias)
    groups.add_batch(predictions=(y[:8] + 1) % 3, references=y[:8])
    accuracy = groups.compute(class_counts=[9, 5, 7])["accuracy"]
    second.join(60)
    assert second.exitcode == 0
    assert got == pytest.approx(expected(*map(torch.from_numpy, (x, y, weights, bias))), rel=1e-8)
    assert accuracy == (len(y) - 8) / len(y)


# ---- cards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METRICS)
def test_snippets_print_what_the_card_says(name):
    snippets = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", CARDS[name], flags=re.DOTALL)
    assert len(snippets) == CARDS[name].count("```python") == 2
    for code, printed in snippets:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "README.md", "exec"), {})
        assert out.getvalue() == printed


@pytest.mark.parametrize("name", METRICS)
def test_example_of_the_docstring(name):
    text = METRICS[name]().inputs_description
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert len(example.examples) >= 5
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


@pytest.mark.parametrize("name", METRICS)
def test_cards_are_filled_in(name):
    _, front, card = CARDS[name].split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["title"].lower().replace(" ", "_") == name
    assert front["tags"] == ["evaluate", "metric"]
    assert front["description"]
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", card, flags=re.DOTALL), flags=re.MULTILINE)
    assert headings[1:] == [
        "Metric description",
        "How to use",
        "Inputs",
        "Output values",
        "Limitations",
        "Citation",
    ]
    metric = METRICS[name]()
    assert metric.citation in card
    assert f"({metric.info.reference_urls[0]})" in card
    described = re.findall(r"^    (\w+) \(", metric.inputs_description, flags=re.MULTILINE)
    assert all(f"**{word}**" in card or f"`{word}`" in card for word in described)
    assert not re.findall(r"(?i)more information needed|\btodo\b|\btbd\b|module card instructions|\{\{", card)
