"""The figure of modality gaps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from peft_ncgeo.few_shot.evaluate import SHIFTS
from peft_ncgeo.plots import plot_gaps
from peft_ncgeo.protocols import EpisodeResults

from .drawing import made_episodes, seen_whole


def interval(values):
    return [np.mean(values), 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))]


def test_gaps_by_hand_and_as_drawn(tmp_path, drawn):
    """One method ran fewer episodes: all bars and lines are of those."""
    domains = ["twemoji", "emojione", "fashion_mnist", "mnist", "a domain with a name longer than any"]
    counts = {"nearest prototype": 8, "URL": 8, "CoPA": 9, "CoPA + adapters": 3}
    results = made_episodes(domains, counts, domains[:2])
    numbers = plot_gaps(results, tmp_path / "f.png", title="a title")
    assert list(numbers) == ["before", "after", "gaps", "losses"]

    def column(domain, method, key, count=3):
        rows = [r for r in results.rows if (r["domain"], r["method"]) == (domain, method) and r["episode"] < count]
        return np.array([r[key] for r in rows])

    for d, domain in enumerate(domains):
        np.testing.assert_allclose(numbers["before"][d], interval(column(domain, "CoPA", "gap_before")))
        for m, method in enumerate(counts):
            np.testing.assert_allclose(numbers["after"][d, m], interval(column(domain, method, "gap_after")))
    for key in ("gaps", "losses"):
        for m, method in enumerate(counts):
            means = [column(domain, method, f"sweep_{key}").mean(0) for domain in domains]
            np.testing.assert_allclose(numbers[key][m], np.mean(means, axis=0))
    assert numbers["gaps"].shape == (4, len(SHIFTS))

    (figure,) = drawn
    bars, lines = figure.axes
    groups = [c for c in bars.containers if hasattr(c, "patches")]
    pairs = zip(groups, [numbers["before"], *numbers["after"].transpose(1, 0, 2)], strict=True)
    for group, (mean, half) in ((group, values.T) for group, values in pairs):
        np.testing.assert_allclose([bar.get_height() for bar in group], mean)
        (segments,) = (lines.get_segments() for lines in group.errorbar[2])
        np.testing.assert_allclose([s[:, 1] for s in segments], np.stack([mean - half, mean + half], axis=1))
    boxes = sorted(bar.get_bbox().extents[[0, 2]].tolist() for group in groups for bar in group)
    assert all(a[1] < b[0] for a, b in pairwise(boxes)), "bars overlap"
    labels = ["twemoji (seen)", "emojione (seen)", "fashion_mnist", "mnist", "a domain with a name …"]
    assert [label.get_text() for label in bars.get_xticklabels()] == labels
    assert bars.get_xticklabels()[0].get_rotation() == 30

    assert len(lines.lines) == 8
    zero = SHIFTS.index(0.0)
    for m, (line, point) in enumerate(zip(lines.lines[::2], lines.lines[1::2], strict=True)):
        path = np.stack([numbers["gaps"][m], numbers["losses"][m]], axis=1)
        np.testing.assert_array_equal(line.get_xydata(), path)
        np.testing.assert_array_equal(point.get_xydata(), path[[zero]])
        assert point.get_markersize() > line.get_markersize()
        colour = groups[m + 1][0].get_facecolor()
        assert tuple(line.get_color()) == tuple(point.get_color()) == colour
    (legend,) = figure.legends
    assert bars.get_legend() is lines.get_legend() is None
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["before adaptation", *counts, "as adapted, not shifted"]
    assert figure.get_suptitle() == "a title"
    seen_whole(tmp_path / "f.png")


@pytest.mark.parametrize("sweep", [True, False])
def test_gaps_of_one_episode(tmp_path, drawn, sweep):
    """One domain, one method: no interval."""
    results = made_episodes(["digits"], {"CoPA": 1}, sweep=sweep)
    numbers = plot_gaps(results, tmp_path / "f.png")
    (row,) = results.rows
    np.testing.assert_array_equal(numbers["before"], [[row["gap_before"], np.nan]])
    np.testing.assert_array_equal(numbers["after"], [[[row["gap_after"], np.nan]]])
    if sweep:
        np.testing.assert_array_equal(numbers["losses"], [row["sweep_losses"]])
    assert ("losses" in numbers, len(drawn[0].axes)) == ((True, 2) if sweep else (False, 1))
    (label,) = drawn[0].axes[0].get_xticklabels()
    assert (label.get_text(), label.get_rotation()) == ("digits", 0)
    seen_whole(tmp_path / "f.png")


def test_gaps_need_a_sweep_of_every_method(tmp_path, drawn):
    """Episodes that lack one are left out; without one that all have, so is the panel."""
    results = made_episodes(["a", "b"], {"p": 3, "q": 3})
    lacking = [row for row in results.rows if (row["domain"], row["method"]) == ("b", "q")]
    for row in lacking:
        if row["episode"] < 2:
            row["sweep_gaps"] = None
    a = [row["sweep_losses"] for row in results.rows if (row["domain"], row["method"]) == ("a", "p")]
    b = [r["sweep_losses"] for r in results.rows if (r["domain"], r["method"], r["episode"]) == ("b", "p", 2)]
    numbers = plot_gaps(results, tmp_path / "f.png")
    np.testing.assert_allclose(numbers["losses"][0], (np.mean(a, axis=0) + b[0]) / 2)
    for row in lacking:
        row.pop("sweep_gaps")
    assert list(plot_gaps(results, tmp_path / "f.png")) == ["before", "after"]
    assert [len(figure.axes) for figure in drawn] == [2, 1]
    assert [t.get_text() for t in drawn[1].legends[0].get_texts()] == ["before adaptation", "p", "q"]


def test_gaps_errors(tmp_path):
    path = tmp_path / "f.png"
    with pytest.raises(ValueError, match=r"^There are no episodes to draw\.$"):
        plot_gaps(EpisodeResults([], ["a"], ["p"]), path)
    results = made_episodes(["a"], {"p": 2})
    with pytest.raises(ValueError, match="No.*'a'.*'q'"):
        plot_gaps(EpisodeResults(results.rows, ["a"], ["p", "q"]), path)
    results.rows[0]["sweep_losses"] = [1.0, 2.0]
    with pytest.raises(ValueError, match=f"^A.*'a'.*2.*{len(SHIFTS)}"):
        plot_gaps(results, path)
    assert not path.exists()
