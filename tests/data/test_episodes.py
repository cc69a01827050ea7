"""Episodes: the limits that they promise, and Meta-Dataset's rule computed anew beside them."""

from __future__ import annotations

import itertools
import math
import pickle

import datasets
import numpy as np
import pytest

from peft_ncgeo.data import Episode, EpisodeSampler

UNEVEN = [40, 0, 7, 300, 2, 1, 55, 12, 150, 23, 5, 90, 18, 6, 400, 33]


def labelled(labels, names: int | None = None) -> datasets.Dataset:
    names = max(labels) + 1 if names is None else names
    feature = datasets.ClassLabel(names=[f"class {c}" for c in range(names)])
    return datasets.Dataset.from_dict({"number": list(range(len(labels)))}).add_column(
        "label", list(labels), feature=feature
    )


def of_sizes(sizes, seed: int = 0) -> datasets.Dataset:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes)).tolist()
    return labelled(labels, len(sizes))


def arrays(episode: Episode) -> list[list[int]]:
    parts = (episode.classes, episode.support, episode.support_labels, episode.query, episode.query_labels)
    return [part.tolist() for part in parts]


def check(episode: Episode, labels: np.ndarray) -> tuple[int, np.ndarray, int]:
    """Check what holds for every episode; return its ways, the shots of each class and the queries per class."""
    ways = len(episode.classes)
    for part in (episode.classes, episode.support, episode.support_labels, episode.query, episode.query_labels):
        assert part.dtype == np.int64
        assert part.ndim == 1
    assert len(set(episode.classes.tolist())) == ways
    assert (labels[episode.support] == episode.classes[episode.support_labels]).all()
    assert (labels[episode.query] == episode.classes[episode.query_labels]).all()
    rows = np.concatenate([episode.support, episode.query])
    assert len(np.unique(rows)) == len(rows)
    shots = np.bincount(episode.support_labels, minlength=ways)
    queries = np.bincount(episode.query_labels, minlength=ways)
    assert len(shots) == len(queries) == ways
    assert shots.min() >= 1
    assert queries.min() == queries.max() >= 1
    return ways, shots, int(queries[0])


@pytest.mark.parametrize("seed", range(5))
def test_any_way_any_shot_keeps_its_limits(seed):
    dataset = of_sizes(UNEVEN, seed)
    labels, sizes = np.array(dataset["label"]), np.array(UNEVEN)
    settings = [
        {},
        {"queries": 3, "min_ways": 2, "max_ways": 6, "max_support": 40, "max_shots": 9},
        {"min_ways": 14, "max_support": 14},  # no room: one shot a class
        {"max_shots": 1},
        {"ways": 4, "max_support": 9},
    ]
    for setting in settings:
        limits = {"queries": 10, "min_ways": 5, "max_ways": 50, "max_support": 500, "max_shots": 100} | setting
        least, most = limits["min_ways"], min(limits["max_ways"], 14, limits["max_support"])
        if "ways" in setting:
            least = most = setting["ways"]
        sampler = EpisodeSampler(dataset, seed=seed, **setting)
        for episode in itertools.islice(sampler, 60):
            ways, shots, queries = check(episode, labels)
            chosen = sizes[episode.classes]
            assert least <= ways <= most
            assert chosen.min() >= 2
            assert queries == min(limits["queries"], chosen.min() // 2)
            assert shots.sum() <= limits["max_support"]
            assert (shots <= np.minimum(limits["max_shots"], chosen - queries)).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shots", [1, 5, 30])
def test_any_way_few_shot_keeps_its_limits(seed, shots):
    dataset = of_sizes(UNEVEN, seed)
    labels, sizes = np.array(dataset["label"]), np.array(UNEVEN)
    able = np.flatnonzero(sizes > shots)
    seen = set()
    for episode in itertools.islice(EpisodeSampler(dataset, shots=shots, seed=seed, max_support=190), 100):
        ways, given, queries = check(episode, labels)
        assert 5 <= ways <= min(len(able), 190 // shots)
        assert (given == shots).all()
        assert queries == min(10, sizes[episode.classes].min() - shots)
        seen |= set(episode.classes.tolist())
    assert seen == set(able.tolist())


def test_five_way_one_shot():
    dataset = of_sizes([30] * 8)
    for episode in itertools.islice(EpisodeSampler(dataset, ways=5, shots=1), 50):
        ways, shots, queries = check(episode, np.array(dataset["label"]))
        assert (ways, shots.tolist(), queries) == (5, [1] * 5, 10)
        assert episode.support_labels.tolist() == list(range(5))


def test_ways_are_capped_so_that_the_support_fits():
    dataset = of_sizes([30] * 40)
    ways = [len(e.classes) for e in itertools.islice(EpisodeSampler(dataset, shots=20, max_support=170), 200)]
    assert set(ways) == set(range(5, 9))
    ways = [len(e.classes) for e in itertools.islice(EpisodeSampler(dataset, max_support=9), 200)]
    assert set(ways) == set(range(5, 10))


@pytest.mark.parametrize(("max_support", "max_shots"), [(500, 100), (60, 100), (500, 8)])
def test_shots_follow_the_paper(max_support, max_shots):
    """The same generator in the same order, the rule written out anew, one class at a time."""
    dataset = of_sizes(UNEVEN)
    able = np.array([c for c, size in enumerate(UNEVEN) if size >= 2])
    sampler = EpisodeSampler(dataset, max_support=max_support, max_shots=max_shots, seed=9)
    full = capped = 0
    for index in range(200):
        rng = np.random.default_rng([9, index])
        ways = rng.integers(5, 15)
        classes = rng.choice(able, ways, replace=False).tolist()
        sizes = [UNEVEN[c] for c in classes]
        q = min(10, math.floor(0.5 * min(sizes)))
        beta = 1 - rng.random()
        size = sum(math.ceil(beta * min(max_shots, n - q)) for n in sizes)
        full += size > max_support
        size = min(max_support, size)
        shares = [
            math.exp(alpha) * n for alpha, n in zip(rng.uniform(-math.log(2), math.log(2), ways), sizes, strict=True)
        ]
        shots = [math.floor(share / sum(shares) * (size - ways)) + 1 for share in shares]
        capped += any(k > max_shots for k in shots)
        shots = [min(k, n - q, max_shots) for k, n in zip(shots, sizes, strict=True)]
        episode = sampler[index]
        assert episode.classes.tolist() == classes
        assert np.bincount(episode.support_labels).tolist() == shots
        assert np.bincount(episode.query_labels).tolist() == [q] * ways
    assert full > 0 or max_shots == 8  # the limits were met, or could not be
    assert capped > 0 or max_support == 60


def test_ways_and_classes_are_uniform():
    dataset = of_sizes([12] * 10)
    episodes = list(itertools.islice(EpisodeSampler(dataset, min_ways=3, max_ways=8, shots=1), 1800))
    ways = np.bincount([len(e.classes) for e in episodes], minlength=9)[3:]
    assert len(ways) == 6
    assert abs(ways - 300).max() < 4 * math.sqrt(300)
    first = np.bincount([e.classes[0] for e in episodes], minlength=10)
    assert abs(first - 180).max() < 4 * math.sqrt(180)


def test_support_sizes_are_spread_as_beta_is():
    """Two large classes: S is twice ceil(100 beta), and flooring two shares loses at most one image."""
    sampler = EpisodeSampler(of_sizes([400, 400]), min_ways=2)
    shots = np.array([np.bincount(episode.support_labels) for episode in itertools.islice(sampler, 2000)])
    half = np.ceil(shots.sum(axis=1) / 2)
    # up to 50, since above that max_shots cuts some
    for least in (10, 25, 50):
        assert abs((half <= least).mean() - least / 100) < 4 * math.sqrt(least / 100 * (1 - least / 100) / 2000)
    assert half.max() > 90


def test_shares_follow_the_sizes_and_alpha():
    """Of a pair, log(shots_0 / shots_1) is log(n_0 / n_1) plus the difference of two alphas."""
    dataset = of_sizes([3000, 1000])
    ratios = []
    for episode in itertools.islice(EpisodeSampler(dataset, min_ways=2, max_support=1000, max_shots=1000), 1500):
        shots = np.bincount(episode.support_labels)[np.argsort(episode.classes)]
        if 300 < shots.sum() < 900:  # large, so that whole numbers are fine steps, and not cut by a limit
            ratios.append(math.log((shots[0] - 0.5) / (shots[1] - 0.5)))
    assert len(ratios) > 400
    spread = 2 * math.log(2) / math.sqrt(6)  # of the difference of two uniform numbers of that range
    assert np.mean(ratios) == pytest.approx(math.log(3), abs=4 * spread / math.sqrt(len(ratios)))
    assert np.std(ratios) == pytest.approx(spread, rel=0.1)
    assert abs(np.array(ratios) - math.log(3)).max() < 2 * math.log(2) + 0.05


def test_an_episode_depends_on_seed_and_index_alone():
    dataset = of_sizes(UNEVEN)
    first, second = EpisodeSampler(dataset, seed=4), EpisodeSampler(dataset, seed=4)
    in_order = [arrays(first[i]) for i in range(12)]
    assert [arrays(second[i]) for i in reversed(range(12))] == in_order[::-1]
    assert [arrays(e) for e in itertools.islice(second, 12)] == in_order
    assert [arrays(e) for e in itertools.islice(second, 12)] == in_order  # from the start, every time
    assert arrays(pickle.loads(pickle.dumps(first))[np.int64(7)]) == in_order[7]
    assert len({str(episode) for episode in in_order}) == 12
    other = EpisodeSampler(dataset, seed=5)
    assert not any(arrays(other[i]) == in_order[i] for i in range(12))
    np.random.seed(0)  # the global generator has no say
    assert arrays(first[10**12]) == arrays(second[10**12])


def test_changing_an_episode_changes_no_other():
    sampler = EpisodeSampler(of_sizes(UNEVEN))
    expected = arrays(sampler[0])
    spoiled = sampler[0]
    for part in (spoiled.classes, spoiled.support, spoiled.query):
        part[:] = -1
    assert arrays(sampler[0]) == expected


def test_fewer_shots_are_among_more_and_queries_stay():
    dataset = of_sizes([30] * 8)
    for index in range(20):
        one, five = (EpisodeSampler(dataset, ways=5, shots=shots)[index] for shots in (1, 5))
        assert one.classes.tolist() == five.classes.tolist()
        assert one.query.tolist() == five.query.tolist()
        assert five.support.reshape(5, 5)[:, 0].tolist() == one.support.tolist()


def test_images_are_never_decoded():
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    broken = [{"picture": {"bytes": b"no image", "path": None}, "kind": i % 2} for i in range(24)]
    dataset = datasets.Dataset.from_list(broken, features=features)
    calls = []

    def transform(batch):
        calls.append(len(batch))
        return batch

    expected = [arrays(EpisodeSampler(dataset, ways=2, label_column="kind")[i]) for i in range(5)]
    with_transform = EpisodeSampler(dataset.with_transform(transform), ways=2, label_column="kind")
    assert [arrays(with_transform[i]) for i in range(5)] == expected
    assert not calls
    of_numpy = EpisodeSampler(dataset.with_format("numpy", columns=["kind"]), ways=2, label_column="kind")
    assert arrays(of_numpy[0]) == expected[0]


def test_rows_are_those_of_a_selection():
    dataset = of_sizes([30] * 8).select(range(100, 200))
    episode = EpisodeSampler(dataset, shots=2)[0]
    check(episode, np.array(dataset["label"]))
    assert max(episode.support.max(), episode.query.max()) < len(dataset) == 100


@pytest.mark.parametrize(
    ("sizes", "arguments", "message"),
    [
        ([20] * 6, {"ways": 1}, "ways=1 must be a whole number of at least 2"),
        ([20] * 6, {"ways": 2.0}, "ways=2.0 must be a whole number"),
        ([20] * 6, {"shots": 0}, "shots=0 must be a whole number of at least 1"),
        ([20] * 6, {"shots": True}, "shots=True must be a whole number"),
        ([20] * 6, {"queries": 0}, "queries=0 must be a whole number of at least 1"),
        ([20] * 6, {"min_ways": 1}, "min_ways=1 must be a whole number of at least 2"),
        ([20] * 6, {"max_ways": 1}, "max_ways=1 must be a whole number of at least 2"),
        ([20] * 6, {"max_support": None}, "max_support=None must be a whole number of at least 2"),
        ([20] * 6, {"max_shots": 0}, "max_shots=0 must be a whole number of at least 1"),
        ([20] * 6, {"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ([20] * 6, {"seed": 0.5}, "seed=0.5 must be a whole number"),
        ([20] * 6, {"seed": "1"}, "seed='1' must be a whole number"),
        ([20] * 6, {"max_ways": 4}, "min_ways=5 is above max_ways=4; lower min_ways or raise max_ways."),
        ([20] * 6, {"shots": 11, "max_shots": 10}, "shots=11 is above max_shots=10; lower shots or raise max_shots."),
        (
            [20] * 6,
            {"shots": 5, "max_support": 24},
            "5 ways of 5 shots do not fit max_support=24; lower shots or min_ways, or raise max_support.",
        ),
        (
            [20] * 6,
            {"ways": 6, "shots": 5, "max_support": 29},
            "6 ways of 5 shots do not fit max_support=29; lower shots or ways, or raise max_support.",
        ),
        ([20] * 6, {"ways": 6, "max_support": 5}, "6 ways of 1 shots do not fit max_support=5"),
        (
            [5, 6, 6, 6, 5],
            {"shots": 5},
            "Episodes of 5 ways need 5 classes with at least 6 images each; 'label' has only 3 such classes; "
            "lower shots or min_ways.",
        ),
        (
            [5, 6, 6, 6, 5],
            {"shots": 5, "ways": 4},
            "Episodes of 4 ways need 4 classes with at least 6 images each; 'label' has only 3 such classes; "
            "lower shots or ways.",
        ),
        (
            [9, 9, 1, 0, 9, 9],
            {},
            "Episodes of 5 ways need 5 classes with at least 2 images each; 'label' has only 4 such classes; "
            "lower min_ways.",
        ),
        ([0, 0], {"ways": 2}, "has only 0 such classes"),
    ],
)
def test_bad_settings_get_one_line(sizes, arguments, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        EpisodeSampler(of_sizes(sizes), **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_least_that_can_serve_does():
    for sizes, settings, ways, support in (
        ([6, 6, 6, 5, 5], {"shots": 5, "ways": 3}, 3, 15),
        ([2, 2, 1], {"ways": 2}, 2, 2),
        ([20] * 6, {"ways": 3, "max_ways": 2}, 3, None),  # max_ways is without effect; any number of shots
        ([20] * 6, {"shots": 5, "max_support": 25, "max_shots": 5}, 5, 25),
    ):
        episode = EpisodeSampler(of_sizes(sizes), **settings)[0]
        assert len(episode.classes) == ways
        assert support is None or len(episode.support) == support


@pytest.mark.parametrize("index", [-1, 0.5, "0", None, True, slice(0, 3)])
def test_bad_index_gets_one_line(index):
    sampler = EpisodeSampler(of_sizes([20] * 6))
    with pytest.raises((TypeError, ValueError), match=r"index=.* must.*whole.*least 0\.$"):
        sampler[index]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "Sample 3 has no label among the 2 class names (2 such samples); leave them out"),
        (-1, "Sample 3 has no label among the 2 class names (2 such samples)"),
        (2, "Sample 3 has label 2, outside the 2 class names (2 such samples)"),
        (-2, "Sample 3 has label -2, outside the 2 class names"),
    ],
)
def test_labels_outside_the_names_get_one_line(label, message):
    with pytest.raises(ValueError) as caught:
        EpisodeSampler(labelled([0, 1, 0, label, 1, label], names=2), ways=2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_sets_get_one_line():
    dataset = of_sizes([20] * 6)
    with pytest.raises(TypeError, match=r"Expected a datasets\.Dataset, got DatasetDict"):
        EpisodeSampler(datasets.DatasetDict(train=dataset))
    with pytest.raises(TypeError, match=r"Expected a datasets\.Dataset, got list"):
        EpisodeSampler([1, 2])
    with pytest.raises(ValueError, match="No label column 'kind' among"):
        EpisodeSampler(dataset, label_column="kind")
    with pytest.raises(ValueError, match="Column 'number' is not a ClassLabel but int64"):
        EpisodeSampler(dataset, label_column="number")
