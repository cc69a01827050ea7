"""Numbers of a report: scikit-learn's, and each computed again in float64 by loops."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

from peft_ncgeo.reports import (
    classification_report,
    fit_temperature,
    linear_probe,
    nearest_class_mean,
    reliability,
)

NAMES = ["crab", "a|b", "red panda", "<i>", "owl", "never seen", "never said"]


def drawn(images: int = 97, classes: int = 7, seed: int = 0):
    """Logits that are right more often than not; the class before the last has no image, the last no prediction."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([*range(classes - 2), classes - 1], images)
    logits = 3 * rng.normal(size=(images, classes))
    logits[np.arange(images), labels] += 4
    logits[:, -1] = logits[:, :-1].min(1) - 0.5
    return logits, labels


def probabilities(logits) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_scores_of_each_class():
    logits, labels = drawn()
    report, found = classification_report(logits, labels, NAMES), logits.argmax(1)
    for c, name in enumerate(NAMES):
        hits = sum(1 for y, p in zip(labels, found, strict=True) if y == p == c)
        said, there = (found == c).sum(), (labels == c).sum()
        precision, recall = hits / said if said else 0.0, hits / there if there else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        assert report.per_class.loc[name].tolist() == pytest.approx([precision, recall, f1, there])
        assert report.confusion.loc[name].tolist() == [int(((labels == c) & (found == k)).sum()) for k in range(7)]
    known = metrics.classification_report(labels, found, output_dict=True, zero_division=0)
    assert report.accuracy == pytest.approx(known["accuracy"])
    assert report.macro_f1 == pytest.approx(known["macro avg"]["f1-score"])
    recalls = [(found[labels == c] == c).mean() for c in np.unique(labels)]
    assert report.balanced_accuracy == pytest.approx(np.mean(recalls))
    pair = report.most_confused().iloc[0]
    assert pair["images"] == (report.confusion.to_numpy() * (1 - np.eye(7))).max()
    assert pair["images"] == report.confusion.loc[pair["true"], pair["predicted"]]

    wrong = classification_report(-logits, logits.argmax(1), NAMES)
    assert wrong.accuracy == 0
    assert wrong.to_dict()["per_class"]["support"] == np.bincount(found, minlength=7).tolist()
    assert wrong.per_class["support"].dtype.kind == "i"

    same = classification_report(torch.tensor(probabilities(logits)), labels, NAMES)
    assert same.per_class.equals(report.per_class)
    assert same.calibration.before.error == pytest.approx(report.calibration.before.error)
    counts = [150, 130, 90, 40, 20, 10, 3]
    groups = classification_report(logits, labels, NAMES, counts).groups
    assert groups["many"] == pytest.approx((found == labels)[labels < 2].mean())
    assert groups["few"] == pytest.approx((found == labels)[labels >= 4].mean())
    assert classification_report(logits, labels, NAMES, [9] * 7).groups is None

    for given, wanted in (
        ((probabilities(logits) / 2, labels, NAMES), "sum to 1"),  # sigmoids, for instance
        ((logits, labels + 1, NAMES), "Label 7"),
        ((logits, labels, NAMES[:3]), "3 class_names"),
        ((logits, labels[:5], NAMES), "labels"),
        ((np.where(logits > 9, np.nan, logits), labels, NAMES), "not finite"),
    ):
        with pytest.raises(ValueError, match=wanted):
            classification_report(*given)


def test_calibration_bin_by_bin_and_its_temperature():
    logits, labels = drawn(101)
    p = probabilities(logits)
    sure, right = p.max(1), p.argmax(1) == labels
    sure[:3] = 0.0, 1 / 3, 1.0  # on edges: a bin holds its upper one
    for count in (15, 3):
        error = 0.0
        for b in range(count):
            inside = (sure > b / count) & (sure <= (b + 1) / count) | ((sure == 0) & (b == 0))
            row = reliability(sure, right, count).bins.iloc[b]
            assert row["images"] == inside.sum()
            if inside.any():
                error += inside.sum() / 101 * abs(right[inside].mean() - sure[inside].mean())
                assert row["accuracy"] == pytest.approx(right[inside].mean())
        assert reliability(sure, right, count).error == pytest.approx(error)

    def loss(temperature):
        return -np.log(probabilities(logits / temperature)[np.arange(101), labels]).mean()

    temperature = fit_temperature(logits, labels)
    assert 1.1 < temperature < 50
    assert all(loss(temperature) < loss(temperature * factor) for factor in (0.5, 0.999, 1.001, 2))
    assert fit_temperature(7 * logits, labels) == pytest.approx(7 * temperature)

    others = drawn(60, seed=5)
    fitted = classification_report(logits, labels, NAMES, validation=others).calibration
    assert fitted.temperature == pytest.approx(fit_temperature(*others))
    after = probabilities(logits / fitted.temperature)
    assert fitted.after.error == pytest.approx(reliability(after.max(1), after.argmax(1) == labels).error)
    own = classification_report(logits, labels, NAMES, validation=(logits, labels))
    told = "the images of this report themselves"
    assert told in own.to_markdown()
    assert told not in classification_report(logits, labels, NAMES, validation=others).to_markdown()
    never_wrong = np.eye(7)[labels] * 9
    with pytest.raises(ValueError, match="correctly"):
        fit_temperature(never_wrong, labels)
    told = classification_report(logits, labels, NAMES, validation=(never_wrong - 1, labels))
    assert told.calibration.temperature is None
    assert "correctly" in told.notes[0]


def features(counts, dim: int = 6, seed: int = 0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(len(counts), dim))
    labels = np.repeat(np.arange(len(counts)), counts)
    return (centres[labels] + rng.normal(size=(len(labels), dim))) * rng.uniform(1, 9, (len(labels), 1)), labels


def test_baselines_on_features():
    x, labels = features([9, 0, 5, 7])
    queries, _ = features([11, 11, 11, 11], seed=1)

    def unit(rows):
        return rows / np.sqrt((rows**2).sum(1, keepdims=True))

    means = {c: unit(x)[labels == c].mean(0) for c in (0, 2, 3)}
    nearest = [max(means, key=lambda c: q @ means[c] / np.linalg.norm(means[c])) for q in queries]
    assert nearest_class_mean(x, labels, queries).tolist() == nearest

    def probe(c, rows, own):
        return LogisticRegression(C=c, class_weight="balanced", max_iter=1000).fit(unit(rows), own)

    found = linear_probe(x, labels, queries)
    (chosen,) = [c for c in (0.3, 3.0, 30.0, 300.0, 3000.0) if f"C={c:g} (chosen" in found.note]
    assert found.predicted.tolist() == probe(chosen, x, labels).predict(unit(queries)).tolist()
    x, labels = features([30, 8, 3, 1])  # nothing to cross-validate on
    found = linear_probe(x, labels, queries)
    assert "C=30 (not chosen, since a class has fewer than 3 images" in found.note
    assert found.predicted.tolist() == probe(30, x, labels).predict(unit(queries)).tolist()


@pytest.mark.slow
def test_files_and_tables_for_readers(tmp_path):
    logits, labels = drawn()
    report = classification_report(logits, labels, NAMES)
    rows = {"zero-shot": [0.9, 0.2, 0.1], "linear probe": [0.1, 0.1, 0.1], "tuned model": [0.5, 0.5, 0.5]}
    report = replace(report, baselines=pd.DataFrame.from_dict(rows, "index", columns=["accuracy", "b", "f"]))
    text = report.to_markdown()
    assert "does not beat zero-shot (accuracy 50.0 % against 90.0 %)" in text
    assert "a\\|b" in text
    assert "<i>" not in text
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    report.save(tmp_path / "report")
    kept = pd.read_csv(tmp_path / "report" / "per_class.csv", index_col="class")
    np.testing.assert_allclose(kept, report.per_class)
    kept = pd.read_csv(tmp_path / "report" / "confusion.csv", index_col="true")
    assert kept.to_numpy().tolist() == report.confusion.to_numpy().tolist()
    written = {file.name for file in (tmp_path / "report").iterdir()}
    names = {"report.md", "per_class.csv", "confusion.csv", "baselines.csv", "confusion.png", "reliability.png"}
    assert written == names
    many, own = drawn(400, 41)
    text = classification_report(many, own, [f"class {k}" for k in range(41)]).to_markdown()
    assert text.count("\n| class ") < 40  # worst and best ten, and the most confused
