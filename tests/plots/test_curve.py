"""Curves."""

from __future__ import annotations

import numpy as np
import pytest

from peft_ncgeo.plots import plot_curve


@pytest.mark.parametrize(("log_x", "scale"), [(False, "linear"), (True, "symlog")])
def test_curve_by_hand_and_as_drawn(tmp_path, drawn, log_x, scale):
    rng = np.random.default_rng(0)
    made = [
        {"method": m, "seed": s, "copies": n, "gap": rng.normal()}
        for s in range(3)
        for n in (100, 0, 10)
        for m in "pq"
    ]
    made += [{"method": "q", "seed": 0, "copies": 1000, "gap": 2.0}, {"method": "q", "copies": 50, "gap": None}]
    numbers = plot_curve(made, "copies", "gap", tmp_path / "f.png", y_label="the gap", log_x=log_x)
    assert list(numbers) == ["p", "q"]
    assert numbers["q"][3].tolist() == [1000, 2, 0]
    for method in "pq":
        for (at, mean, deviation), place in zip(numbers[method], (0, 10, 100), strict=False):
            values = [r["gap"] for r in made if (r["method"], r["copies"]) == (method, place)]
            assert (at, mean) == (place, pytest.approx(sum(values) / 3))
            assert deviation == pytest.approx((sum((v - mean) ** 2 for v in values) / 2) ** 0.5)
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == scale
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("copies", "the gap")
    for line, band, points in zip(axes.lines, axes.collections, numbers.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), points[:, :2])
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
        assert {(x, m - d) for x, m, d in points} | {(x, m + d) for x, m, d in points} <= corners
    if log_x:  # 0 has a place of its own, left of the smallest positive number
        places = axes.transData.transform([(n, 0) for n in (0, 10, 100, 1000)])[:, 0]
        assert np.isfinite(places).all()
        assert (np.diff(places) > 20).all()


def test_curve_of_positive_numbers_and_of_none(tmp_path, drawn):
    made = [{"head": h, "share": s, "accuracy": 50 + 10 * s} for h in (1, 2) for s in (0.1, 0.5, 1)]
    assert list(plot_curve(made, "share", "accuracy", tmp_path / "f.png", group="head", log_x=True)) == ["1", "2"]
    (axes,) = drawn[0].axes
    at = axes.transData.transform([(n, 0) for n in (0.1, 0.5, 1)])[:, 0]
    assert (at[1] - at[0]) / (at[2] - at[0]) == pytest.approx(np.log10(5))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "0.5", "1"]
    plot_curve([{"method": "p", "x": 0, "y": 1}], "x", "y", tmp_path / "f.png", log_x=True)
    with pytest.raises(ValueError, match="No row has both copies and accuracy"):
        plot_curve(made, "copies", "accuracy", tmp_path / "g.png")
