"""All figures: names that look like mathematics, and no matplotlib."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text

from peft_ncgeo.hub import draw_geometry
from peft_ncgeo.hub.record import Component, TrainingRecord
from peft_ncgeo.plots import plot_alignment, plot_curve, plot_gaps, plot_relation
from peft_ncgeo.protocols import Results

from .drawing import made_episodes, moments, seen_whole

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
        "image-classification", Component("NPTConfig"), class_names=STRANGE, snapshots=moments(len(STRANGE))
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


@pytest.mark.slow
def test_without_matplotlib_an_example_stops_before_it_trains(tmp_path):
    drawing = {path.name for path in EXAMPLES.glob("*.py") if "peft_ncgeo.plots" in path.read_text()}
    no_training = {"update_docs.py", "write_base_to_new.py", "write_image_tail.py"}
    assert drawing == {*DRAWING, *no_training}
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
        "image-classification", Component("NPTConfig"), class_names=list("abc"), snapshots=(moment, moment)
    )
    assert draw_geometry(record, tmp_path) == "geometry.png"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("peft_ncgeo.plots")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "geometry.png").unlink()
    assert draw_geometry(record, tmp_path) is None
    assert not list(tmp_path.iterdir())
