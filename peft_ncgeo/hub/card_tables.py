"""The tables of a model card: results, classes, geometry."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult

from ..markdown import escape, table
from ..reports.tables import report_markdown
from .record import GROUPS, TrainingRecord

Rows = dict[str, dict[str, Any]]  # row -> those of `before`, `after` and `over_seeds` that are known, in percent
Runs = Sequence[Mapping[str, Any]]
FOLDED = 20  # a longer list of classes is folded up
_BAR = 24  # characters of the longest bar
# An accuracy gets a row if `TrainingRecord.row` returns it, under a title below; a measure of `FeatureGeometry` gets
# one in `_GEOMETRY`. Those of the user's `compute_metrics` have a table of their own.
_KNOWN = ("base", "new", "H", *GROUPS)  # metrics of runs over seeds that have a row, beside those of the record
_TITLES = {"H": "harmonic mean of base and new"} | {group: f"{group}-shot classes" for group in GROUPS}
_METRICS = {"H": "harmonic mean of base and new"} | {group: f"{group}-shot accuracy" for group in GROUPS}
_GEOMETRY = {
    "nc1": "NC1: spread within classes against that between them (0: collapsed)",
    "nc2": "NC2: class means against a simplex ETF (0: equal)",
    "nc3": "NC3: classifier against class means (0: parallel)",
    "alignment": "alignment: mean cosine of classifier and class mean",
    "class_exponent": "mean error exponent of the classes (0: a class is lost to another)",
    "modality_gap": "modality gap: distance between images and texts",
    "text_nc2": "class texts against a simplex ETF (0: equal)",
    "gap": "gap between images and prototypes",
}


def check_runs(runs: Runs) -> None:
    """Check that all runs belong to one method and setting, each with another seed.

    Raises:
        ValueError: the rows belong to several methods or settings, or a seed appears twice.
    """
    for key in ("method", "setting"):
        if len({run.get(key) for run in runs}) > 1:
            raise ValueError(f"runs hold several {key}s; pass the runs of one.")
    seeds = [run["seed"] for run in runs if "seed" in run]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"runs hold a seed twice: {seeds}; pass each seed once.")


def results_rows(record: TrainingRecord, runs: Runs) -> Rows:
    """Return the measured values of each row, in the order of the evaluation sets.

    The values many / medium / few of one seed have no mean over seeds, since other seeds may draw other rare classes.
    """
    before, after = record.row("before"), record.row()
    rows: Rows = {}
    measured = dict.fromkeys([*after, *(key for run in runs for key in run if key in _KNOWN)])
    measured.pop("seed", None)
    for name in measured:
        rows[name] = {key: row[name] for key, row in (("before", before), ("after", after)) if name in row}
        numbers = [float(run[name]) for run in runs if run.get(name) is not None]
        values = [number for number in numbers if math.isfinite(number)]
        if values and not (name in GROUPS and rows[name]):
            rows[name]["over_seeds"] = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return {name: row for name, row in rows.items() if row}


def results_table(record: TrainingRecord, rows: Rows) -> str:
    """Return the table of accuracies in percent: before and after training, and over seeds."""
    this = "this head" if record.kind == "cached" else "this adapter"
    columns = {"before": before_title(record), "after": this, "over_seeds": "mean over seeds"}
    present = {key: title for key, title in columns.items() if any(key in row for row in rows.values())}
    head = [f"{metric_title(record)} in %", *present.values()]
    lines = [[_row_title(record, name), *(_cell(row.get(key)) for key in present)] for name, row in rows.items()]
    return table(head, lines, "l" + "r" * len(present)) if rows else ""


def own_table(record: TrainingRecord) -> str:
    """Return the table of the numbers of the user's `compute_metrics` on each set, as they were returned."""
    moments = {"before": before_title(record), "after": "this adapter"}
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for of_set, entry in record.sets.items():
        for moment in moments:
            for name, value in entry.get(moment, {}).get("own", {}).items():
                rows.setdefault((name, of_set), {})[moment] = value
    shown = {moment: title for moment, title in moments.items() if any(moment in row for row in rows.values())}
    lines = [
        [escape(name), escape(of_set), *(f"{row[moment]:.6g}" if moment in row else "" for moment in shown)]
        for (name, of_set), row in rows.items()
    ]
    return (
        table(["the author's own metric", "images", *shown.values()], lines, "ll" + "r" * len(shown)) if rows else ""
    )


def results_note(record: TrainingRecord, rows: Rows, runs: Runs) -> str:
    """Return the note below the results: sets, groups, seeds."""
    notes = []
    if record.thresholds == "thirds" and "many" in rows:
        notes.append("Many, medium and few are thirds of the classes by their number of training images.")
    elif record.thresholds is not None and set(GROUPS) & rows.keys():
        limits = "Many: more than {1:g} training images, few: {0:g} at most, medium between."
        notes.append(limits.format(*record.thresholds))
    if any("before" in row for row in rows.values()) and not record.template:
        notes.append(
            "Before, the nearest prototype of the base model's own features classifies."
            if record.kind == "few-shot"
            else "Before training the head is the one that training began with, often an untrained one."
        )
    left_out = {n: e["after"].get("left_out") for n, e in record.sets.items() if e.get("after", {}).get("left_out")}
    for name, count in left_out.items():
        notes.append(f'{count:.0f} of the classes have no image in "{escape(name)}" and are left out of its mean.')
    if record.unlabelled:
        notes.append("Transductive: it was trained on unlabelled images of all classes.")
    if len(record.sets) > 1:
        notes.append("Each set is classified among its own class names.")
    if any("over_seeds" in row for row in rows.values()):
        seeds = [run["seed"] for run in runs if "seed" in run]
        listed = f" ({', '.join(map(escape, seeds))})" if seeds else ""
        notes.append(f"± is the standard deviation over {len(runs)} seeds{listed}.")
    if record.seed is not None and any("after" in row for row in rows.values()):
        notes.append(f"This adapter is of seed {escape(record.seed)}.")
    return " ".join(notes)


def eval_results(
    record: TrainingRecord, rows: Rows, datasets: str | Sequence[str] | None, dataset_name: str | None
) -> list[EvalResult]:
    """Return the results for the model-index as shares: this adapter's, or the mean over seeds if there are none."""
    first = datasets if isinstance(datasets, str) else next(iter(datasets or []), None)
    name = dataset_name or first or "images of the author's own"
    values = {row: parts.get("after", parts.get("over_seeds", (None,))[0]) for row, parts in rows.items()}
    return [
        EvalResult(
            task_type=record.task,
            dataset_type=first or "imagefolder",
            dataset_name=name,
            metric_type="harmonic_mean" if row == "H" else record.metric,
            metric_name=_METRICS.get(row, f"{row} {metric_title(record)}"),
            metric_value=round(value / 100, 4),
        )
        for row, value in values.items()
        if value is not None
    ]


def metric_title(record: TrainingRecord) -> str:
    """Return the name of the metric in the results."""
    return "mean average precision" if record.multi_label else "accuracy"


def before_title(record: TrainingRecord) -> str:
    """Return the name of the model without its adapter."""
    return "zero-shot" if record.template else "before training"


def classes_table(record: TrainingRecord) -> str:
    """Return the table of class names and numbers of training images, also as bars, the largest first."""
    names = [escape(name) for name in record.class_names]
    if not record.class_counts:
        return table(["class"], [[name] for name in names], "l") if names else ""
    most = max(*record.class_counts, 1)
    pairs = sorted(zip(names, record.class_counts, strict=True), key=lambda pair: -pair[1])
    rows = [[name, f"{count:,}", "█" * max(1, round(_BAR * count / most))] for name, count in pairs]
    return table(["class", "images", ""], rows, "lrl")


def classes_note(record: TrainingRecord) -> str:
    """Return the number of classes and their imbalance as a sentence."""
    counts = record.class_counts
    if not counts:
        return f"{len(record.class_names):,} classes."
    if min(counts) == max(counts):
        return f"{len(counts):,} classes of {counts[0]:,} training images each."
    return (
        f"{len(counts):,} classes, from {max(counts):,} training images down to {min(counts):,} "
        f"(imbalance factor {max(counts) / max(1, min(counts)):.3g})."
    )


def reports_section(record: TrainingRecord) -> str:
    """Return scores, baselines, classes and calibration on each set that has a report."""
    if len(record.reports) == 1:
        return report_markdown(next(iter(record.reports.values())), "###")
    parts = [f"### {escape(name)}\n\n{report_markdown(one, '####')}" for name, one in record.reports.items()]
    return "\n\n".join(parts)


def geometry_table(record: TrainingRecord) -> str:
    """Return the table of neural collapse, alignment and gap, measured on the training classes."""
    entry = record.sets.get(record.geometry_set or "", {})
    titles = {"before": before_title(record), "after": "this adapter"}
    titles = {moment: title for moment, title in titles.items() if moment in entry}
    rows = [
        [title, *(_number(entry[moment].get(key)) for moment in titles)]
        for key, title in _GEOMETRY.items()
        if any(entry[moment].get(key) is not None for moment in titles)
    ]
    return table(["measure", *titles.values()], rows, "l" + "r" * len(titles)) if rows else ""


def geometry_note(record: TrainingRecord) -> str:
    """Return a note on the images that the geometry was measured on."""
    entry = record.sets.get(record.geometry_set or "", {})
    return f'Of the {entry.get("size", 0):,} images of "{escape(record.geometry_set)}".'


def _row_title(record: TrainingRecord, name: str) -> str:
    entry = record.sets.get(name)
    size = f" ({entry['classes']:,} classes, {entry['size']:,} images)" if entry else ""
    return _TITLES.get(name) or f"{escape(name)}{size}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value[0]:.1f} ± {value[1]:.1f}" if isinstance(value, tuple) else f"{value:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
