"""Parts of the pages on searched methods: arguments, numbers, our lead, what each search chose, all columns."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from update_docs import ROOT, keep_rows

from peft_ncgeo.markdown import code_cell, escape, table
from peft_ncgeo.protocols import Results

INTERVALS = (
    "Same setting and seed, mean and 95 % t interval over the seeds. An interval without 0 is a clear difference."
)


def page_parser(description: str, run: str, page: str) -> argparse.ArgumentParser:
    """Return a parser with the folders of a run and of kept results, and the page to write."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / run, help="folder of the run")
    parser.add_argument("--kept", type=Path, default=ROOT / "examples" / "results", help="folder of kept results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / f"{page}.md")
    return parser


def kept_run(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str, keys: Sequence[str]) -> Any:
    """Return rows and note of the last run, which are kept as `name`; without a run, those that are kept."""
    path = args.kept / name
    if (args.outputs / "results.json").exists():
        keep_rows(args.outputs, path, tuple(keys))
    if not path.exists():
        parser.error(f"there is neither a run in {args.outputs} nor {path}; run the benchmark first.")
    return json.loads(path.read_text())


def choices(folder: Path, scores: Mapping[str, Callable[[Any, Any], float | None]]) -> str:
    """Return a table of what each search chose; the scores are functions of its log and of the chosen run."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        log = json.loads(path.read_text())
        chosen = log["runs"][log["chosen"]["run"] - 1]
        changes = ", ".join(code_cell(f"{key}: {_short(value)}") for key, value in chosen["changes"].items())
        found = [score(log, chosen) for score in scores.values()]
        cells = ["-" if value is None else f"{value:.1f}" for value in found]
        spent = sum(run["cpu_seconds"] for run in log["runs"]) / 3600
        lines.append([escape(log["method"]), str(len(log["runs"])), f"{spent:.2f}", changes or "the start", *cells])
    return table(["method", "runs", "CPU hours", "choice", *scores], lines) if lines else ""


def _short(value: Any) -> str:
    """Return a value as YAML in one line, or the number of its entries if it is long."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return text if len(text) <= 80 else f"{len(value)} entries"


def lead(results: Results, ours: str, others: Sequence[str], column: str, settings: Sequence[str]) -> str:
    """Return, for each setting, the difference of our row from the best of the others."""
    lines = []
    for setting in settings:
        found = {o: results.summary(setting, o, column) for o in others if results.values(setting, o, column)}
        if not found or not results.values(setting, ours, column):
            continue
        own = results.summary(setting, ours, column)
        best = max(found, key=lambda other: found[other][0])
        mean, spread = found[best]
        larger = max(spread, own[1])
        word = "beyond" if abs(own[0] - mean) > larger else "within"
        lines.append(f"- {setting}: {own[0] - mean:+.1f} to `{best}`, {word} one standard deviation ({larger:.1f})")
    return "\n".join(lines)


def all_columns(results: Results) -> list[str]:
    """Return the last part of a page: the whole table, its note, and the CPU hours of all runs."""
    spent = sum(row.get("cpu_seconds") or 0 for row in results.rows) / 3600
    cost = f" {spent:.1f} CPU hours." if spent else ""
    return ["## All columns", results.markdown(), f"{results.note}{cost}"]
