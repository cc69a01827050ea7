"""Scatter plots and their correlations."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from peft_ncgeo.plots import plot_relation
from peft_ncgeo.protocols import Results

from .drawing import rows


def test_correlations_by_hand(tmp_path):
    made = rows()
    results = Results([*made, {"setting": "a", "method": "p", "seed": 9}], ["x"])
    numbers = plot_relation(results, "x", "y", tmp_path / "f.png")
    values = np.array([[r["x"], r["y"]] for r in made])
    assert numbers["runs"] == 20
    assert numbers["pearson"] == pytest.approx(np.corrcoef(values.T)[0, 1])
    ranks = values.argsort(0).argsort(0)
    assert numbers["spearman"] == pytest.approx(np.corrcoef(ranks.T)[0, 1])
    within = np.concatenate([values[:10] - values[:10].mean(0), values[10:] - values[10:].mean(0)])
    assert numbers["pearson_within"] == pytest.approx(np.corrcoef(within.T)[0, 1])
    assert numbers["pearson"] < -0.9 < numbers["pearson_within"]
    picture = np.asarray(Image.open(tmp_path / "f.png").convert("RGB"))
    assert picture.shape[1] > 600
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_too_few_runs(tmp_path):
    with pytest.raises(ValueError, match="2 runs have both x and y"):
        plot_relation(Results(rows()[:2], ["x"]), "x", "y", tmp_path / "f.png")
