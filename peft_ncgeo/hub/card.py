"""Model cards: the adapter, code that loads it, its training data and its results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from ..classifiers.few_shot import FewShotClassifier
from ..classifiers.heads import HEADS
from ..markdown import code_cell, escape, literal, table
from ..models.base_model import is_folder
from ..tuners.own_configs import own_configs
from .card_tables import (
    FOLDED,
    Runs,
    check_runs,
    classes_note,
    classes_table,
    eval_results,
    geometry_note,
    geometry_table,
    metric_title,
    own_table,
    reports_section,
    results_note,
    results_rows,
    results_table,
)
from .few_shot_record import record_few_shot
from .record import Component, TrainingRecord, record_model
from .references import adapter_reference, bibtex, term_references

TEMPLATE = Path(__file__).with_name("card_template.md")
FIGURE = "geometry.png"
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)  # the id of a model
_WIDE = 100  # longest setting, in characters


def create_card(
    model: nn.Module | FewShotClassifier | None = None,
    record: TrainingRecord | None = None,
    repo_id: str = "user/adapter",
    base_model_id: str | None = None,
    license: str | None = None,
    datasets: str | Sequence[str] | None = None,
    dataset_name: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
    runs: Sequence[Mapping[str, Any]] = (),
    figure: str | None = None,
    revision: str | None = None,
    processor_id: str | None = None,
) -> ModelCard:
    """Create the model card of an adapter: front matter with results, a snippet that loads it, and measurements.

    Sections without content are left out.

    Args:
        model: the tuned `PeftModel`, or a `FewShotClassifier`. Without a record, adapter and versions come from it.
        record: record of the training, from `trainer.record()`.
        repo_id: where the adapter will be found, for the snippets.
        base_model_id: Hub id of the base model. Default: the id that the model was loaded from, if it is one.
        license: SPDX identifier as the Hub writes it, "apache-2.0" for instance.
        datasets: Hub ids of the training data.
        dataset_name: name of the data in the results. Default: the first of `datasets`.
        language: language of the class names, "en" for instance.
        tags: tags added to the card's own.
        runs: metrics of several seeds, in percent, each with its `seed`: `record.row()` of each run, or the rows of
            one method and setting of [`~peft_ncgeo.protocols.Results`]. The card shows mean and standard deviation.
        figure: path of a figure of the geometry, relative to the card.
        revision: branch that holds the adapter, for the snippets.
        processor_id: Hub id of the image processor. Default: the processor is in the adapter's repository.

    Returns:
        A `huggingface_hub.ModelCard`; `str(card)` is its Markdown.

    Raises:
        TypeError: there is no record, and the model is not a `PeftModel`.
        ValueError: neither model nor record is given, or `runs` hold several methods or settings, or a seed twice.
    """
    if record is None:
        if model is None:
            raise ValueError("create_card needs a model or a record.")
        record = record_few_shot(model) if isinstance(model, FewShotClassifier) else record_model(model)
    runs = list(runs) or record.runs
    check_runs(runs)
    is_head = record.kind == "cached"
    hub_id = base_model_id or (None if is_folder(record.base_model) else record.base_model)
    relation = None if is_head or not hub_id else "adapter"
    base = hub_id or Path(record.base_model or "its base model").name
    rows = results_rows(record, runs)
    title = repo_id.split("/")[-1]
    where = literal(repo_id) + (f", revision={literal(revision)}" if revision else "")
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation=relation,
        library_name="peft_ncgeo" if is_head else "peft",
        pipeline_tag=record.task,
        license=license,
        language=language if language is None or isinstance(language, str) else list(language),
        datasets=[datasets] if isinstance(datasets, str) else list(datasets or []) or None,
        metrics=[record.metric] if rows else None,
        tags=list(dict.fromkeys(["peft_ncgeo", *([f"base_model:{relation}:{hub_id}"] if relation else []), *tags])),
        model_name=title if rows else None,
        eval_results=eval_results(record, rows, datasets, dataset_name) or None,
    )
    changed, others = _arguments(record)
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=escape(title),
        summary=_summary(record, base),
        kind=record.kind,
        multi_label=record.multi_label,
        own_type=record.adapter.name in own_configs(),
        where=where,
        processor=processor_id and literal(processor_id),
        plain_call=code_cell(f"PeftModel.from_pretrained(base, {where})"),
        # a pipeline would look for this revision in the base model too, and knows neither trained rows nor biases
        with_pipeline=revision is None and not record.class_rows and not record.multi_label,
        example_names=_example_names(record),
        results=results_table(record, rows),
        own=own_table(record),
        results_note=results_note(record, rows, runs),
        report=reports_section(record),
        classes=classes_table(record),
        classes_note=classes_note(record),
        many_classes=f"{len(record.class_names):,}" if len(record.class_names) > FOLDED else "",
        geometry=geometry_table(record),
        geometry_note=geometry_note(record),
        figure=figure and quote(figure, errors="replace"),  # never an address on another host
        figure_note=(
            "Above, unit vectors of class means and classifier projected on a plane; below, the cosine of each "
            "classifier vector with each class mean."
        ),
        run_note=_run_note(record),
        code="\n".join(map(_call, (record.adapter, *record.terms))),
        changed=changed,
        others=others,
        limits=_limits(record, base, runs),
        versions=", ".join(f"{escape(name)} {escape(number)}" for name, number in record.versions.items()) + ".",
        bibtex=bibtex(record),
    )


def _summary(record: TrainingRecord, base: str) -> str:
    link = f"[{base}](https://huggingface.co/{base})" if _ON_HUB.fullmatch(base) else escape(base)
    what = adapter_reference(record.adapter).phrase
    terms = [reference.phrase for reference in term_references(record)] if record.steps else []
    trained = f", trained with {_listed(terms)}" if terms else ""
    count = sum(record.class_counts)
    unit = "label" if record.multi_label else "image"
    images = f" ({count:,} {unit}{'s' if count > 1 else ''})" if count else ""
    images = f" ({record.unlabelled:,} unlabelled images)" if record.unlabelled else images
    was_trained = record.class_names and (record.steps or record.kind in ("few-shot", "cached"))
    on = f" on {len(record.class_names):,} classes{images}" if was_trained else ""
    on = f", trained{on}" if on and not trained else on
    any_names = " It reads class names as text, so other names can be given at any time."
    names = any_names if _takes_new_names(record) else ""
    if record.class_rows:
        names += " Its own classes have trained rows of weights in place of their texts."
    return f"{what[:1].upper()}{what[1:]} for {link}{trained}{on}.{names}"


def _takes_new_names(record: TrainingRecord) -> bool:
    head = HEADS.get(record.adapter.name)
    return bool(record.template) and (head is None or head.takes_new_names)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _example_names(record: TrainingRecord) -> str:
    names = record.class_names[:3] if len(record.class_names) > 1 else ["cat", "dog"]
    return f"[{', '.join(map(literal, names))}]"


def _run_note(record: TrainingRecord) -> str:
    after = [f"After training, {escape('; '.join(record.post_hoc))}."] if record.post_hoc else []
    if not record.steps:
        shares = [f"{100 * share:.1f} % {moment}" for moment, share in record.leave_one_out.items()]
        leave = f"Leave-one-out accuracy of the support images: {', '.join(shares)}." if shares else ""
        return " ".join(filter(None, [*after, leave]))
    processes = f"{record.processes} processes" if record.processes > 1 else "one process"
    steps = f"{record.steps:,} step{'s' if record.steps > 1 else ''}"
    teacher = [f"Teacher: {escape(record.teacher)}."] if record.teacher else []
    run = f"{steps} ({record.epochs:.3g} epochs), seed {escape(record.seed)}, {processes} ({escape(record.device)})."
    return " ".join([run, *teacher, *after])


def _call(part: Component) -> str:
    return f"{_name(part.name)}({', '.join(f'{_name(key)}={_short(value)}' for key, value in part.settings.items())})"


def _name(word: str) -> str:
    """Return a name as it is; put other texts in quotes, since they could end the Markdown code around them."""
    return word if word.isidentifier() else literal(word)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _WIDE else f"{shown[: _WIDE // 2]}...{shown[-8:]}"


def _arguments(record: TrainingRecord) -> tuple[str, str]:
    rows = [[code_cell(name), code_cell(value)] for name, value in record.arguments.items()]
    changed, others = rows[: record.changed], rows[record.changed :]
    tables = [table(["argument", "value"], part, "ll") if part else "" for part in (changed, others)]
    return tables[0], tables[1]


def _limits(record: TrainingRecord, base: str, runs: Runs) -> list[str]:
    sets: Mapping[str, Mapping[str, Any]] = record.sets
    limits = [f"It fits {escape(base)} alone, and shares that model's limits and biases, which were not looked into."]
    if record.dtype != "float32":
        limits.append(
            f"The base model was run in {escape(record.dtype)}; loaded in another precision its numbers differ."
        )
    if sets and record.base_changed:
        limits.append(f"Numbers before training are not known: {escape(record.base_changed)}.")
    if not sets and not runs:
        limits.append("It was not evaluated.")
    if record.template:
        tokens = record.adapter.settings.get("num_text_tokens", 0)
        replaced = f" The first {escape(tokens)} tokens of it are replaced by learned vectors." if tokens else ""
        limits.append(f'Class names are read inside "{escape(record.template)}".{replaced}')
    if record.class_texts:
        name, texts = next(iter(record.class_texts.items()))
        limits.append(
            f"{len(record.class_texts):,} classes have texts of their own in place of that, kept beside the adapter "
            f'({sum(map(len, record.class_texts.values())):,} texts); of "{escape(name)}": "{escape(texts[0])}".'
        )
    for name, entry in sets.items():
        snapshots = [entry.get(moment, {}).get(record.metric) for moment in ("before", "after")]
        if not _trained(name, entry) and record.template and None not in snapshots and snapshots[1] < snapshots[0]:
            before, after = (100 * moment for moment in snapshots)
            limits.append(
                f'On the classes of "{escape(name)}", not trained, {metric_title(record)} fell from {before:.1f} '
                f"to {after:.1f}."
            )
    if (
        _takes_new_names(record)
        and all(_trained(name, entry) for name, entry in sets.items())
        and not any("new" in run for run in runs)
    ):
        limits.append(f"{metric_title(record).capitalize()} on classes other than those of training was not measured.")
    if record.class_counts and min(record.class_counts) < 10:
        fewest = min(record.class_counts)
        limits.append(f"The rarest class has {fewest} training image{'s' if fewest > 1 else ''}.")
    if record.arguments.get("load_best_model_at_end"):
        limits.append("The best of several checkpoints was taken, by the very sets that it is evaluated on here.")
    if sets and len(runs) < 2:
        limits.append("One seed was run, so how far these numbers vary is not known.")
    return limits


def _trained(name: str, entry: Mapping[str, Any]) -> bool:
    return entry.get("trained", name != "new")
