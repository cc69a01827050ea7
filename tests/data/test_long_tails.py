"""Long tails and steps: counts recomputed by hand, and draws that depend on the seed and the rows alone."""

from __future__ import annotations

import math
from collections import Counter

import datasets
import numpy as np
import pytest

from peft_ncgeo.data import class_counts, few_shot, long_tailed, realised_imbalance_factor, step_imbalanced

from ..conftest import tiny_images


def numbers(sizes: list[int], label_column: str = "label") -> datasets.Dataset:
    """`sizes[k]` rows of class k, all different, without images."""
    labels = [k for k, size in enumerate(sizes) for _ in range(size)]
    values = [[int(v), f"text {v}"] for v in np.random.default_rng(0).permutation(len(labels))]
    names = datasets.ClassLabel(names=[f"class {k}" for k in range(len(sizes))])
    rows = {"number": [v[0] for v in values], "text": [v[1] for v in values]}
    return datasets.Dataset.from_dict(rows).add_column(label_column, labels, feature=names)


def sizes(dataset: datasets.Dataset, label_column: str = "label") -> list[int]:
    """Return the number of rows of each class, counted one by one."""
    counted = Counter(dataset[label_column])
    return [counted[k] for k in range(dataset.features[label_column].num_classes)]


def by_class(dataset: datasets.Dataset) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {k: set() for k in range(dataset.features["label"].num_classes)}
    for row in dataset:
        found[row["label"]].add(row["number"])
    return found


THIRTY = numbers([50] * 30)
# 16 * 0.06^(k/29), by logarithms and rounded by hand
TAIL_6 = [16, 15, 13, 12, 11, 10, 9, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("tau", [1.0, 0.25, 0.06])
def test_tau_sets_the_counts(tau):
    expected = [max(1, math.floor(math.exp(math.log(16) + k / 29 * math.log(tau)) + 0.5)) for k in range(30)]
    assert sizes(long_tailed(THIRTY, tau=tau)) == expected
    assert expected[0] == 16
    assert expected[-1] == {1.0: 16, 0.25: 4, 0.06: 1}[tau]
    if tau == 0.06:
        assert expected == TAIL_6


@pytest.mark.parametrize("factor", [1, 10, 50, 100, 200])
def test_imbalance_factor_sets_the_counts(factor):
    def at_least(n: int, k: int) -> bool:
        """n <= 50 * factor^(-k/29), in whole numbers."""
        return n**29 * factor**k <= 50**29

    expected = [max(1, max(n for n in range(51) if at_least(n, k))) for k in range(30)]
    assert sizes(long_tailed(THIRTY, imbalance_factor=factor)) == expected
    assert expected[0] == 50
    assert expected[-1] == max(1, 50 // factor)


def test_fifty_to_one():
    tail = long_tailed(THIRTY, imbalance_factor=50)
    counts = class_counts(tail)
    assert (counts[0], counts[-1]) == (50, 1)
    assert (np.diff(counts) <= 0).all()
    assert realised_imbalance_factor(tail) == 50


@pytest.mark.parametrize(("factor", "n_max"), [(49, 98), (49, 147), (103, 206), (10, 50)])
def test_the_last_count_loses_nothing_to_floating_point(factor, n_max):
    """98 * (1 / 49) is a hair below 2."""
    assert sizes(long_tailed(numbers([n_max] * 2), imbalance_factor=factor)) == [n_max, n_max // factor]


@pytest.mark.parametrize(("ratio", "n_max", "expected"), [(1.1, 33, 30), (2.2, 55, 25), (2.2, 54, 24)])
def test_the_step_loses_nothing_to_floating_point(ratio, n_max, expected):
    """33 / 1.1 is a hair below 30."""
    assert sizes(step_imbalanced(numbers([n_max] * 2), ratio)) == [n_max, expected]


def test_n_max():
    assert sizes(long_tailed(numbers([9, 7, 8]), imbalance_factor=1)) == [7, 7, 7]  # the smallest class's size
    assert sizes(long_tailed(numbers([9, 7, 8]), imbalance_factor=3, n_max=9)) == [9, 5, 3]  # 9 / sqrt(3) = 5.196
    assert sizes(long_tailed(numbers([9, 7, 8]), tau=0.5, n_max=8)) == [8, 6, 4]  # 8 / sqrt(2) = 5.66
    assert sizes(step_imbalanced(numbers([9, 7, 8]), ratio=2)) == [7, 7, 3]


@pytest.mark.parametrize(
    ("classes", "ratio", "n_max", "expected"),
    [
        (4, 10, 50, [50, 50, 5, 5]),
        (5, 10, 50, [50, 50, 50, 5, 5]),
        (2, 100, 50, [50, 1]),
        (3, 4, 10, [10, 10, 2]),
        (3, 1, 10, [10, 10, 10]),
        (3, 2.5, 10, [10, 10, 4]),
    ],
)
def test_step(classes, ratio, n_max, expected):
    assert sizes(step_imbalanced(numbers([50] * classes), ratio, n_max)) == expected


def draws(dataset, **arguments):
    return {
        "tau": long_tailed(dataset, tau=0.25, **arguments),
        "factor": long_tailed(dataset, imbalance_factor=5, n_max=15, **arguments),
        "step": step_imbalanced(dataset, ratio=5, n_max=15, **arguments),
    }


TEN = numbers([20] * 10)


@pytest.mark.parametrize("shuffle_classes", [False, True])
def test_draws_depend_on_the_seed_and_not_on_the_order_of_the_rows(shuffle_classes):
    arguments = {"seed": 4, "shuffle_classes": shuffle_classes}
    first = draws(TEN, **arguments)
    shuffled = draws(TEN.shuffle(seed=3), **arguments)
    other = draws(TEN, seed=5, shuffle_classes=shuffle_classes)
    for kind, drawn in first.items():
        assert drawn["label"] == sorted(drawn["label"])
        assert len(set(drawn["number"])) == len(drawn)
        assert drawn.to_list() == shuffled[kind].to_list()
        assert drawn.to_list() == draws(TEN, **arguments)[kind].to_list()
        assert drawn["number"] != other[kind]["number"]


def test_draws_of_images_do_not_depend_on_the_order_of_the_rows():
    def rows(dataset):
        return [(row["image"].tobytes(), row["label"]) for row in long_tailed(dataset, tau=0.25, n_max=10)]

    dataset = tiny_images(50)
    assert rows(dataset) == rows(dataset.shuffle(seed=3))
    assert [label for _, label in rows(dataset)] == [0] * 10 + [1] * 7 + [2] * 5 + [3] * 4 + [4] * 2


def test_the_order_of_the_columns_decides_nothing():
    turned = TEN.select_columns(["text", "label", "number"])
    assert turned.column_names != TEN.column_names
    assert long_tailed(turned, tau=0.25)["number"] == long_tailed(TEN, tau=0.25)["number"]


def test_smaller_counts_are_part_of_larger_ones():
    larger, smaller = by_class(long_tailed(TEN, tau=0.5)), by_class(long_tailed(TEN, tau=0.1))
    assert all(smaller[k] <= larger[k] for k in range(10))
    assert sum(len(smaller[k]) < len(larger[k]) for k in range(10)) >= 8
    shots = by_class(few_shot(TEN, 16))
    assert all(larger[k] <= shots[k] for k in range(10))


def test_a_classs_draw_does_not_depend_on_the_other_classes():
    one, other = numbers([20] * 4), numbers([20] * 4)
    other = other.filter(lambda row: row["label"] != 2 or row["number"] % 2 == 0)
    one, other = (by_class(step_imbalanced(dataset, ratio=2, n_max=6, seed=1)) for dataset in (one, other))
    assert [one[k] == other[k] for k in range(4)] == [True, True, False, True]


def test_shuffled_classes_get_the_same_counts_in_another_order():
    plain, mixed = sizes(long_tailed(TEN, tau=0.1)), sizes(long_tailed(TEN, tau=0.1, shuffle_classes=True))
    assert mixed != plain
    assert sorted(mixed, reverse=True) == plain
    assert len({tuple(sizes(long_tailed(TEN, tau=0.1, seed=s, shuffle_classes=True))) for s in range(5)}) == 5
    # the seed alone says which class is the largest, whatever the rule
    assert [mixed[k] == 16 for k in range(10)] == [
        n == 20 for n in sizes(long_tailed(TEN, imbalance_factor=10, shuffle_classes=True))
    ]
    steps = sizes(step_imbalanced(TEN, ratio=5, n_max=10, shuffle_classes=True))
    assert steps != sorted(steps, reverse=True)
    assert Counter(steps) == {10: 5, 2: 5}


def test_every_class_is_the_largest_for_some_seed():
    three = numbers([4] * 3)
    first = [sizes(long_tailed(three, imbalance_factor=4, seed=s, shuffle_classes=True)).index(4) for s in range(30)]
    assert min(Counter(first)[k] for k in range(3)) >= 3


def test_format_and_transform_stay():
    def transform(batch):
        return {"label": [7 * label for label in batch["label"]]}

    for drawn in draws(TEN.with_transform(transform)).values():
        assert drawn[len(drawn) - 1] == {"label": 63}
    for drawn in draws(TEN.with_format("numpy")).values():
        assert drawn.format["type"] == "numpy"
        assert drawn.features == TEN.features


def test_another_label_column():
    dataset = numbers([8, 8, 8], label_column="kind")
    for draw in (
        lambda d: long_tailed(d, imbalance_factor=4, label_column="kind"),
        lambda d: step_imbalanced(d, ratio=4, label_column="kind"),
    ):
        drawn = draw(dataset)
        counted = sizes(drawn, "kind")
        assert counted[::2] == [8, 2]
        assert class_counts(drawn, "kind").tolist() == counted
        assert realised_imbalance_factor(drawn, label_column="kind") == 4
        assert drawn.to_list() == draw(dataset.shuffle(seed=3)).to_list()


def test_class_counts():
    counts = class_counts(numbers([3, 0, 5, 0]).shuffle(seed=1).with_format("torch"))
    assert counts.tolist() == [3, 0, 5, 0]
    assert counts.dtype == np.int64
    assert class_counts(numbers([2, 1]).select([])).tolist() == [0, 0]
    assert realised_imbalance_factor(numbers([3, 7, 2])) == 3.5


def test_rows_without_a_label_do_not_count():
    dataset = numbers([4, 4, 4])
    labels = [None, -1, *dataset["label"][2:]]
    dataset = dataset.remove_columns("label").add_column("label", labels, feature=dataset.features["label"])
    assert class_counts(dataset).tolist() == [2, 4, 4]
    assert realised_imbalance_factor(dataset) == 2


def test_realised_factor_of_a_class_without_samples():
    with pytest.raises(ValueError, match="Class 'class 1'.*no"):
        realised_imbalance_factor(numbers([3, 0, 5]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of tau and imbalance_factor"),
        ({"tau": 0.5, "imbalance_factor": 2}, "exactly one of tau and imbalance_factor"),
        ({"tau": 0}, "tau=0 must be above 0 and at most 1"),
        ({"tau": 1.01}, "tau=1.01 must be above 0 and at most 1"),
        ({"tau": math.nan}, "tau=nan must be above 0"),
        ({"imbalance_factor": 0.9}, "imbalance_factor=0.9 must be a finite number of at least 1"),
        ({"imbalance_factor": math.inf}, "imbalance_factor=inf must be a finite number"),
        ({"imbalance_factor": math.nan}, "imbalance_factor=nan must be a finite number"),
        ({"tau": 0.5, "n_max": 0}, "n_max=0 must be a whole number of at least 1"),
        ({"tau": 0.5, "n_max": 2.5}, "n_max=2.5 must be a whole number"),
        ({"tau": 0.5, "n_max": True}, "n_max=True must be a whole number"),
        ({"tau": 0.5, "n_max": 2, "seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"tau": 1.0, "n_max": 5}, "Class 'class 1' has 4 samples, fewer than the 5 asked for; lower n_max"),
        ({"tau": 0.9}, "Class 'class 0' has 6 samples, fewer than the 16 asked for; lower n_max"),
        ({"imbalance_factor": 2, "n_max": 8}, "Class 'class 0' has 6 samples, fewer than the 8 asked for"),
        ({"tau": 0.5, "n_max": 2, "label_column": "kind"}, "No label column 'kind'"),
    ],
)
def test_long_tailed_refuses(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        long_tailed(numbers([6, 4, 5]), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.5}, "ratio=0.5 must be a finite number of at least 1"),
        ({"ratio": math.inf}, "ratio=inf must be a finite number"),
        ({"ratio": 2, "n_max": 0}, "n_max=0 must be a whole number of at least 1"),
        ({"ratio": 2, "n_max": 2, "seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"ratio": 2, "n_max": 5}, "Class 'class 1' has 4 samples, fewer than the 5 asked for; lower n_max"),
        ({"ratio": 2, "label_column": "number"}, "Column 'number' is not a ClassLabel"),
    ],
)
def test_step_imbalanced_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        step_imbalanced(numbers([6, 4, 5]), **arguments)


@pytest.mark.parametrize(
    "draw",
    [
        lambda d, n: long_tailed(d, tau=0.5, n_max=n),
        lambda d, n: long_tailed(d, imbalance_factor=2, n_max=n),
        lambda d, n: step_imbalanced(d, ratio=2, n_max=n),
    ],
    ids=["tau", "factor", "step"],
)
def test_too_few_classes_and_empty_ones(draw):
    with pytest.raises(ValueError, match="Column 'label'.*1 class.*needs.*least"):
        draw(numbers([4]), 2)
    with pytest.raises(ValueError, match="Class 'class 1'.*0.*fewer"):
        draw(numbers([4, 0, 4]), 4)
    with pytest.raises(TypeError, match="Expected a datasets.Dataset, got list"):
        draw([], 2)


def test_the_default_n_max_needs_every_class():
    for draw in (lambda d: long_tailed(d, imbalance_factor=2), lambda d: step_imbalanced(d, ratio=2)):
        with pytest.raises(ValueError, match="Class 'class 1' has no samples"):
            draw(numbers([4, 0, 4]))
