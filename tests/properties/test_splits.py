"""Splits, tails and episodes of labels of any kind: counted by hand again, or refused by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from hypothesis import event, given
from hypothesis import strategies as st

from peft_ncgeo.data import (
    EpisodeSampler,
    base_new_split,
    class_counts,
    few_shot,
    long_tailed,
    realised_imbalance_factor,
    step_imbalanced,
)

from ..profiles import cases
from .outcomes import said_well

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
wild = st.none() | st.booleans() | st.integers() | st.floats() | words | st.just([1]) | st.just(10**30)


@st.composite
def label_sets(draw, odd: bool = False) -> Any:
    """Rows with a number each and labels of 1 to 6 classes, all of them filled, or of any number beside them."""
    names = draw(st.lists(words, min_size=1, max_size=6, unique=True))
    inside = st.integers(0, len(names) - 1)
    labels = draw(st.lists(inside, max_size=30)) + [*range(len(names))] * draw(st.integers(0 if odd else 2, 3))
    if odd:
        labels += draw(st.lists(st.none() | st.integers(-3, len(names) + 2), max_size=4))
    rows = {"row": list(range(len(labels))), "label": labels}
    plain = Dataset.from_dict(rows, features=Features({"row": Value("int64"), "label": Value("int64")}))
    kind = draw(st.sampled_from([ClassLabel(names=names)] * 6 + [None])) if odd else ClassLabel(names=names)
    if kind is None:
        return plain
    plain = plain.remove_columns("label").add_column("label", labels, feature=kind)
    return plain.select_columns(["label"]) if odd and draw(st.booleans()) else plain


def sizes(dataset: Dataset) -> list[int]:
    labels = dataset["label"][:]
    return [labels.count(c) for c in range(len(names(dataset)))]


def names(dataset: Dataset) -> list[str]:
    return dataset.features["label"].names


def drawn_from(found: Dataset, whole: Dataset) -> None:
    """Rows of the whole, each at most once, with the label and the names that they had."""
    assert names(found) == names(whole)
    if "row" in found.column_names:
        rows = found["row"][:]
        assert len(set(rows)) == len(rows)
        known = whole["label"][:]
        assert found["label"][:] == [known[row] for row in rows]


@cases(1.4)
@given(dataset=label_sets(odd=True))
def test_labels_of_any_kind(dataset):
    """Everything that reads labels takes the same ones; those outside the names are never left out in silence."""
    counts = said_well(lambda: class_counts(dataset))
    event(f"taken: {counts is not None}")
    calls = [
        lambda: few_shot(dataset, 1),
        lambda: base_new_split(dataset),
        lambda: long_tailed(dataset, tau=0.5, n_max=1),
        lambda: step_imbalanced(dataset, 2, n_max=1),
        lambda: realised_imbalance_factor(dataset),
        lambda: EpisodeSampler(dataset, ways=2, shots=1)[0],
    ]
    found = [said_well(call) for call in calls]
    if counts is None:
        assert found == [None] * 6
        return
    assert counts.tolist() == sizes(dataset)
    if found[0] is not None:
        assert sizes(found[0]) == [1] * len(counts)
        drawn_from(found[0], dataset)
    if found[1] is not None:
        halves = [found[1]["base"], found[1]["new"]]
        assert sizes(halves[0]) + sizes(halves[1]) == counts.tolist()
        assert [*halves[0].features["label"].names, *halves[1].features["label"].names] == names(dataset)
        assert [len(half) for half in halves] == [sum(sizes(half)) for half in halves]
    if found[4] is not None:
        assert found[4] == counts.max() / counts.min()
    if found[5] is not None:
        labels, episode = dataset["label"][:], found[5]
        for rows, ways in ((episode.support, episode.support_labels), (episode.query, episode.query_labels)):
            assert [labels[row] for row in rows] == episode.classes[ways].tolist()
        assert not {*episode.support} & {*episode.query}


OPTIONS = {
    "few_shot": {"shots": st.integers(1, 3), "seed": st.integers(0, 9)},
    "tau": {"tau": st.floats(0.05, 1), "n_max": st.integers(1, 4), "seed": st.integers(0, 9)},
    "factor": {"imbalance_factor": st.floats(1, 50), "n_max": st.none() | st.integers(1, 4)},
    "step": {"ratio": st.floats(1, 50), "n_max": st.none() | st.integers(1, 4), "seed": st.integers(0, 9)},
    "episodes": {"ways": st.none() | st.integers(2, 3), "shots": st.none() | st.integers(1, 2), "seed": st.just(3)},
}
CALLS = {"few_shot": few_shot, "tau": long_tailed, "factor": long_tailed, "step": step_imbalanced}


@cases(2.4)
@given(data=st.data(), dataset=label_sets(), what=st.sampled_from(sorted(OPTIONS)))
def test_settings_of_any_kind(data, dataset, what):
    """One of them at most is of another kind; what is drawn has the sizes of the formula."""
    options = {name: data.draw(right, name) for name, right in OPTIONS[what].items()}
    if data.draw(st.booleans()):
        options[data.draw(st.sampled_from([*sorted(options), "label_column"]))] = data.draw(wild)
    if what == "episodes":
        found = said_well(lambda: EpisodeSampler(dataset, min_ways=2, **options)[0])
        if found is not None:
            assert len(found.classes) == (options["ways"] or len(found.classes)) >= 2
        return
    found = said_well(lambda: CALLS[what](dataset, **options))
    event(f"taken: {found is not None}")
    if found is None:
        return
    drawn_from(found, dataset)
    counts, k, n_max = sizes(dataset), len(sizes(dataset)), options.get("n_max") or 16 if what == "tau" else None
    n_max = n_max or options.get("n_max") or min(counts)
    last = options.get("tau") or 1 / options.get("imbalance_factor", 1)
    expected = {
        "few_shot": lambda: [options["shots"]] * k,
        "tau": lambda: [max(1, round(round(n_max * last ** (c / (k - 1)), 6))) for c in range(k)],
        "factor": lambda: [max(1, int(round(n_max * last ** (c / (k - 1)), 6))) for c in range(k)],
        "step": lambda: [n_max if c < math.ceil(k / 2) else max(1, int(round(n_max / options["ratio"], 6)))
                         for c in range(k)],
    }[what]()  # fmt: skip
    assert sizes(found) == expected


NO_SETS = [None, [], {"label": [0]}, Dataset.from_dict({}), Dataset.from_dict({"label": []}), np.zeros(3)]
NO_SETS += [Dataset.from_dict({"label": [[0]]}, features=Features({"label": Sequence(ClassLabel(names=["a", "b"]))}))]


@pytest.mark.parametrize("dataset", NO_SETS, ids=str)
def test_what_is_no_labelled_set(dataset):
    calls = [class_counts, base_new_split, realised_imbalance_factor, EpisodeSampler]
    calls += [lambda d: few_shot(d, 1), lambda d: long_tailed(d, tau=0.5), lambda d: step_imbalanced(d, 2)]
    assert [said_well(lambda call=call: call(dataset)) for call in calls] == [None] * 7
