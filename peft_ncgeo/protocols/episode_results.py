"""Results over episodes: means with 95 % intervals, averages over domains, ranks and paired differences."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .results import markdown_table


@dataclass
class EpisodeResults:
    """One row for each episode: `domain`, `method`, `episode` and its metrics.

    Attributes:
        rows: a dict an episode. Methods share episodes: those of one domain and number are the same.
        domains, methods: in the order of tables.
        seen: the domains that the backbone was pre-trained on.
        note: what was run on what.
    """

    rows: list[dict[str, Any]]
    domains: list[str]
    methods: list[str]
    seen: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def groups(self) -> dict[str, list[str]]:
        """The domains in `seen`, the others, and all of them; groups without domains are left out."""
        unseen = [domain for domain in self.domains if domain not in self.seen]
        groups = {"seen": self.seen, "unseen": unseen, "all": self.domains}
        return {name: members for name, members in groups.items() if members}

    def values(self, domain: str, method: str, column: str = "accuracy") -> np.ndarray:
        """A metric over the episodes, in their order.

        Raises:
            ValueError: the method was not run on that domain.
        """
        chosen = [row for row in self.rows if row["domain"] == domain and row["method"] == method]
        if not chosen:
            raise ValueError(f"No episode of {domain!r} was run with {method!r}.")
        return np.array([row[column] for row in sorted(chosen, key=lambda row: row["episode"])], dtype=np.float64)

    def mean(self, domains: str | Sequence[str], method: str, column: str = "accuracy") -> tuple[float, float]:
        """Mean over the episodes of a domain, or the mean of several domains' means; and half of its 95 % interval."""
        names = [domains] if isinstance(domains, str) else domains
        return _pooled([self.values(name, method, column) for name in names])

    def difference(
        self, domains: str | Sequence[str], method: str, other: str, column: str = "accuracy"
    ) -> tuple[float, float]:
        """`method` minus `other`, paired over the episodes that both were run on; and half of its 95 % interval."""
        names = [domains] if isinstance(domains, str) else domains
        differences = []
        for name in names:
            a, b = self.values(name, method, column), self.values(name, other, column)
            common = min(len(a), len(b))
            differences.append(a[:common] - b[:common])
        return _pooled(differences)

    def ranks(self, column: str = "accuracy") -> dict[str, float]:
        """Each method's rank (1 is best), averaged over domains, on the episodes that all were run on."""
        places = {method: [] for method in self.methods}  # type: dict[str, list[float]]
        for domain in self.domains:
            every = {method: self.values(domain, method, column) for method in self.methods}
            common = min(map(len, every.values()))
            means = {method: float(values[:common].mean()) for method, values in every.items()}
            for method, mean in means.items():
                better = sum(other > mean for other in means.values())
                equal = sum(other == mean for other in means.values())
                places[method].append(better + (equal + 1) / 2)
        return {method: float(np.mean(values)) for method, values in places.items()}

    def accuracy_table(self) -> str:
        """A row for each method: accuracy on every domain and group, and the average rank."""
        marked = [f"{domain} (seen)" if domain in self.seen else domain for domain in self.domains]
        head = ["accuracy", "episodes", *marked, *(f"mean of {name}" for name in self.groups), "rank"]
        ranks = self.ranks()
        lines = [
            [
                method,
                str(len(self.values(self.domains[0], method))),
                *(_shown(self.mean(domain, method), 1) for domain in self.domains),
                *(_shown(self.mean(members, method), 1) for members in self.groups.values()),
                f"{ranks[method]:.1f}",
            ]
            for method in self.methods
        ]
        return markdown_table(head, lines)

    def difference_table(self, pairs: Sequence[tuple[str, str]]) -> str:
        """A row for each pair of methods: their paired difference in accuracy on every domain and group."""
        head = ["difference", "episodes", *self.domains, *(f"mean of {name}" for name in self.groups)]
        places = [*self.domains, *self.groups.values()]
        lines = [
            [
                f"{method} - {other}",
                str(min(len(self.values(self.domains[0], name)) for name in (method, other))),
                *(_shown(self.difference(place, method, other), 1, "+") for place in places),
            ]
            for method, other in pairs
        ]
        return markdown_table(head, lines)

    def geometry_table(self) -> str:
        """A row for each domain and method: gap before and after, NC1 before and after, CPU seconds an episode."""
        columns = {"gap_before": 3, "gap_after": 3, "nc1_before": 2, "nc1_after": 2, "seconds": 3}
        titles = ["gap before", "gap after", "NC1 before", "NC1 after", "seconds an episode"]
        lines = [
            [domain, method, *(f"{self.mean(domain, method, c)[0]:.{d}f}" for c, d in columns.items())]
            for domain in self.domains
            for method in self.methods
        ]
        return markdown_table(["domain", "method", *titles], lines)

    def save(self, folder: str | Path) -> None:
        """Write `results.json`: everything that this object holds."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(vars(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> EpisodeResults:
        """What [`save`] wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def _pooled(samples: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean of the samples' means, and 1.96 of its standard errors; nan where a sample has one value only."""
    squared = [values.var(ddof=1) / len(values) if len(values) > 1 else math.nan for values in samples]
    return float(np.mean([values.mean() for values in samples])), 1.96 * math.sqrt(sum(squared)) / len(samples)


def _shown(value: tuple[float, float], digits: int, sign: str = "") -> str:
    return f"{value[0]:{sign}.{digits}f} ± {value[1]:.{digits}f}"
