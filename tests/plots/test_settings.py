"""The figure of a metric over settings."""

from __future__ import annotations

import numpy as np
import pytest

from peft_ncgeo.plots import plot_settings
from peft_ncgeo.plots.settings import _apart
from peft_ncgeo.protocols import Results


def made(methods):
    return Results(
        [
            {"setting": s, "method": m, "seed": seed, "H": 10.0 * i + j + seed}
            for i, m in enumerate(methods)
            for j, s in enumerate("abc")
            for seed in (1, 2)
            if (m, s) != ("q_1", "b")
        ],
        ["H"],
    )


def test_a_line_for_each_method_and_group(tmp_path, drawn):
    found = plot_settings(made(["p", "q_1", "r"]), "H", tmp_path / "f.png", [["a", "b"], ["c"]], ["r", "p"])
    assert found["p"][:, 0].tolist() == [1.5, 2.5, 3.5]
    assert np.isnan(found["q_1"][1]).all()
    np.testing.assert_allclose(found["r"][:, 1], np.std([1, 2], ddof=1))
    (axes,) = drawn[0].axes
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 1], [2]] * 3
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert {text.get_text() for text in axes.texts} == {"p", "q_1", "r"}
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert isinstance(colours["q_1"], str)  # grey
    assert axes.lines[-1].get_color() == pytest.approx(colours["r"])
    assert (tmp_path / "f.png").stat().st_size > 10_000


def test_grey_lines_may_go_without_names(tmp_path, drawn):
    found = plot_settings(made(["p", "q_1", "r"]), "H", tmp_path / "f.png", [["a"]], ["r"], name_others=False)
    assert list(found) == ["p", "q_1", "r"]
    (axes,) = drawn[0].axes
    assert len(axes.lines) == 3
    assert [text.get_text() for text in axes.texts] == ["r"]
    assert "2" in axes.get_title("right")


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="No run has new"):
        plot_settings(made(["p"]), "new", tmp_path / "f.png", [["a"]])
    with pytest.raises(ValueError, match="'s' is to be highlighted"):
        plot_settings(made(["p"]), "H", tmp_path / "f.png", [["a"]], ["s"])
    with pytest.raises(ValueError, match="in 'd'"):  # a setting that no method has
        plot_settings(made(["p"]), "H", tmp_path / "f.png", [["a", "d"]])
    for flat in ("ab", ["a", "b"], []):
        with pytest.raises(ValueError, match="write"):
            plot_settings(made(["p"]), "H", tmp_path / "f.png", flat)


def test_a_method_without_finite_values_is_left_out(tmp_path, drawn):
    results = made(["p"])
    results.rows += [{**row, "method": "q", "H": float("nan")} for row in results.rows]
    assert list(plot_settings(results, "H", tmp_path / "f.png", [["a", "b"]])) == ["p"]
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.texts] == ["p"]


def test_each_highlighted_method_has_its_own_colour(tmp_path, drawn):
    methods = [f"m{i}" for i in range(12)]
    plot_settings(made(methods), "H", tmp_path / "f.png", [["a"]], methods)
    (axes,) = drawn[0].axes
    assert len({tuple(line.get_color()) for line in axes.lines}) == 12


def test_names_are_moved_apart_and_not_further():
    assert _apart([3.0, 1.0, 2.0], 0.5).tolist() == [3.0, 1.0, 2.0]
    assert _apart([1.0, 1.0, 9.0], 0.5) == pytest.approx([0.75, 1.25, 9.0])
    rng = np.random.default_rng(0)
    places = rng.normal(size=30)
    moved = _apart(places, 0.2)
    assert (np.diff(np.sort(moved)) > 0.2 - 1e-9).all()
    assert np.argsort(moved).tolist() == np.argsort(places).tolist()
