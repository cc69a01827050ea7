"""Results of many runs: tidy rows, and tables of means and standard deviations."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

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
            raise ValueError(f"No run of {method!r} in {setting!r} has {column!r}.")
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

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

    def pivot(self, column: str) -> str:
        """Return a table of one metric: a row for each method, a column for each setting."""
        settings = self._seen("setting")
        lines = [
            [escape(method), *(self._cell(setting, method, column) for setting in settings)]
            for method in self._seen("method")
        ]
        return table([self.titles.get(column, column), *settings], lines)

    def save(self, folder: str | Path) -> None:
        """Write `results.json` (rows and note), `results.csv` (rows) and `results.md` (the table), on one process."""
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
