"""Markdown of a report, from the plain values that a record stores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..markdown import escape, table

SCORES = ("accuracy", "balanced_accuracy", "macro_f1")
TUNED = "tuned model"
_TITLES = ("accuracy", "balanced accuracy", "macro F1")
_ALL, _ENDS = 20, 10  # classes that are all shown; of more, the worst and the best
Values = Mapping[str, Any]


def report_markdown(values: Values, heading: str) -> str:
    """Return scores, baselines, classes, confusions and calibration as Markdown.

    Args:
        values: values from [`Report.to_dict`].
        heading: Markdown of a heading's level, "##" for instance.
    """
    parts = [
        ("", scores_line(values)),
        ("Simple baselines", baselines_section(values)),
        ("Classes", classes_section(values)),
        ("Most confused", confused_table(values)),
        ("Calibration", calibration_line(values)),
        ("Notes", "\n".join(f"- {escape(note)}" for note in values["notes"])),
    ]
    return "\n\n".join(f"{heading} {title}\n\n{body}" if title else body for title, body in parts if body)


def scores_line(values: Values) -> str:
    """Return a sentence with the scores of all images, and another one with those of many / medium / few."""
    shown = ", ".join(f"{title} {_percent(values[key])}" for key, title in zip(SCORES, _TITLES, strict=True))
    line = f"On {values['images']:,} images of {len(values['class_names']):,} classes: {shown}."
    groups = {name: share for name, share in (values["groups"] or {}).items() if share is not None}
    if groups:
        listed = ", ".join(f"{name} {_percent(share)}" for name, share in groups.items())
        line += f" Accuracy by the number of training images: {listed} ({_rule(values['thresholds'])})."
    return line


def baselines_section(values: Values) -> str:
    """Return the table of baselines, and a sentence on those that the model does not beat; "" without baselines."""
    rows = values["baselines"]
    if len(rows) < 2:
        return ""
    cells = [[escape(name), *(f"{100 * share:.1f}" for share in shares)] for name, shares in rows.items()]
    return f"{table(['in %', *_TITLES], cells, 'lrrr')}\n\n{verdict(rows)}"


def verdict(rows: Mapping[str, Sequence[float]]) -> str:
    """Return a sentence that compares the tuned model with the other rows by accuracy and balanced accuracy."""
    tuned, lost = rows[TUNED], []
    for name, shares in rows.items():
        pairs = [
            f"{title} {_percent(own)} against {_percent(other)}"
            for title, own, other in list(zip(_TITLES, tuned, shares, strict=True))[:2]
            if own <= other
        ]
        if name != TUNED and pairs:
            lost.append(f"{name} ({', '.join(dict.fromkeys(pairs))})")
    if not lost:
        return "The tuned model beats every baseline above."
    return f"**The tuned model does not beat {' nor '.join(lost)}.**"


def classes_section(values: Values) -> str:
    """Return the table of all classes, or of the worst and best ten by F1 among those with images."""
    names, columns = values["class_names"], values["per_class"]
    if len(names) <= _ALL:
        return _classes_table(names, columns, range(len(names)))
    tested = sorted((k for k, n in enumerate(columns["support"]) if n), key=lambda k: columns["f1"][k])
    if len(tested) <= _ALL:
        return f"The classes with images:\n\n{_classes_table(names, columns, tested)}"
    ends = [("worst", tested[:_ENDS]), ("best", tested[::-1][:_ENDS])]
    return "\n\n".join(
        f"The {len(part)} {title} of {len(names):,} classes by F1:\n\n{_classes_table(names, columns, part)}"
        for title, part in ends
    )


def _classes_table(names: Sequence[str], columns: Mapping[str, Sequence[float]], order: Iterable[int]) -> str:
    counts = [title for title in ("support", "training_images") if title in columns]
    rows = [
        [
            escape(names[k]),
            *(f"{100 * columns[title][k]:.1f}" for title in ("precision", "recall", "f1")),
            *(f"{columns[title][k]:,}" for title in counts),
        ]
        for k in order
    ]
    head = [
        "class (scores in %)",
        "precision",
        "recall",
        "F1",
        *({"support": "images"}.get(c, "training images") for c in counts),
    ]
    return table(head, rows, "l" + "r" * (len(head) - 1))


def confused_table(values: Values) -> str:
    """Return the table of the most frequent errors; "" if every image is classified correctly."""
    rows = [[escape(t), escape(p), f"{n:,}", _percent(share)] for t, p, n, share in values["confused"]]
    return table(["true", "predicted", "images", "of the class"], rows, "llrr") if rows else ""


def calibration_line(values: Values) -> str:
    """Return sentences on the calibration before and after temperature scaling."""
    made = values["calibration"]
    line = (
        f"Expected calibration error {_percent(made['error'])} ({made['bins']} bins): mean confidence "
        f"{_percent(made['confidence'])}, accuracy {_percent(values['accuracy'])}."
    )
    if made["temperature"] is not None:
        line += (
            f" Logits divided by {made['temperature']:.3g}, a temperature fitted on {made['fitted_on']}: "
            f"{_percent(made['error_after'])}."
        )
    return line


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _rule(thresholds: Any) -> str:
    if thresholds == "thirds":
        return "thirds of the classes"
    return f"many: more than {thresholds[1]:g}, few: {thresholds[0]:g} at most"
