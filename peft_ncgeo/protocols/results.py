"""Results of many runs: tidy rows, and tables of means and standard deviations."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from ..files import write_whole
from ..markdown import escape, table
from .cached_runs import is_main_process

KEYS = ("setting", "method", "seed")


@dataclass
class Results:
    """Results with one row for each run: `setting`, `method`, `seed` and its metrics (accuracies in percent).

    Attributes:
        rows: one dict for each run. A metric that a run does not have is absent or None.
        columns: metrics that tables show, in order.
        note: models, data and settings of the runs, for the line under a table.
        titles: column -> its heading. Default: its name.
        digits: column -> decimals shown. Default: 1.
    """

    rows: list[dict[str, Any]]
    columns: list[str]
    note: str = ""
    titles: dict[str, str] = field(default_factory=dict)
    digits: dict[str, int] = field(default_factory=dict)

    @property
    def settings(self) -> list[str]:
        """Settings in the order of the rows."""
        return self._seen("setting")

    def values(self, setting: str, method: str, column: str) -> list[float]:
        """Return a metric's values over the seeds."""
        chosen = (row for row in self.rows if row["setting"] == setting and row["method"] == method)
        return [row[column] for row in chosen if row.get(column) is not None]

    def summary(self, setting: str, method: str, column: str) -> tuple[float, float]:
        """Return mean and standard deviation of a metric over the seeds; the latter is 0 for one seed.

        Raises:
            ValueError: no run of that setting and method has the metric.
        """
        values = self.values(setting, method, column)
        if not values:
            raise ValueError(
                f"No run of {method!r} in {setting!r} has {column!r}; results hold {self._seen('method')} in "
                f"{self.settings}."
            )
        return statistics.fmean(values), _deviation(values) if len(values) > 1 else 0.0

    def markdown(self, columns: Sequence[str] | None = None) -> str:
        """Return a table with a row for each setting and method: mean ± standard deviation over the seeds."""
        columns = self.columns if columns is None else list(columns)
        head = ["setting", "method", *(self.titles.get(c, c) for c in columns)]
        lines = [
            [escape(setting), escape(method), *(self._cell(setting, method, column) for column in columns)]
            for setting in self._seen("setting")
            for method in self._seen("method")
            if any(row["setting"] == setting and row["method"] == method for row in self.rows)
        ]
        return table(head, lines)

    def pivot(self, column: str, settings: Sequence[str] | None = None) -> str:
        """Return a table of one metric: a row for each method, a column for each setting or each of `settings`."""
        settings = self._seen("setting") if settings is None else list(settings)
        lines = [
            [escape(method), *(self._cell(setting, method, column) for setting in settings)]
            for method in self._seen("method")
        ]
        return table([self.titles.get(column, column), *settings], lines)

    def difference(self, setting: str | None, method: str, reference: str, column: str) -> tuple[float, float | None]:
        """Return the mean of a metric's paired differences `method - reference` and half their 95 % t interval.

        With n seeds that both methods have, and `d_s` the difference at seed s:
        `mean(d) ± t_{0.975, n-1} std(d) / sqrt(n)`. The half interval is None for one seed.

        Args:
            setting: one setting. None: take, for each seed, the mean difference over all settings in which both
                methods have the metric; seeds that lack one of these settings are left out.

        Raises:
            ValueError: no seed has the metric for both methods, or a method has two runs of one setting and seed.
        """
        paired = self._differences(setting, method, reference, column)
        if not paired:
            raise ValueError(
                f"No seed has {column!r} of both {method!r} and {reference!r} in "
                f"{'every common setting' if setting is None else repr(setting)}; run both from the same seeds."
            )
        return _interval(paired)

    def _differences(self, setting: str | None, method: str, reference: str, column: str) -> list[float]:
        """Return a metric's difference at each seed that both methods have, see [`Results.difference`]."""
        values: dict[str, dict[tuple[str, int], float]] = {method: {}, reference: {}}
        for row in self.rows:
            if row["method"] in values and setting in (None, row["setting"]) and row.get(column) is not None:
                of_method, run = values[row["method"]], (row["setting"], row["seed"])
                if run in of_method:
                    raise ValueError(f"{row['method']!r} has two runs of seed {run[1]} in {run[0]!r}; remove one.")
                of_method[run] = row[column]
        runs = [run for run in values[method] if run in values[reference]]
        settings, seeds = {s for s, _ in runs}, {seed for _, seed in runs}
        return [
            statistics.fmean(values[method][s, seed] - values[reference][s, seed] for s in settings)
            for seed in seeds
            if all((s, seed) in runs for s in settings)
        ]

    def paired_differences(self, column: str, reference: str, settings: Sequence[str] | None = None) -> str:
        """Return a table of `method - reference`: a row for each other method, a column for each setting and the mean.

        Each cell has the mean difference over the seeds and half its 95 % interval, see [`Results.difference`].

        Raises:
            ValueError: the reference has the metric in none of the settings, or a method has two runs of one setting
                and seed.
        """
        settings = self.settings if settings is None else list(settings)
        if not any(self.values(setting, reference, column) for setting in settings):
            raise ValueError(
                f"No run of the reference {reference!r} has {column!r} in any of {settings}; results hold "
                f"{self._seen('method')} in {self.settings}."
            )
        shown = Results([row for row in self.rows if row["setting"] in settings], self.columns)
        digits = self.digits.get(column, 1)

        def cell(setting: str | None, method: str) -> str:
            found = shown._differences(setting, method, reference, column)
            if not found:
                return ""
            mean, half = _interval(found)
            return f"{mean:+.{digits}f}" if half is None else f"{mean:+.{digits}f} ± {half:.{digits}f}"

        others = [method for method in shown._seen("method") if method != reference]
        lines = [[escape(method), *(cell(setting, method) for setting in (*settings, None))] for method in others]
        title = self.titles.get(column, column)
        return table([f"{title} - {title} of {reference}", *settings, "mean"], lines)

    def save(self, folder: str | Path) -> None:
        """Write `results.json` (note, columns, rows), `results.csv` (rows) and `results.md` (table and note).

        Only the first process writes.
        """
        if not is_main_process():
            return
        names = list(dict.fromkeys([*KEYS, *self.columns, *(key for row in self.rows for key in row)]))
        rows = StringIO(newline="")
        writer = csv.DictWriter(rows, names)
        writer.writeheader()
        writer.writerows(self.rows)
        content = {"note": self.note, "columns": self.columns, "rows": self.rows}
        files = {
            "results.json": json.dumps(content, indent=1) + "\n",
            "results.csv": rows.getvalue(),
            "results.md": f"{self.markdown()}\n\n{self.note}\n",
        }
        for name, text in files.items():  # all texts are made before the first is written
            write_whole(Path(folder) / name, text)

    def _cell(self, setting: str, method: str, column: str) -> str:
        values = self.values(setting, method, column)
        if not values:
            chosen = [row for row in self.rows if row["setting"] == setting and row["method"] == method]
            return "-" if any(column in row for row in chosen) else ""
        mean, spread = self.summary(setting, method, column)
        shown = f"{mean:.{self.digits.get(column, 1)}f}"
        return f"{shown} ± {spread:.{self.digits.get(column, 1)}f}" if len(values) > 1 else shown

    def _seen(self, key: str) -> list[str]:
        return list(dict.fromkeys(row[key] for row in self.rows))


def _deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of at least two values; NaN if one is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of values and half its 95 % t interval, None for one value."""
    mean, count = statistics.fmean(values), len(values)
    return mean, float(stdtrit(count - 1, 0.975) * _deviation(values) / count**0.5) if count > 1 else None
