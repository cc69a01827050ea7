"""Numbers, labels and names as numpy, torch and pandas hold them are taken as Python's own."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from peft_ncgeo import CoPAConfig, NPTConfig, PrototypeConfig, adapt
from peft_ncgeo.data.class_prompts import list_names
from peft_ncgeo.geometry import loss_against_gap, minority_margin, simplex_etf, slerp
from peft_ncgeo.geometry.alignment import rotate_towards_means, slerp_fraction
from peft_ncgeo.losses import LDAM, PrototypeSupCon, RotationStabilization
from peft_ncgeo.metrics.accuracy import accuracy, class_groups, harmonic_mean
from peft_ncgeo.validation import check_bool, check_float, check_int

from ..conftest import pixels, tiny_vit

HALF = np.array(0.5)
X, Y = torch.eye(3), torch.eye(3).roll(1, 0)
LABELS = [2, 0, 1, 1, 0, 2, 2, 2, 0]
IDS = [np.int64(3), torch.tensor(4)]


def adapted(labels=LABELS, **settings) -> list:
    """Classes, metrics and what a model card says of a few steps from a few images."""
    classifier = adapt(tiny_vit(), pixels(9, seed=4), labels, steps=2, **settings)
    return [classifier.classes, classifier.metrics, json.dumps(classifier.adaptation)]


SAME = {  # what is given, and Python's own in its place
    "seed of numpy": (lambda n: simplex_etf(3, 8, seed=n), np.int64(3), 3),
    "seed below 0": (lambda n: simplex_etf(3, 8, seed=n), np.int64(-3), -3),
    "sizes": (lambda n: simplex_etf(n, n), torch.tensor(3), 3),
    "class counts": (lambda n: minority_margin(n, 3), np.array([9, 3, 1]), [9, 3, 1]),
    "fraction of slerp": (lambda t: slerp(X, Y, t), HALF, 0.5),
    "fractions of slerp": (lambda t: slerp(X, Y, t), np.full(3, 0.5), 0.5),
    "fraction of rotation": (lambda t: rotate_towards_means(X, Y, t), HALF, 0.5),
    "fractions of rotation": (lambda t: rotate_towards_means(X, Y, fraction=t), np.full(3, 0.5), 0.5),
    "steps of a run": (lambda n: slerp_fraction(n, 10), torch.tensor(4), 4),
    "shifts": (lambda t: loss_against_gap(X, Y, torch.arange(3), t, 0.5)[0], np.array([0.0, 0.5]), [0.0, 0.5]),
    "words of pandas": (lambda words: accuracy(words, ["a", "b"]), pd.Series(["a", "c"]), ["a", "c"]),
    "words as objects": (lambda words: accuracy(["a", "b"], words), np.array(["a", "c"], dtype=object), ["a", "c"]),
    "an accuracy": (lambda x: harmonic_mean(x, 0.25), torch.tensor(0.5), 0.5),
    "thresholds": (lambda x: class_groups([1, 5, 9], (x, 6))["few"].tolist(), torch.tensor(2.0), 2.0),
    "keys": (list_names, {"cat": 0, "dog": 1}.keys(), ["cat", "dog"]),
    "an array of prototypes": (lambda p: PrototypeSupCon(p, 1, 1).prototypes, np.eye(3, dtype="float32"), X),
    "a table of prototypes": (lambda p: PrototypeSupCon(p, 1, 1).prototypes.float(), [[3, 0, 0], [0, 1, 0]], X[:2]),
    "copies": (lambda n: PrototypeSupCon(X, n, n).copies, HALF, 0.5),
    "a weight": (lambda w: RotationStabilization(weight=w).factor(), HALF, 0.5),
    "a weight in a row": (lambda w: RotationStabilization(weight=w).factor(), torch.tensor([0.5]), 0.5),
    "weights over time": (lambda w: RotationStabilization(weight=lambda _: w).factor(), HALF, 0.5),
    "weights of torch": (lambda w: RotationStabilization(weight=lambda _: w).factor(), torch.tensor([0.5]), 0.5),
    "a margin": (lambda m: LDAM(m).max_margin, torch.tensor(0.5), 0.5),
    "token ids": (lambda ids: NPTConfig(num_text_tokens=2, text_init=ids).text_init, IDS, [3, 4]),
    "a list of a tensor": (
        lambda ids: NPTConfig(num_text_tokens=2, text_init=ids).text_init,
        [*torch.arange(2)],
        [0, 1],
    ),
    "a flag": (lambda b: CoPAConfig(shared=b).shared, np.bool_(True), True),
    "a flag of prompts": (lambda b: NPTConfig(num_text_tokens=2, pack_text=b).pack_text, np.bool_(False), False),
    "a temperature": (lambda t: PrototypeConfig(temperature=t).temperature, torch.tensor(0.5), 0.5),
    "a number of classes": (lambda n: PrototypeConfig(num_classes=n).num_classes, torch.tensor(5), 5),
    "a learning rate": (lambda lr: adapted(lr=lr), torch.tensor(0.5), 0.5),
    "labels of numpy": (lambda labels: adapted(labels), [np.int64(c) for c in LABELS], LABELS),
    "labels of pandas": (lambda labels: adapted(labels), pd.Series(LABELS), LABELS),
    "a partial optimiser": (lambda o: adapted(optimizer=o), partial(torch.optim.Adam), torch.optim.Adam),
}


@pytest.mark.parametrize(("call", "given", "own"), SAME.values(), ids=SAME)
def test_it_is_taken_as_pythons_own(call, given, own):
    value, expected = call(given), call(own)
    assert torch.equal(value, expected) if isinstance(expected, torch.Tensor) else value == expected


@pytest.mark.parametrize("number", [np.int64(3), np.array(3), np.array([3]), torch.tensor(3), torch.tensor([3])])
def test_one_number_of_any_library_becomes_pythons(number):
    assert [type(check_int("n", number)), type(check_float("x", number))] == [int, float]
    assert check_int("n", number) == check_float("x", number) == 3


@pytest.mark.parametrize("word", [True, np.bool_(True), torch.tensor(True), "3", None, 1j, torch.ones(2), [3]])
def test_what_is_no_number_stays_refused(word):
    for check in (check_int, check_float):
        with pytest.raises(TypeError, match="^n=.* must be a .*number"):
            check("n", word)
    assert check_bool("f", np.bool_(False)) is False


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400, np.float32("nan"), torch.tensor(-torch.inf)])
def test_no_number_is_endless(number):
    with pytest.raises(ValueError, match="^n=.* must be a finite number"):
        check_float("n", number)
