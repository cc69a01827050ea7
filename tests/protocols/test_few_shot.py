"""The few-shot protocol: blocks of episodes, what is measured in each, and the statistics over them."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Image
from peft import get_peft_model
from transformers import ResNetConfig, ResNetModel

from peft_ncgeo import CoPAConfig, adapt
from peft_ncgeo.data import EpisodeSampler
from peft_ncgeo.few_shot.evaluate import SHIFTS
from peft_ncgeo.geometry import NeuralCollapse
from peft_ncgeo.protocols import EpisodeResults, FewShotMethod, few_shot

from ..conftest import tiny, tiny_images, tiny_processor

SIX = ["red cat", "blue dog", "green bird", "black fish", "white panda", "tree"]
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
URL = {"steps": 4, "lr": 0.3, "weight_decay": 0.0, "optimizer": torch.optim.Adadelta}
COPA = {"steps": 4, "lr": 0.05}
MAPS = {"steps": 3, "lr": 0.05, "adapter_lr": 1.0}
METHODS = [
    FewShotMethod("nearest", settings={"steps": 0}),
    FewShotMethod("url", {"shared": True}, URL),
    FewShotMethod("copa", settings=COPA),
    FewShotMethod("copa + adapters", {"residual_adapters": True}, MAPS, episodes=3),
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


def test_trained_rows_are_those_of_adapt(results):
    """Episode by episode, from images, one at a time."""
    found = results[0]
    for method, build, settings, count in (
        ("url", lambda: get_peft_model(backbone(), CoPAConfig(shared=True)), URL, 5),
        ("copa", backbone, COPA, 5),
        ("copa + adapters", lambda: get_peft_model(backbone(), CoPAConfig(residual_adapters=True)), MAPS, 3),
    ):
        for domain in DOMAINS:
            dataset = DOMAINS[domain]
            by_number = {
                row["episode"]: row for row in found.rows if (row["domain"], row["method"]) == (domain, method)
            }
            assert sorted(by_number) == list(range(count))
            for i, row in by_number.items():
                episode = EpisodeSampler(dataset, seed=3)[i]
                support, query = (
                    [dataset[j]["image"] for j in part.tolist()] for part in (episode.support, episode.query)
                )
                alone = adapt(build(), support, episode.support_labels, processor=tiny_processor(), **settings)
                right = np.array(alone.predict(query)) == episode.query_labels
                assert row["accuracy"] == pytest.approx(100 * right.mean())
                assert row["gap_before"] == pytest.approx(alone.metrics["gap_before"], abs=1e-3)  # maps start at 1e-4
                assert row["gap_after"] == pytest.approx(alone.metrics["gap_after"], abs=1e-4)
                e = alone.heads.embed(alone.features(query), alone.prototypes)[0]
                collapse = NeuralCollapse(len(episode.classes), e.shape[1])
                collapse.update(e, torch.as_tensor(episode.query_labels))
                assert row["nc1_after"] == pytest.approx(float(collapse.compute()["nc1"]), rel=1e-3)
                assert row["seconds"] > 0


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
    with pytest.raises(ValueError, match="was made by another recipe"):
        few_shot(METHODS, DOMAINS, backbone, tiny_processor(), folder, episodes=5, seen=["a"], seed=4)
    cell = json.loads(files[1].read_text())
    for rows in (None, cell["metrics"]["rows"][:1], ["x"] * len(cell["metrics"]["rows"])):
        files[1].write_text(json.dumps({**cell, "metrics": {"rows": rows}}))
        with pytest.raises(ValueError, match=f"{files[1].name}"):
            run(folder)
    files[1].write_text(files[1].read_text()[:40])
    with pytest.raises(ValueError, match="is damaged; remove it"):
        run(folder)
    for text in ("[]", "{}", '{"rows": 1', "[" * 10**5):
        (folder / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results\.json holds no results of episodes"):
            EpisodeResults.load(folder / "results.json")


def test_a_larger_number_begins_with_the_same_episodes(results, tmp_path):
    folder = shutil.copytree(results[1], tmp_path / "copy")  # in the same folder too
    more = few_shot(METHODS[:1], DOMAINS, backbone, tiny_processor(), folder, episodes=7, seed=3)
    for domain in DOMAINS:
        old, new = (found.values(domain, "nearest") for found in (results[0], more))
        assert len(new) == 7
        assert {i: new[i] for i in old} == old


def test_numbers_of_a_domain_are_as_bright_as_its_bytes(tmp_path):
    grey = np.stack([np.asarray(image.convert("L")) for image in tiny_images(60, SIX)["image"]])
    grey[7] //= 4  # alone it would not tell what is white
    found = []
    for kind in (np.uint8, np.uint16):
        cells = [Image().encode_example(image.astype(kind)) for image in grey]
        domain = tiny_images(60, SIX).remove_columns("image").add_column("image", cells, feature=Image())
        rows = few_shot(METHODS[:1], {"a": domain}, backbone, tiny_processor(), tmp_path / kind.__name__, 3).rows
        found.append([{key: value for key, value in row.items() if key != "seconds"} for row in rows])
    assert found[0] == found[1]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="Methods must have different names"):
        few_shot([METHODS[0], METHODS[0]], DOMAINS, backbone, tiny_processor(), tmp_path)
    with pytest.raises(ValueError, match="2 cells would share .*a_b"):
        few_shot([FewShotMethod("a b"), FewShotMethod("a_b")], DOMAINS, backbone, tiny_processor(), tmp_path, 1)
    for strange in ("..", "../x", ".", "/x"):
        with pytest.raises(ValueError, match="cannot be a file's"):
            few_shot([FewShotMethod(strange)], DOMAINS, backbone, tiny_processor(), tmp_path / "cells", 1)
        with pytest.raises(ValueError, match="cannot be a file's"):
            few_shot(METHODS, {strange: DOMAINS["a"]}, backbone, tiny_processor(), tmp_path / "cells", 1)
    with pytest.raises(ValueError, match="seen names 'c', which is not a domain"):
        few_shot(METHODS, DOMAINS, backbone, tiny_processor(), tmp_path, seen=["c"])
    with pytest.raises(ValueError, match="Episodes of 5 ways need 5 classes"):
        few_shot(METHODS, {"small": tiny_images(9, SIX)}, backbone, tiny_processor(), tmp_path, shots=5)
    with pytest.raises(ValueError, match="got 0 domains, episodes=5"):
        few_shot(METHODS, {}, backbone, tiny_processor(), tmp_path, episodes=5)
    with pytest.raises(ValueError, match="got 2 domains, episodes=0"):
        few_shot(METHODS, DOMAINS, backbone, tiny_processor(), tmp_path, episodes=0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="copa.*no.*'step'"):
        FewShotMethod("copa", settings={"step": 3})
    with pytest.raises(ValueError, match="copa.*no.*'adapter_lr'"):
        FewShotMethod("copa", settings={"adapter_lr": 3})
    with pytest.raises(ValueError, match="copa: episodes=0 must be at least 1"):
        FewShotMethod("copa", episodes=0)


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
    assert half == pytest.approx(1.96 * ((x + z) / 2).std(ddof=1) / math.sqrt(20))  # right if x and z correlate too
    assert results.groups == {"seen": ["y"], "unseen": ["x", "z"], "all": ["x", "y", "z"]}
    with pytest.raises(ValueError, match="No.*'w'.*'one'"):
        results.mean("w", "one")


def test_differences_are_paired_over_common_episodes():
    results = made_up()
    for row in results.rows:
        if row["method"] == "three":
            row["episode"] += 12  # of the others' twenty, the last eight
    last = {
        row["episode"]: row["accuracy"] for row in results.rows if (row["domain"], row["method"]) == ("x", "three")
    }
    gap = np.array([last[i] for i in range(12, 20)]) - plain(results, "x", "one")[12:]
    mean, half = results.difference("x", "three", "one")
    assert mean == pytest.approx(gap.mean())
    assert half == pytest.approx(1.96 * gap.std(ddof=1) / math.sqrt(8))
    common = results.on_common_episodes()
    assert {row["episode"] for row in common.rows} == set(range(12, 20))
    assert len(common.rows) == 3 * 3 * 8
    assert common.with_methods(["two"]).methods == ["two"]
    assert len(common.with_methods(["two"]).rows) == 3 * 8


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
    pairs = [("two", "one"), ("three", "one"), ("four", "one")]
    most, common = results.with_methods(["one", "two"]), results.on_common_episodes()
    assert results.tables(pairs, ["three"]) == [
        most.accuracy_table(),
        most.difference_table(pairs[:1]),
        common.accuracy_table(),
        common.difference_table(pairs[:2]),
    ]
    assert most.tables([]) == [most.accuracy_table()]
    assert most.tables([], ["one", "two"]) == [most.accuracy_table()]
    results.save(tmp_path)
    assert EpisodeResults.load(tmp_path / "results.json") == results
    json.loads((tmp_path / "results.json").read_text())
