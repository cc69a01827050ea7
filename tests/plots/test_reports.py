"""Confusion matrices and reliability diagrams: what is drawn, and that many classes stay readable."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from peft_ncgeo.plots import plot_confusion, plot_reliability
from peft_ncgeo.reports import classification_report

pytestmark = pytest.mark.slow


def report(classes: int, images: int = 300, validation: bool = False):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    labels[0] = classes - 1
    logits = rng.normal(size=(images, classes))
    logits[np.arange(images), labels] += 2
    names = [f"$x_{k}$" for k in range(classes)]
    return classification_report(logits, labels, names, validation=(logits[:99], labels[:99]) if validation else None)


@pytest.mark.parametrize("classes", [2, 12, 31])
def test_confusion(classes, tmp_path, drawn):
    made = report(classes)
    shares = plot_confusion(made, tmp_path / "f.png")
    counts = made.confusion.to_numpy()
    np.testing.assert_allclose(shares, counts / counts.sum(1, keepdims=True))
    texts = [text.get_text() for axes in drawn[0].axes for text in axes.texts]
    if classes <= 30:
        assert sorted(map(int, texts)) == sorted(counts[counts > 0].tolist())
        assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == made.class_names
    else:  # no numbers in cells; the most confused pairs instead
        (pairs,) = texts
        first = made.most_confused(1).iloc[0]
        assert f"{first['images']}  {first['true']} → {first['predicted']}" in pairs
    with pytest.raises(ValueError, match="report.confusion"):
        plot_confusion(pd.DataFrame(np.ones((2, 3))), tmp_path / "g.png")


def test_reliability(tmp_path, drawn):
    made = report(5, validation=True)
    numbers = plot_reliability(made, tmp_path / "f.png")
    for moment, found in (("before", made.calibration.before), ("after", made.calibration.after)):
        np.testing.assert_allclose(numbers[moment], found.bins[["confidence", "accuracy", "images"]])
        assert any(f"{100 * found.error:.1f} %" in axes.get_title() for axes in drawn[0].axes)
    assert list(plot_reliability(report(5).calibration, tmp_path / "f.png")) == ["before"]
