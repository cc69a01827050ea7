"""Few-shot episodes: small classification tasks from one labelled set, each with a support and a query set."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ..validation import check_int
from .checks import class_names, leave_out_unlabelled
from .sampling import label_array, rows_of_classes


@dataclass(frozen=True, eq=False)
class Episode:
    """One classification task of W classes (ways). `support` and `query` are disjoint rows of the data set, by class.

    Attributes:
        classes: (W,) int64, the data set's labels: class w of the episode is `classes[w]`.
        support: (N,) int64 rows for learning.
        support_labels: (N,) int64 in 0..W-1.
        query: (Q,) int64 rows for testing, the same number for every class.
        query_labels: (Q,) int64 in 0..W-1.
    """

    classes: np.ndarray
    support: np.ndarray
    support_labels: np.ndarray
    query: np.ndarray
    query_labels: np.ndarray


class EpisodeSampler:
    """Sampler of endless episodes of a data set, by the rules of Meta-Dataset (arXiv 1903.03096, appendix).

    `EpisodeSampler(dataset)` gives any-way any-shot episodes, `shots=5` any-way 5-shot ones, and `ways=5, shots=1`
    5-way 1-shot ones:

    - Ways: uniform in `min_ways..min(max_ways, usable classes)`. A class is usable if it has at least `shots + 1`
      images (two if `shots` is None). There are at most `max_support // shots` ways, so that the support set fits.
    - Classes: drawn without replacement.
    - Queries per class: `q = min(queries, floor(n/2))` for the smallest drawn class's size n. With `shots`:
      `q = min(queries, n - shots)`.
    - Shots, unless given: with `beta ~ U(0, 1]` the support size is
      `S = min(max_support, sum_c ceil(beta * min(max_shots, n_c - q)))`. With `alpha_c ~ U[log 0.5, log 2)` a class's
      share is `R_c = exp(alpha_c) n_c / sum_k exp(alpha_k) n_k`, and it has
      `min(floor(R_c (S - ways)) + 1, n_c - q, max_shots)` shots. (Meta-Dataset's own code allows more
      than `max_shots`.)

    An episode depends only on the settings, the seed, its index and the labels in their order. So the order of the
    rows matters, unlike in [`few_shot`]: the same rows in another order give other episodes. For equal `q` and usable
    classes, an episode with more `shots` includes the images of one with fewer, and has the same queries. Only the
    label column is read, at construction; the data set is not kept.

    Args:
        dataset: a `datasets.Dataset` with a `ClassLabel` column. Classes without samples are never drawn.
        ways: number of classes, 2 or more. Default: drawn for each episode.
        shots: number of support images of every class. Default: drawn for each class.
        queries: largest number of query images per class.
        min_ways, max_ways: range of the drawn ways; ignored if `ways` is given.
        max_support: largest size of the support set.
        max_shots: largest number of support images of a class.
        seed: seed of all draws, 0 or more.

    Raises:
        TypeError, ValueError: the set or its label column is wrong, a label is outside the class names, an argument is
            out of range, the support set cannot fit, or too few classes have enough images.

    Example:
        >>> from peft_ncgeo.data import EpisodeSampler, load_few_shot_domains
        >>> sampler = EpisodeSampler(load_few_shot_domains()["digits"].images, ways=5, shots=1, seed=3)
        >>> episode = sampler[0]  # and sampler[1], ...; or `for episode in sampler`, which never ends
        >>> episode.classes.shape, episode.support.shape, episode.query.shape
        ((5,), (5,), (50,))
    """

    def __init__(
        self,
        dataset: Dataset,
        ways: int | None = None,
        shots: int | None = None,
        queries: int = 10,
        min_ways: int = 5,
        max_ways: int = 50,
        max_support: int = 500,
        max_shots: int = 100,
        seed: int = 0,
        label_column: str = "label",
    ) -> None:
        ways = None if ways is None else check_int("ways", ways, least=2)
        shots = None if shots is None else check_int("shots", shots, least=1)
        queries, seed = check_int("queries", queries, least=1), check_int("seed", seed, least=0)
        min_ways, max_ways = check_int("min_ways", min_ways, least=2), check_int("max_ways", max_ways, least=2)
        max_support = check_int("max_support", max_support, least=2)
        max_shots = check_int("max_shots", max_shots, least=1)
        if shots is not None and shots > max_shots:
            raise ValueError(f"shots={shots} is above max_shots={max_shots}; lower shots or raise max_shots.")
        if ways is None and min_ways > max_ways:
            raise ValueError(f"min_ways={min_ways} is above max_ways={max_ways}; lower min_ways or raise max_ways.")
        self._shots, self._queries, self._seed = shots, queries, seed
        self._max_support, self._max_shots = max_support, max_shots
        self._rows = _rows_of_classes(dataset, label_column)

        least_shots, ways_name = shots or 1, "min_ways" if ways is None else "ways"
        self._min_ways = min_ways if ways is None else ways
        if self._min_ways * least_shots > max_support:
            raise ValueError(
                f"{self._min_ways} ways of {least_shots} shots do not fit max_support={max_support}; "
                f"lower shots or {ways_name}, or raise max_support."
            )
        self._able = np.array([c for c, rows in enumerate(self._rows) if len(rows) > least_shots], dtype=np.int64)
        if len(self._able) < self._min_ways:
            raise ValueError(
                f"Episodes of {self._min_ways} ways need {self._min_ways} classes with at least {least_shots + 1} "
                f"images each; {label_column!r} has only {len(self._able)} such classes; "
                f"lower {'shots or ' if least_shots > 1 else ''}{ways_name}."
            )
        self._max_ways = min(max_ways, len(self._able), max_support // least_shots) if ways is None else ways

    def __getitem__(self, index: int) -> Episode:
        """Return episode number `index`, 0 or more; it does not depend on earlier calls."""
        rng = np.random.default_rng([self._seed, check_int("index", index, least=0)])
        ways = rng.integers(self._min_ways, self._max_ways + 1)
        classes = rng.choice(self._able, ways, replace=False)
        sizes = np.array([len(self._rows[c]) for c in classes])
        if self._shots is None:
            queries = min(self._queries, int(sizes.min()) // 2)
            shots = self._draw_shots(sizes, queries, rng)
        else:
            queries = min(self._queries, int(sizes.min()) - self._shots)
            shots = np.full(ways, self._shots)
        # queries first, so that they do not depend on the shots
        drawn = [rng.permutation(self._rows[c])[: queries + n] for c, n in zip(classes, shots, strict=True)]
        numbers = np.arange(ways, dtype=np.int64)
        return Episode(
            classes=classes,
            support=np.concatenate([rows[queries:] for rows in drawn]),
            support_labels=np.repeat(numbers, shots),
            query=np.concatenate([rows[:queries] for rows in drawn]),
            query_labels=np.repeat(numbers, queries),
        )

    def __iter__(self) -> Iterator[Episode]:
        """Yield episodes 0, 1, 2, ... without end."""
        return (self[index] for index in itertools.count())

    def _draw_shots(self, sizes: np.ndarray, queries: int, rng: np.random.Generator) -> np.ndarray:
        """Draw shots (W,) for classes of `sizes` (W,), by the rule in the class's docstring."""
        left = sizes - queries
        beta = 1 - rng.random()  # in (0, 1], so that every class has a shot
        support = min(self._max_support, int(np.ceil(beta * np.minimum(self._max_shots, left)).sum()))
        weights = np.exp(rng.uniform(math.log(0.5), math.log(2), len(sizes))) * sizes
        shots = np.floor(weights / weights.sum() * (support - len(sizes))).astype(np.int64) + 1
        return np.minimum(shots, np.minimum(left, self._max_shots))


def _rows_of_classes(dataset: Dataset, label_column: str) -> list[np.ndarray]:
    """Return the rows of each class in ascending order; raise an error for labels outside the class names."""
    names, labels = class_names(dataset, label_column, "EpisodeSampler"), label_array(dataset, label_column)
    outside = np.flatnonzero(labels < 0)
    if len(outside):
        raise ValueError(
            f"Sample {outside[0]} has no label among the {len(names)} class names ({len(outside)} such samples); "
            f"{leave_out_unlabelled(label_column)}."
        )
    return rows_of_classes(labels, len(names))
