"""Few-shot episodes with CoPA, on the demo's domains and on data and a backbone of one's own; its benchmark."""

from __future__ import annotations

import json
import re

import pytest

from peft_ncgeo.data import load_few_shot_domains
from peft_ncgeo.protocols import EpisodeResults

from .test_examples import run_example, updated
from .test_image_examples import own  # noqa: F401  a fixture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FEW = ["--ways", "5", "--shots", "1", "--episodes", "3", "--domains", "twemoji", "digits"]
METHODS = ["nearest prototype", "URL", "URL, lr 1", "CoPA", "CoPA + adapters"]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copa")
    with pytest.MonkeyPatch.context() as patch:
        run_example("adapt_copa.py", *FEW, "--output_dir", str(folder), monkeypatch=patch)
    return folder


@pytest.mark.slow
def test_table_and_figure(demo_run, monkeypatch, capsys):
    folder = demo_run / "resnet" / "5-way-1-shot"
    results = EpisodeResults.load(folder / "results.json")
    assert (results.methods, results.domains, results.seen) == (METHODS, ["twemoji", "digits"], ["twemoji"])
    assert len(results.rows) == 5 * 2 * 3
    assert all(row["ways"] == row["support"] == 5 for row in results.rows)
    assert "resnet, 5-way-1-shot episodes, seed 0" in results.note
    assert (folder / "gap.png").stat().st_size > 10_000
    run_example("adapt_copa.py", *FEW, "--output_dir", str(demo_run), monkeypatch=monkeypatch)  # reads what is there
    out = capsys.readouterr().out
    assert (
        "| accuracy | episodes | twemoji (seen) | digits | mean of seen | mean of unseen | mean of all | rank |" in out
    )
    cached = results.with_methods(METHODS[:4])
    common = results.on_common_episodes()
    for table in (cached.accuracy_table(), common.accuracy_table(), common.geometry_table()):
        assert table in out
    assert re.search(r"^\| CoPA - URL \| 3 \| [+-]", out, flags=re.MULTILINE)
    before = (folder / "results.json").read_text()
    run_example("adapt_copa.py", *FEW[:-1], "--output_dir", str(demo_run), monkeypatch=monkeypatch)
    assert "holds other methods or domains" in capsys.readouterr().out
    assert (folder / "results.json").read_text() == before


@pytest.mark.slow
def test_own_images_and_backbone(own, tmp_path, monkeypatch, capsys):  # noqa: F811
    few = ["--ways", "4", "--shots", "2", "--episodes", "2", "--methods", "URL", "CoPA"]
    run_example("adapt_copa.py", *own, *few, "--output_dir", str(tmp_path), monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert "| accuracy | episodes | images | mean of unseen | mean of all | rank |" in out
    results = EpisodeResults.load(tmp_path / "model" / "4-way-2-shot" / "results.json")
    assert results.seen == []
    assert {row["support"] for row in results.rows} == {8}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--domains", "omniglot"], "There is no domain 'omniglot'; there are twemoji, emojione,"),
        (["--dataset_name", "IMAGES", "--label_column", "kind"], "has no column 'kind' among"),
    ],
)
def test_bad_arguments(arguments, expected, own, tmp_path, monkeypatch):  # noqa: F811
    arguments = [own[-1] if argument == "IMAGES" else argument for argument in arguments]
    with pytest.raises(SystemExit, match=expected):
        run_example("adapt_copa.py", *arguments, "--output_dir", str(tmp_path), monkeypatch=monkeypatch)


@pytest.mark.slow
def test_tuning_looks_at_development_domains(tmp_path, monkeypatch):
    arguments = ["--tune", "--backbone", "vit", "--episodes", "2", "--ways", "5", "--shots", "1"]
    run_example("adapt_copa.py", *arguments, "--output_dir", str(tmp_path), monkeypatch=monkeypatch)
    folder = tmp_path / "tune" / "vit" / "5-way-1-shot"
    tuned = json.loads((folder / "tuned.json").read_text())["mean accuracy"]
    assert len(tuned) == 9
    assert {path.name for path in folder.iterdir()} == {*load_few_shot_domains("development"), "tuned.json"}


@pytest.mark.slow
def test_results_are_written_into_the_page(demo_run, tmp_path, monkeypatch):
    outputs = tmp_path / "outputs" / "adapt_copa" / "resnet"
    outputs.mkdir(parents=True)
    (outputs / "5-way-1-shot").symlink_to(demo_run / "resnet" / "5-way-1-shot")
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- copa table -->\nold\n<!-- end of copa table -->\nafter\n")
    text = updated(page, monkeypatch)
    results = EpisodeResults.load(outputs / "5-way-1-shot" / "results.json")
    assert results.with_methods(METHODS[:4]).accuracy_table() in text
    assert results.on_common_episodes().accuracy_table() in text
    assert results.note in text
    assert "old" not in text
    kept = json.loads((tmp_path / "examples" / "results" / "adapt_copa_demo.json").read_text())
    accuracies = kept["resnet/5-way-1-shot"]["accuracy"]["digits, CoPA"]
    assert accuracies == pytest.approx(list(results.values("digits", "CoPA").values()), abs=0.01)


@pytest.mark.slow
def test_benchmark(monkeypatch, capsys):
    arguments = ["--episodes", "4", "--steps", "5", "--repeats", "1", "--width", "32"]
    run_example("benchmark_copa.py", *arguments, monkeypatch=monkeypatch)
    rows = re.findall(r"^\| ([\w ,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.e+-]+) \|$", capsys.readouterr().out, flags=re.M)
    assert [row[0] for row in rows] == ["batches of 8 episodes", "one by one", "one by one, N x N loss"]
    assert rows[0][2] == "1.00"
    assert all(float(row[3]) < 1e-5 for row in rows)  # the same heads
