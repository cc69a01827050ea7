"""Metrics of several labels an image, against scikit-learn's own means and a count by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from peft_ncgeo.metrics import multi_label_scores, per_class_scores


def test_means_are_scikit_learns_over_classes_with_images():
    rng = np.random.default_rng(0)
    chance, labels = rng.random((40, 6)), rng.integers(0, 2, (40, 6))
    labels[:, 2] = 0
    seen = np.delete(np.arange(6), 2)
    scores = multi_label_scores(chance, labels, threshold=0.4)
    truth, predicted = labels[:, seen], chance[:, seen] >= 0.4
    assert scores["map"] == pytest.approx(average_precision_score(truth, chance[:, seen], average="macro"))
    assert scores["macro_f1"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert scores["macro_precision"] == pytest.approx(precision_score(truth, predicted, average="macro"))
    assert scores["macro_recall"] == pytest.approx(recall_score(truth, predicted, average="macro"))
    hits = (labels * (chance >= 0.4)).sum()
    assert scores["micro_f1"] == pytest.approx(2 * hits / (labels.sum() + (chance >= 0.4).sum()))
    assert scores["left_out"] == 1
    table = per_class_scores(chance, labels, list("abcdef"), threshold=0.4)
    assert table.index.tolist() == list("abcdef")
    assert np.isnan(table.loc["c", "average_precision"])
    assert table.loc["a", "recall"] == recall_score(labels[:, 0], chance[:, 0] >= 0.4)
    assert table["support"].tolist() == labels.sum(0).tolist()


@pytest.mark.parametrize(
    ("chance", "labels", "word"),
    [
        ([[0.5, 0.2]], [0], "shape|\\(N, K\\)"),
        ([[0.5, 0.2]], [[0, 2]], "0 or 1"),
        ([[0.5, np.nan]], [[0, 1]], "finite"),
    ],
)
def test_refused(chance, labels, word):
    with pytest.raises(ValueError, match=word):
        multi_label_scores(chance, labels)
