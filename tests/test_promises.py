"""The table of promises: each is held by tests that exist, and by none that failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from .promises import PROMISES, Case, find, table

ROOT = Path(__file__).parents[1]
PLACES = [place for promise in PROMISES for place in promise.held_by]
NOTES = {"difference": [0.0], "kills": [1.0], "half written": [0.0], "cases": [5.0]}
TESTS = [Case(place, "test_several_processes_equal_one[a-2]", "passed", NOTES) for place in PLACES]


def test_every_promise_is_in_the_table_and_held_by_tests():
    assert all((ROOT / place).exists() for place in PLACES)
    rows = table(TESTS, 97.25, 1.081)
    assert all(promise.says in rows for promise in PROMISES)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.held_by[0])
def test_a_promise_without_tests_or_with_one_that_failed_is_no_promise(promise):
    place = promise.held_by[0]
    with pytest.raises(ValueError, match="no tests"):
        find([], promise.held_by)
    with pytest.raises(ValueError, match="failed"):
        find([*TESTS, Case(place, "test_other", "failure")], promise.held_by)
