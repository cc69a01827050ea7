"""The few-shot protocol: blocks of episodes, what is measured in each, and the statistics over them."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetModel

from peft_ncgeo.data import EpisodeSampler
from peft_ncgeo.protocols import EpisodeResults, FewShotMethod, few_shot
from peft_ncgeo.protocols.few_shot import SHIFTS

from ..conftest import tiny, tiny_images, tiny_processor

SIX = ["red cat", "blue dog", "green bird", "black fish", "white panda", "tree"]
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
URL = {"steps": 4, "lr": 0.3, "weight_decay": 0.0, "optimizer": torch.optim.Adadelta}
METHODS = [
    FewShotMethod("nearest", settings={"steps": 0}),
    FewShotMethod("url", {"shared": True}, URL),
    FewShotMethod("copa", settings={"steps": 4, "lr": 0.02}),
    FewShotMethod("copa + adapters", {"residual_adapters": True}, {"steps": 2, "lr": 0.02}, episodes=3),
]


def backbone():
    return tiny(ResNetModel, RESNET)


DOMAINS = {"a": tiny_images(90, SIX), "b": tiny_images(60, SIX, seed=1)}
run = partial(few_shot, METHODS, DOMAINS, backbone, tiny_processor(), episodes=5, seen=["a"], seed=3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few_shot")
    return run(folder), folder


def features_by_hand(images):
    pixels = tiny_processor().image_processor(images=list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return backbone()(pixel_values=pixels).pooler_output.flatten(1).double().numpy()


def cosines(x, p):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (p / np.linalg.norm(p, axis=1, keepdims=True)).T


def test_nearest_prototype_by_hand(results):
    rows = [row for row in results[0].rows if row["method"] == "nearest"]
    for name, dataset in DOMAINS.items():
        x = features_by_hand(dataset["image"])
        for i in range(5):
            episode = EpisodeSampler(dataset, seed=3)[i]
            support, query = x[episode.support], x[episode.query]
            p = np.stack([support[episode.support_labels == c].mean(0) for c in range(len(episode.classes))])
            right = cosines(query, p).argmax(1) == episode.query_labels
            (row,) = (row for row in rows if row["domain"] == name and row["episode"] == i)
            assert row["accuracy"] == pytest.approx(100 * right.mean())
            unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (support, p)]
            gap = np.linalg.norm(unit[0].mean(0) - unit[1].mean(0))
            assert row["gap_before"] == pytest.approx(gap, abs=1e-5)
            assert row["gap_after"] == pytest.approx(gap, abs=1e-5)
            assert row["nc1_before"] == pytest.approx(row["nc1_after"], rel=1e-4)
            assert (row["ways"], row["support"]) == (len(episode.classes), len(episode.support))
            e = cosines(query, p)  # the contrast at no shift, N x N
            logits = math.exp(2) * e[:, episode.query_labels]
            own = np.diag(logits)
            loss = (np.log(np.exp(logits).sum(1)) + np.log(np.exp(logits).sum(0)) - 2 * own).mean() / 2
            assert row["sweep_losses"][SHIFTS.index(0.0)] == pytest.approx(loss, rel=1e-5)


def test_training_changes_what_it_should(results):
    found = results[0]
    for method in ("url", "copa", "copa + adapters"):
        for domain in DOMAINS:
            count = 3 if "adapters" in method else 5
            before = found.values(domain, method, "gap_before")
            assert len(before) == count
            np.testing.assert_allclose(before, found.values(domain, "nearest", "gap_before")[:count], atol=1e-5)
            assert np.abs(found.values(domain, method, "gap_after") - before).min() > 1e-5
            nc1 = found.values(domain, method, "nc1_before")
            np.testing.assert_allclose(nc1, found.values(domain, "nearest", "nc1_before")[:count], rtol=1e-3)
            assert (found.values(domain, method, "nc1_after") != nc1).all()
            assert (found.values(domain, method, "seconds") > 0).all()


def test_a_run_that_was_stopped_goes_on(results, tmp_path):
    first, folder = results
    files = sorted(folder.rglob("episodes-*.json"))
    assert len(files) == 2 * len(METHODS)
    files[0].unlink()
    times = {path: path.stat().st_mtime_ns for path in files[1:]}
    again = run(folder)
    assert times == {path: path.stat().st_mtime_ns for path in files[1:]}
    for old, new in zip(first.rows, again.rows, strict=True):
        assert {k: v for k, v in old.items() if k != "seconds"} == {k: v for k, v in new.items() if k != "seconds"}
    with pytest.raises(ValueError, match="was made by another recipe, model or data set or with other arguments"):
        few_shot(METHODS, DOMAINS, backbone, tiny_processor(), folder, episodes=5, seen=["a"], seed=4)
    files[1].write_text(files[1].read_text()[:40])
    with pytest.raises(ValueError, match="is damaged; remove it"):
        run(folder)


def test_a_larger_number_begins_with_the_same_episodes(results, tmp_path):
    more = few_shot(METHODS[:1], DOMAINS, backbone, tiny_processor(), tmp_path, episodes=7, seed=3)
    for domain in DOMAINS:
        old = results[0].values(domain, "nearest")
        np.testing.assert_array_equal(more.values(domain, "nearest")[:5], old)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="Methods must have different names"):
        few_shot([METHODS[0], METHODS[0]], DOMAINS, backbone, tiny_processor(), tmp_path)
    with pytest.raises(ValueError, match="seen names 'c', which is no domain"):
        few_shot(METHODS, DOMAINS, backbone, tiny_processor(), tmp_path, seen=["c"])
    with pytest.raises(ValueError, match="Episodes of 5 ways need 5 classes"):
        few_shot(METHODS, {"small": tiny_images(9, SIX)}, backbone, tiny_processor(), tmp_path, shots=5)
    assert not list(tmp_path.iterdir())


def made_up(seed=0):
    rng = np.random.default_rng(seed)
    counts = {"one": 20, "two": 20, "three": 8}
    rows = [
        {"domain": domain, "method": method, "episode": i, "accuracy": rng.uniform(0, 100), "gap_before": 0.1,
         "gap_after": 0.2, "nc1_before": 2.0, "nc1_after": 1.0, "seconds": 0.5}
        for domain in "xyz"
        for method, count in counts.items()
        for i in range(count)
    ]  # fmt: skip
    rng.shuffle(rows)
    return EpisodeResults(rows, list("xyz"), list(counts), ["y"])


def plain(results, domain, method):
    rows = {
        row["episode"]: row["accuracy"] for row in results.rows if (row["domain"], row["method"]) == (domain, method)
    }
    return np.array([rows[i] for i in range(len(rows))])


def test_means_and_intervals():
    results = made_up()
    x = plain(results, "x", "one")
    mean, half = results.mean("x", "one")
    assert mean == pytest.approx(x.mean())
    assert half == pytest.approx(1.96 * x.std(ddof=1) / math.sqrt(20))
    z = plain(results, "z", "one")
    mean, half = results.mean(["x", "z"], "one")
    assert mean == pytest.approx((x.mean() + z.mean()) / 2)
    assert half == pytest.approx(1.96 * math.sqrt(x.var(ddof=1) / 20 + z.var(ddof=1) / 20) / 2)
    assert results.groups == {"seen": ["y"], "unseen": ["x", "z"], "all": ["x", "y", "z"]}
    with pytest.raises(ValueError, match="No episode of 'w' was run with 'one'"):
        results.mean("w", "one")


def test_differences_are_paired_over_common_episodes():
    results = made_up()
    gap = plain(results, "x", "three") - plain(results, "x", "one")[:8]
    mean, half = results.difference("x", "three", "one")
    assert mean == pytest.approx(gap.mean())
    assert half == pytest.approx(1.96 * gap.std(ddof=1) / math.sqrt(8))


def test_ranks():
    results = made_up()
    places = {method: [] for method in results.methods}
    for domain in results.domains:
        means = {method: plain(results, domain, method)[:8].mean() for method in results.methods}
        for place, method in enumerate(sorted(means, key=means.get, reverse=True), start=1):
            places[method].append(place)
    assert results.ranks() == {method: pytest.approx(np.mean(values)) for method, values in places.items()}
    for row in results.rows:
        row["accuracy"] = 50.0
    assert results.ranks() == {"one": 2, "two": 2, "three": 2}


def test_tables(tmp_path):
    results = made_up()
    table = results.accuracy_table().splitlines()
    assert (
        table[0] == "| accuracy | episodes | x | y (seen) | z | mean of seen | mean of unseen | mean of all | rank |"
    )
    assert len(table) == 2 + 3
    mean, half = results.mean("x", "one")
    assert f"| one | 20 | {mean:.1f} ± {half:.1f} |" in table[2]
    differences = results.difference_table([("three", "one")]).splitlines()
    mean, half = results.difference("x", "three", "one")
    assert f"| three - one | 8 | {mean:+.1f} ± {half:.1f} |" in differences[2]
    assert "| x | one | 0.100 | 0.200 | 2.00 | 1.00 | 0.500 |" in results.geometry_table()
    results.save(tmp_path)
    assert EpisodeResults.load(tmp_path / "results.json") == results
    json.loads((tmp_path / "results.json").read_text())
