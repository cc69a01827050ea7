"""Built-in data with fewer test images, for tests that need runs and not their accuracies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from peft_ncgeo.data import demo, photographs

VIEWS = 3  # of each drawing
PHOTOGRAPHS = 20  # of each class
CACHED = (demo.load_test_views, demo.load_photographs, photographs.load_photograph_splits)


@pytest.fixture(scope="module")
def small_demo() -> Iterator[None]:
    """Few test images in the built-in data of this process."""
    with few_test_images():
        yield


@contextmanager
def few_test_images() -> Iterator[None]:
    """Give the built-in data few test images, and forget those that were drawn and read, before and after."""
    whole = demo.load_fashion_mnist

    def load_fashion_mnist(part: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = whole(part)
        if part == "train":
            return images, labels
        rows = first_of_each_class(labels, PHOTOGRAPHS)
        return images[rows], labels[rows]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TEST_VIEWS", VIEWS)
        patch.setattr(demo, "load_fashion_mnist", load_fashion_mnist)
        _forget()
        yield
    _forget()


def first_of_each_class(labels: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Return the rows of the first `count` images of each class, in their order."""
    labels = np.asarray(labels)
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]))


def _forget() -> None:
    for cached in CACHED:
        cached.cache_clear()
