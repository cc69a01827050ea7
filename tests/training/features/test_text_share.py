"""Class texts over processes: fair shares. `test_processes.py` holds that trainings agree."""

from __future__ import annotations

import random

import pytest

from peft_ncgeo.training.features.text_share import deal


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("classes", [1, 2, 5, 100, 1000])
def test_every_text_has_one_process(classes, processes):
    lengths = random.Random(classes).choices(range(6, 14), k=classes)
    shares = deal(lengths, processes)
    assert sorted(k for share in shares for k in share) == list(range(classes))
    assert len(shares) == processes
    assert all(share == sorted(share) for share in shares)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_work_of_a_process_falls_as_their_number(processes):
    lengths = random.Random(1).choices(range(6, 14), k=1000)
    longest = max(sum(lengths[k] for k in share) for share in deal(lengths, processes))
    assert longest <= 1.05 * sum(lengths) / processes
    assert longest - min(sum(lengths[k] for k in share) for share in deal(lengths, processes)) <= max(lengths)
