"""`Report`: scores of a classifier on one labelled set, as tables, Markdown and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import confusion_matrix

from ..files import writing
from .calibration import Calibration
from .tables import SCORES, report_markdown

_MOST_PAIRS = 10
_LARGEST_MATRIX = 1000  # classes of a confusion matrix in a file


@dataclass(frozen=True, eq=False)
class Report:
    """Scores of a classifier on one labelled set, made by [`classification_report`] or `trainer.report()`.

    Attributes:
        class_names: names of the K classes.
        predicted, labels: (N,) class indices.
        per_class: one row per class: `precision`, `recall`, `f1`, `support`, and `training_images` if they are known.
        accuracy, balanced_accuracy, macro_f1: scores in 0..1.
        calibration: see [`Calibration`].
        groups: accuracy on classes with many, medium and few training images, or None without a long tail.
        thresholds: limits of the groups, see [`~peft_ncgeo.metrics.accuracy.class_groups`].
        baselines: one row per classifier: `accuracy`, `balanced_accuracy`, `macro_f1`; the last row is the tuned
            model. Empty if no baselines were computed.
        notes: sentences on how numbers were made, and on missing numbers.
    """

    class_names: list[str]
    predicted: np.ndarray
    labels: np.ndarray
    per_class: pd.DataFrame
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    calibration: Calibration
    groups: Mapping[str, float | None] | None = None
    thresholds: Any = None
    baselines: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(SCORES)))
    notes: tuple[str, ...] = ()

    @cached_property
    def confusion(self) -> pd.DataFrame:
        """Confusion matrix (K, K): numbers of images by true class (rows) and predicted class (columns)."""
        matrix = confusion_matrix(self.labels, self.predicted, labels=np.arange(len(self.class_names)))
        names = pd.Index(self.class_names)
        return pd.DataFrame(matrix, index=names.rename("true"), columns=names.rename("predicted"))

    def most_confused(self, count: int = _MOST_PAIRS) -> pd.DataFrame:
        """Return the `count` most frequent errors: `true` and `predicted` class, number of `images`, and `share`.

        `share` is the number divided by the number of all images of the true class.
        """
        wrong = self.labels != self.predicted
        pairs, images = np.unique(np.stack([self.labels, self.predicted])[:, wrong], axis=1, return_counts=True)
        first = np.argsort(-images, kind="stable")[:count]
        support = self.per_class["support"].to_numpy()
        true, predicted = ([self.class_names[i] for i in row] for row in pairs[:, first])
        share = images[first] / support[pairs[0, first]]
        return pd.DataFrame({"true": true, "predicted": predicted, "images": images[first], "share": share})

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the Markdown as plain values that JSON can store."""
        made, bins = self.calibration, self.calibration.before.bins
        weights = bins["images"] / bins["images"].sum()
        return {
            **{name: getattr(self, name) for name in SCORES},
            "images": len(self.labels),
            "class_names": list(self.class_names),
            "per_class": {name: column.tolist() for name, column in self.per_class.items()},
            "confused": self.most_confused().to_numpy().tolist(),
            "calibration": {
                "error": made.before.error,
                "confidence": float((weights * bins["confidence"]).sum()),
                "bins": len(bins),
                "error_after": None if made.after is None else made.after.error,
                "temperature": made.temperature,
                "fitted_on": made.fitted_on,
            },
            "groups": None if self.groups is None else dict(self.groups),
            "thresholds": self.thresholds
            if self.thresholds is None or self.thresholds == "thirds"
            else [*self.thresholds],
            "baselines": {name: row.tolist() for name, row in self.baselines.iterrows()},
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """Return the report as Markdown: scores, baselines, classes (the worst and best ten if many), calibration."""
        return f"# Report\n\n{report_markdown(self.to_dict(), '##')}\n"

    def save(self, folder: str | Path) -> None:
        """Write `report.md`, `per_class.csv`, `confusion.csv` (up to 1,000 classes), `baselines.csv` and pictures.

        The pictures, `confusion.png` and `reliability.png`, need matplotlib (`pip install peft_ncgeo[plot]`).

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.per_class.to_csv(folder / "per_class.csv")
            if len(self.baselines):
                self.baselines.to_csv(folder / "baselines.csv", index_label="method")
            text, small = self.to_markdown(), len(self.class_names) <= _LARGEST_MATRIX
            if small:
                self.confusion.to_csv(folder / "confusion.csv")
            drawn = self._draw(folder, small)
            text += "".join(f"\n![{name}]({name}.png)\n" for name in drawn)
            if not drawn:
                text += "\nThere are no pictures: matplotlib is missing; `pip install peft_ncgeo[plot]` adds it.\n"
            (folder / "report.md").write_text(text, encoding="utf-8")

    def _draw(self, folder: Path, confusion: bool) -> list[str]:
        """Write the pictures, and return their names; none without matplotlib."""
        try:
            from ..plots.confusion import plot_confusion  # matplotlib is an extra
            from ..plots.reliability import plot_reliability
        except ImportError:
            return []
        if confusion:
            plot_confusion(self.confusion, folder / "confusion.png")
        plot_reliability(self.calibration, folder / "reliability.png")
        return ["confusion", "reliability"] if confusion else ["reliability"]
