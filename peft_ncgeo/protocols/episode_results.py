"""Results over episodes: means with 95 % intervals, averages over domains, ranks and paired differences."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from ..files import read_json, write_whole
from ..markdown import escape, table
from ..validation import one_line
from .cached_runs import LARGEST


@dataclass
class EpisodeResults:
    """Results with one row for each episode: `domain`, `method`, `episode` and its metrics.

    Attributes:
        rows: one dict for each episode. Rows with equal domain and number are of the same episode, whatever the
            method.
        domains, methods: their names, in the order of the tables.
        seen: domains that the backbone was pre-trained on.
        note: methods, data and settings of the run.
    """

    rows: list[dict[str, Any]]
    domains: list[str]
    methods: list[str]
    seen: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def groups(self) -> dict[str, list[str]]:
        """Domains in `seen`, the others, and all of them; groups without domains are left out."""
        unseen = [domain for domain in self.domains if domain not in self.seen]
        groups = {"seen": self.seen, "unseen": unseen, "all": self.domains}
        return {name: members for name, members in groups.items() if members}

    def values(self, domain: str, method: str, column: str = "accuracy") -> dict[int, float]:
        """Return a metric of every episode, by the episode's number.

        Raises:
            ValueError: the method was not run on that domain.
        """
        chosen = [row for row in self.rows if row["domain"] == domain and row["method"] == method]
        if not chosen:
            raise ValueError(
                f"No episode of {domain!r} was run with {method!r}; run it, or name another domain or method."
            )
        return {row["episode"]: row[column] for row in sorted(chosen, key=lambda row: row["episode"])}

    def mean(self, domains: str | Sequence[str], method: str, column: str = "accuracy") -> tuple[float, float]:
        """Return the mean over the episodes, and half of its 95 % interval.

        With several domains, each episode number counts with the average of its values in all of them.

        Raises:
            ValueError: the method was not run on one of the domains.
        """
        return _interval([self.values(domain, method, column) for domain in _listed(domains)])

    def difference(
        self, domains: str | Sequence[str], method: str, other: str, column: str = "accuracy"
    ) -> tuple[float, float]:
        """Return `method` minus `other`, paired over the episodes of both, and half of the 95 % interval.

        Raises:
            ValueError: one of the two methods was not run on one of the domains.
        """
        differences = []
        for domain in _listed(domains):
            a, b = self.values(domain, method, column), self.values(domain, other, column)
            differences.append({i: a[i] - b[i] for i in a if i in b})
        return _interval(differences)

    def on_common_episodes(self) -> EpisodeResults:
        """Return the results of the episodes in each domain that all methods were run on."""
        common = {
            domain: set.intersection(*(set(self.values(domain, method, "episode")) for method in self.methods))
            for domain in self.domains
        }
        return replace(self, rows=[row for row in self.rows if row["episode"] in common[row["domain"]]])

    def with_methods(self, methods: Sequence[str]) -> EpisodeResults:
        """Return the results of these methods alone."""
        return replace(self, rows=[row for row in self.rows if row["method"] in methods], methods=list(methods))

    def ranks(self, column: str = "accuracy") -> dict[str, float]:
        """Return each method's rank (1 is best), averaged over domains, on episodes that all of them were run on."""
        common, places = self.on_common_episodes(), {method: [] for method in self.methods}  # type: ignore[var-annotated]
        for domain in self.domains:
            means = [common.mean(domain, method, column)[0] for method in self.methods]
            for method, place in zip(self.methods, rankdata([-mean for mean in means]), strict=True):
                places[method].append(place)
        return {method: float(np.mean(values)) for method, values in places.items()}

    def accuracy_table(self) -> str:
        """Return a table with a row for each method: accuracy on every domain and group, and the average rank."""
        marked = [f"{domain} (seen)" if domain in self.seen else domain for domain in self.domains]
        head = ["accuracy", "episodes", *marked, *(f"mean of {name}" for name in self.groups), "rank"]
        ranks = self.ranks()
        lines = [
            [
                escape(method),
                str(len(self.values(self.domains[0], method))),
                *(_shown(self.mean(domain, method), 1) for domain in self.domains),
                *(_shown(self.mean(members, method), 1) for members in self.groups.values()),
                f"{ranks[method]:.1f}",
            ]
            for method in self.methods
        ]
        return table(head, lines)

    def difference_table(self, pairs: Sequence[tuple[str, str]]) -> str:
        """Return a table with a row for each pair of methods: paired difference in accuracy by domain and group."""
        head = ["difference", "episodes", *self.domains, *(f"mean of {name}" for name in self.groups)]
        places = [*self.domains, *self.groups.values()]
        lines = [
            [
                escape(f"{method} - {other}"),
                str(min(len(self.values(self.domains[0], name)) for name in (method, other))),
                *(_shown(self.difference(place, method, other), 1, "+") for place in places),
            ]
            for method, other in pairs
        ]
        return table(head, lines)

    def geometry_table(self) -> str:
        """Return a table for each domain and method: gap and NC1 before and after, CPU seconds of an episode."""
        columns = {"gap_before": 3, "gap_after": 3, "nc1_before": 2, "nc1_after": 2, "seconds": 3}
        titles = ["gap before", "gap after", "NC1 before", "NC1 after", "CPU seconds of training"]
        lines = [
            [escape(domain), escape(method), *(f"{self.mean(domain, method, c)[0]:.{d}f}" for c, d in columns.items())]
            for domain in self.domains
            for method in self.methods
        ]
        return table(["domain", "method", *titles], lines)

    def tables(self, pairs: Sequence[tuple[str, str]], apart: Sequence[str] = ()) -> list[str]:
        """Return tables of accuracies and differences without the methods in `apart`, then tables of all methods.

        Tables of all methods follow only if `apart` has methods; they use the episodes that all methods were run on.
        Pairs with a missing method are left out.
        """
        others = [method for method in self.methods if method not in apart]
        parts = [self.with_methods(others)] if others else []
        if len(others) < len(self.methods):
            parts.append(self.on_common_episodes())
        tables = []
        for part in parts:
            tables.append(part.accuracy_table())
            named = [pair for pair in pairs if set(pair) <= set(part.methods)]
            if named:
                tables.append(part.difference_table(named))
        return tables

    def save(self, folder: str | Path) -> None:
        """Write `results.json`: everything that this object holds."""
        write_whole(Path(folder) / "results.json", json.dumps(vars(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EpisodeResults:
        """Read results that [`save`] wrote.

        Raises:
            ValueError: the file is missing, damaged or holds something else.
        """
        try:
            return cls(**read_json(path, LARGEST))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} holds no results of episodes ({one_line(error)}); pass a file that EpisodeResults.save wrote."
            ) from error


def _listed(domains: str | Sequence[str]) -> Sequence[str]:
    return [domains] if isinstance(domains, str) else domains


def _interval(samples: Sequence[dict[int, float]]) -> tuple[float, float]:
    """Average the samples' values of each episode number; return the mean of these averages and 1.96 standard errors.

    Only numbers in all samples count. Episodes with the same number have the same ways and shots in similar domains,
    so they are not independent.
    """
    common = set.intersection(*map(set, samples))
    averages = np.array([np.mean([values[i] for values in samples]) for i in sorted(common)])
    error = averages.std(ddof=1) / math.sqrt(len(averages)) if len(averages) > 1 else math.nan
    return float(averages.mean()), 1.96 * float(error)


def _shown(value: tuple[float, float], digits: int, sign: str = "") -> str:
    return f"{value[0]:{sign}.{digits}f} ± {value[1]:.{digits}f}"
