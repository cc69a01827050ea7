"""Figures, as files and by their numbers."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from peft_ncgeo.hub import draw_geometry
from peft_ncgeo.hub.record import Part, TrainingRecord
from peft_ncgeo.plots import plot_alignment, plot_curve, plot_gaps, plot_relation
from peft_ncgeo.protocols import EpisodeResults, Results
from peft_ncgeo.protocols.few_shot import SHIFTS

EXAMPLES = Path(__file__).parents[2] / "examples"
DRAWING = ["adapt_copa.py", "make_cards.py", "train_prototypes.py", "train_space_alignment.py"]
WITHOUT = """
import runpy, sys
sys.modules["matplotlib"] = None
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    sys.argv = [name, "--output_dir", "out"]
    try:
        runpy.run_path(f"{sys.path[0]}/{name}", run_name="__main__")
    except ImportError as error:
        print(name, error)
"""


def rows():
    rng = np.random.default_rng(0)
    return [
        {"setting": s, "method": m, "seed": seed, "x": 10 * shift + rng.normal(), "y": -10 * shift + rng.normal()}
        for shift, s in enumerate(("a", "b"))
        for m in ("p", "q")
        for seed in range(5)
    ]


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


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def moments(count, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(count, 3, generator=generator) @ torch.randn(3, dim, generator=generator)
    means = low + 5 + 0.3 * torch.randn(count, dim, generator=generator)
    weights = low + torch.randn(count, dim, generator=generator)
    return (means, weights), (means * 2 - 1, 0.3 * weights + 4 * (means - means.mean(0)))


def by_hand(before, after):
    """The numbers of the figure, in numpy, every class with a mean."""
    units = {}
    for moment, pair in (("before", before), ("after", after)):
        means, weights = (tensor.double().numpy() for tensor in pair)
        for part, rows in (("means", means - means.mean(0)), ("weights", weights)):
            units[f"{part}_{moment}"] = rows / np.sqrt((rows**2).sum(1))[:, None]
    stacked = np.concatenate(list(units.values()))
    values, vectors = np.linalg.eigh(stacked.T @ stacked)
    plane = vectors[:, values.argsort()[::-1][:2]]
    plane = np.stack([v if v[np.abs(v).argmax()] > 0 else -v for v in plane.T], axis=1)
    numbers = {key: rows @ plane for key, rows in units.items()}
    for moment in ("before", "after"):
        numbers[f"cosines_{moment}"] = np.einsum("cd,kd->ck", units[f"weights_{moment}"], units[f"means_{moment}"])
    return numbers


@pytest.mark.parametrize("count", [2, 10, 100])
def test_alignment_by_hand_and_as_drawn(tmp_path, drawn, count):
    before, after = moments(count)
    names = [f"class {i}" for i in range(count)]
    numbers = plot_alignment(before, after, tmp_path / "f.png", names, title="a title")
    expected = by_hand(before, after)
    assert numbers.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(numbers[key], value, atol=1e-5, err_msg=key)

    (figure,) = drawn
    planes, maps = figure.axes[:2], figure.axes[2:4]
    labels = names if count <= 30 else []
    for moment, plane, heat in zip(("before", "after"), planes, maps, strict=True):
        lines = [line.get_xydata() for line in plane.lines]
        tips = np.concatenate([numbers[f"means_{moment}"], numbers[f"weights_{moment}"]])
        np.testing.assert_array_equal([line[0] for line in lines], np.zeros((2 * count, 2)))
        np.testing.assert_array_equal([line[1] for line in lines], tips)
        styles = {(line.get_linestyle(), line.get_marker()) for line in plane.lines[:count]}
        assert styles.isdisjoint({(line.get_linestyle(), line.get_marker()) for line in plane.lines[count:]})
        colours = [tuple(line.get_color()) for line in plane.lines]
        assert colours[:count] == colours[count:]
        assert len(set(colours)) == count
        assert plane.get_aspect() == 1
        assert plane.patches[0].get_radius() == 1
        assert plane.get_title().startswith(f"{moment}: {(tips**2).sum() / (2 * count):.0%}")
        (image,) = heat.images
        np.testing.assert_array_equal(image.get_array(), numbers[f"cosines_{moment}"])
        assert image.get_clim() == (-1, 1)
        assert heat.get_title() == f"{moment}: mean of the diagonal {np.diag(numbers[f'cosines_{moment}']).mean():.3f}"
        assert [label.get_text() for label in heat.get_xticklabels()] == labels
    assert [label.get_text() for label in maps[0].get_yticklabels()] == labels
    assert figure.get_suptitle() == "a title"
    picture = np.asarray(Image.open(tmp_path / "f.png").convert("RGB"))
    assert (picture[[0, -1]] == 255).all(), "something is cut off"
    assert (picture[:, [0, -1]] == 255).all(), "something is cut off"


def test_alignment_leaves_out_classes_without_direction(tmp_path, drawn):
    """No samples before, a weight of 0 after; classes keep their names, and the cosines are those of the moment."""
    before, after = moments(6)
    before[0][1] = torch.nan
    after[1][4] = 0
    kept = [0, 2, 3, 5]
    numbers = plot_alignment(before, after, tmp_path / "f.png")
    assert [label.get_text() for label in drawn[0].axes[2].get_xticklabels()] == ["0", "2", "3", "5"]
    for moment, (means, weights) in (("before", before), ("after", after)):
        mu = (means - means.nanmean(0))[kept]
        cosines = torch.cosine_similarity(weights[kept][:, None], mu[None], dim=-1)
        np.testing.assert_allclose(numbers[f"cosines_{moment}"], cosines.numpy(), atol=1e-5)
        assert numbers[f"weights_{moment}"].shape == (4, 2)


def test_alignment_takes_tensors_of_any_kind(tmp_path):
    """Half precision, with a graph, and classes that are perfectly aligned on a line."""
    row = torch.tensor([1.0, 2.0, -2.0])
    means = torch.stack([row, -row]).bfloat16()
    weights = torch.stack([3 * row, -row]).requires_grad_()
    numbers = plot_alignment((means, weights), (means.double(), weights), tmp_path / "f.png")
    assert numbers["cosines_after"] == pytest.approx(np.array([[1, -1], [-1, 1]]))
    assert np.abs(numbers["weights_before"][:, 0]) == pytest.approx([1, 1])


STRANGE = ["$$", r"$\frac$", "$5$ bill", "_hidden", r"\$ a_b^c", "%#&~{x}"]
LABELS = {"x_label": "$$ x", "y_label": r"$\y"}


def draw_relation(path):
    made = [
        {"setting": s, "method": m, "seed": i, "x": i, "y": i * i} for s in STRANGE for m in STRANGE for i in range(3)
    ]
    plot_relation(Results(made, ["x"]), "x", "y", path, **LABELS)
    return [*STRANGE, *STRANGE, *LABELS.values()]


def draw_curve(path):
    made = [{"method": m, "x": 10**i, "y": i} for m in STRANGE for i in range(14)]
    plot_curve(made, "x", "y", path, log_x=True, **LABELS)
    return [*STRANGE, *LABELS.values()]


def draw_gaps(path):
    plot_gaps(made_episodes(STRANGE, dict.fromkeys(STRANGE, 2)), path, title="$$")
    return [*STRANGE, *STRANGE, "$$"]


def draw_alignment(path):
    plot_alignment(*moments(len(STRANGE)), path, STRANGE, title="$$")
    return [*STRANGE * 4, "$$"]


def draw_record(path):
    record = TrainingRecord(
        "image-classification", Part("NPTConfig"), class_names=STRANGE, moments=moments(len(STRANGE))
    )
    path.with_name(draw_geometry(record, path.parent)).rename(path)
    return STRANGE * 4


@pytest.mark.parametrize("draw", [draw_relation, draw_curve, draw_gaps, draw_alignment, draw_record])
def test_names_with_dollars_are_no_mathematics(tmp_path, drawn, draw):
    """Class names (price levels), methods, settings, domains, labels and titles are shown as they are."""
    wanted = draw(tmp_path / "x.png")
    texts = {text for text in drawn[0].findobj(Text) if text.get_visible()}
    shown = [text for text in texts if text.get_text() in wanted]
    assert sorted(text.get_text() for text in shown) == sorted(wanted)
    assert not any(text.get_parse_math() or text.get_usetex() for text in shown)
    seen_whole(tmp_path / "x.png")


def test_alignment_errors(tmp_path):
    before, after = moments(3)
    path = tmp_path / "f.png"
    with pytest.raises(ValueError, match=r"one shape \(K, d\), d >= 2.*\(2, 16\)"):
        plot_alignment(before, (after[0], after[1][:2]), path)
    with pytest.raises(ValueError, match=r"one shape"):
        plot_alignment((before[0][:, :1],) * 2, (before[0][:, :1],) * 2, path)
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        plot_alignment(before, after, path, ["a", "b"])
    with pytest.raises(ValueError, match="weights after are not finite"):
        plot_alignment(before, (after[0], after[1] / 0), path)
    before[0][0], after[0][1] = torch.nan, torch.nan
    with pytest.raises(ValueError, match="^1 classes have a mean"):
        plot_alignment(before, after, path)
    assert not path.exists()


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


def made_episodes(domains, counts, seen=(), sweep=True):
    """Rows in no order, `counts[method]` episodes of every domain; episodes share the gap before adaptation."""
    rng = np.random.default_rng(0)
    made = []
    for domain in domains:
        before = rng.uniform(0.1, 0.3, max(counts.values()))
        for shift, (method, count) in enumerate(counts.items()):
            for i in range(count):
                gap = before[i] + shift * rng.uniform(0.1, 0.2)
                row = {"domain": domain, "method": method, "episode": i, "gap_before": before[i], "gap_after": gap}
                if sweep:
                    row["sweep_gaps"] = [gap * (1 + t) for t in SHIFTS]
                    row["sweep_losses"] = rng.uniform(3, 4, len(SHIFTS)).tolist()
                made.append(row)
    rng.shuffle(made)
    return EpisodeResults(made, list(domains), list(counts), list(seen))


def interval(values):
    return [np.mean(values), 1.96 * np.std(values, ddof=1) / np.sqrt(len(values))]


def seen_whole(path):
    """The picture has colours, and nothing touches its edges."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    assert (picture[[0, -1]] == 255).all(), "something is cut off"
    assert (picture[:, [0, -1]] == 255).all(), "something is cut off"


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
    with pytest.raises(ValueError, match="No episode of 'a' was run with 'q'"):
        plot_gaps(EpisodeResults(results.rows, ["a"], ["p", "q"]), path)
    results.rows[0]["sweep_losses"] = [1.0, 2.0]
    with pytest.raises(ValueError, match=f"^A sweep of 'a' has 2 numbers for {len(SHIFTS)} shifts"):
        plot_gaps(results, path)
    assert not path.exists()


def test_without_matplotlib_an_example_stops_before_it_trains(tmp_path):
    drawing = {path.name for path in EXAMPLES.glob("*.py") if "peft_ncgeo.plots" in path.read_text()}
    assert drawing == {*DRAWING, "update_readme.py"}  # which trains nothing
    command = [sys.executable, "-c", WITHOUT, str(EXAMPLES), *DRAWING]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == DRAWING
    assert all("pip install peft_ncgeo[plot]" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_a_record_has_no_figure(tmp_path, monkeypatch):
    moment = torch.randn(3, 8), torch.randn(3, 8)
    record = TrainingRecord(
        "image-classification", Part("NPTConfig"), class_names=list("abc"), moments=(moment, moment)
    )
    assert draw_geometry(record, tmp_path) == "geometry.png"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("peft_ncgeo.plots")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "geometry.png").unlink()
    assert draw_geometry(record, tmp_path) is None
    assert not list(tmp_path.iterdir())
