"""Tables of results: their numbers, files, and differences between methods, paired by setting and seed."""

from __future__ import annotations

import csv
import json
import statistics

import numpy as np
import pytest
from scipy.stats import ttest_rel

from peft_ncgeo.protocols import Results

from ..hub.test_card import cells

SETTINGS, SEEDS = ("a", "b"), (1, 2, 3, 4)


def made() -> tuple[Results, dict[str, np.ndarray]]:
    """Rows in no order, and the values (setting, seed) of each method."""
    rng = np.random.default_rng(0)
    values = {method: rng.normal(50, 5, (2, 4)) for method in ("ours", "x_1", "texts")}
    rows = [
        {"setting": setting, "method": method, "seed": seed, "H": float(found[i, j])}
        for method, found in values.items()
        for i, setting in enumerate(SETTINGS)
        for j, seed in enumerate(SEEDS)
    ]
    return Results([rows[i] for i in rng.permutation(len(rows))], ["H"], titles={"H": "mean"}), values


def test_differences_are_those_of_a_paired_t_test():
    results, values = made()
    for i, setting in enumerate((*SETTINGS, None)):
        ours, other = (values[m].mean(0) if setting is None else values[m][i] for m in ("ours", "x_1"))
        interval = ttest_rel(other, ours).confidence_interval(0.95)
        mean, half = results.difference(setting, "x_1", "ours", "H")
        assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    table = results.paired_differences("H", "ours", ["b"]).splitlines()
    assert table[0] == "| mean - mean of ours | b | mean |"
    mean, half = results.difference("b", "x_1", "ours", "H")
    (row,) = (line for line in table if line.startswith("| x_1 |"))
    assert row == f"| x_1 | {mean:+.1f} ± {half:.1f} | {mean:+.1f} ± {half:.1f} |"


def test_only_seeds_that_both_have_are_paired():
    results, values = made()
    results.rows = [r for r in results.rows if (r["method"], r["setting"]) != ("x_1", "a") or r["seed"] == 3]
    for row in results.rows:
        if row["method"] == "texts" and row["setting"] == "a":
            row["H"] = None
    assert results.difference("a", "x_1", "ours", "H") == (
        pytest.approx(values["x_1"][0, 2] - values["ours"][0, 2]),
        None,
    )
    assert results.difference(None, "x_1", "ours", "H")[0] == pytest.approx(
        (values["x_1"] - values["ours"])[:, 2].mean()
    )
    assert results.difference(None, "texts", "ours", "H") == results.difference("b", "texts", "ours", "H")
    with pytest.raises(ValueError, match="No seed has 'H'"):
        results.difference("a", "texts", "ours", "H")
    assert "| texts |  | " in results.paired_differences("H", "ours")


def test_one_value_that_is_not_finite_does_not_stop_a_table():
    results, values = made()
    for row in results.rows:
        if (row["method"], row["setting"], row["seed"]) == ("x_1", "a", 2):
            row["H"] = float("nan")
    assert np.isnan(results.summary("a", "x_1", "H")).all()
    assert np.isnan(results.difference("a", "x_1", "ours", "H")).all()
    assert results.summary("b", "x_1", "H") == pytest.approx((values["x_1"][1].mean(), values["x_1"][1].std(ddof=1)))
    assert "| a | x_1 | nan ± nan |" in results.markdown()
    assert "| x_1 | +nan ± nan | " in results.paired_differences("H", "ours")


def test_a_reference_that_is_not_there_and_a_run_that_is_there_twice():
    results, _ = made()
    for wrong in (("H", "our"), ("base", "ours"), ("H", "ours", ["c"])):
        with pytest.raises(ValueError, match="results hold"):
            results.paired_differences(*wrong)
    results.rows.append({"setting": "a", "method": "x_1", "seed": 2, "H": 1.0})
    with pytest.raises(ValueError, match="two runs of seed 2 in 'a'"):
        results.difference("a", "x_1", "ours", "H")
    with pytest.raises(ValueError, match="two runs"):
        results.paired_differences("H", "ours")


def test_results_as_tables_and_files(tmp_path):
    rows = [
        {"setting": s, "method": m, "seed": seed, "base": base + seed, "few": None if s == "a" else 1.0}
        for s in ("a", "b")
        for m, base in (("x", 10.0), ("y", 20.0))
        for seed in (1, 2, 3)
    ]
    results = Results(rows, ["base", "few"], "a note", {"base": "accuracy"})
    lines = results.markdown().splitlines()
    assert lines[0] == "| setting | method | accuracy | few |"
    spread = statistics.stdev([11, 12, 13])
    assert lines[2] == f"| a | x | 12.0 ± {spread:.1f} | - |"
    assert lines[4] == f"| b | x | 12.0 ± {spread:.1f} | 1.0 ± 0.0 |"
    assert results.summary("a", "y", "base") == (pytest.approx(22), pytest.approx(spread))
    with pytest.raises(ValueError, match="No.*'z'.*'a'.*'base'"):
        results.summary("a", "z", "base")
    assert results.pivot("base").splitlines()[3] == "| y | 22.0 ± 1.0 | 22.0 ± 1.0 |"
    results.save(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == rows
    with (tmp_path / "results.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == 12
    assert read[0] == {"setting": "a", "method": "x", "seed": "1", "base": "11.0", "few": ""}
    assert (tmp_path / "results.md").read_text().endswith("\n\na note\n")


def test_names_in_a_table_are_text():
    names = ["a|b", "<img src=x>", "`c|", "*d*", "e\nf"]
    rows = [{"setting": name, "method": name, "seed": 1, "H": 1.0} for name in names]
    for table in (Results(rows, ["H"], titles={"H": "H|H"}).markdown(), Results(rows, ["H"]).pivot("H")):
        lines = [cells(line) for line in table.splitlines()]
        assert len({len(line) for line in lines}) == 1
        assert [line[0] for line in lines[2:]] == [" ".join(name.split()) for name in names]
