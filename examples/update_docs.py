"""Write the tables of the last runs into README.md and the pages of docs, and their numbers into examples/results.

python examples/train_prompt_ot.py && python examples/compare_transport.py
python examples/benchmark_space_alignment.py && python examples/benchmark_prototypes.py
python examples/adapt_copa.py
python tests/run_versions.py --python python3.10 --constraint constraints-oldest.txt
python examples/update_docs.py
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
from pathlib import Path

from adapt_copa import ADAPTERS, PAIRS

from peft_ncgeo.plots import plot_curve, plot_gaps
from peft_ncgeo.protocols import EpisodeResults, Results

ROOT = Path(__file__).parents[1]
TABLES = {
    "demo": "prompt_ot",
    "transport": "compare_transport",
    "speed": "benchmark_speed",
    "whole training": "benchmark_end_to_end",
}  # mark in a page -> folder of the run
ACCURACIES = ("all", "many", "medium", "few", "mean_all", "mean_many", "mean_few")
TURNS = (" + Reg", " + SLERP", " + Proj", " - Reg", " + post-hoc")
ALIGNMENT = {
    **{name: name for name in ACCURACIES[:4]},
    "alignment": "alignment",
    "nc1": "NC1",
    "nc2": "NC2",
    "nc3": "NC3",
    "class_exponent": "class exponent",
    "exponent_ratio": "beta / beta*",
    "fraction": "fraction",
}
COPA = [  # folders of adapt_copa.py's runs, in the order shown
    "resnet/any-way-any-shot",
    "vit/any-way-any-shot",
    "clip/any-way-any-shot",
    "resnet/any-way-5-shot",
    "resnet/5-way-1-shot",
]
EPISODE_COLUMNS = ["gap_before", "gap_after", "nc1_before", "nc1_after", "seconds"]
PROTOTYPES = {
    "train_gram_distance": "Delta_G*, training",
    "all_gram_distance": "Delta_G*, test",
    "all": "all",
    "many": "majority",
    "few": "minority",
    "mean_many": "majority, nearest mean",
    "mean_few": "minority, nearest mean",
}


def write_table(root: Path, mark: str, table: str) -> None:
    """Write `table` into the page that has the marks `<!-- mark table -->` and `<!-- end of mark table -->`."""
    start, end = f"<!-- {mark} table -->", f"<!-- end of {mark} table -->"
    for page in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        before, _, rest = page.read_text().partition(start)
        _, found, after = rest.partition(end)
        if found:
            page.write_text(f"{before}{start}\n{table}{end}{after}")
            return
    raise SystemExit(f"No page of docs has the marks {start} and {end}; add them where the table belongs.")


def keep_rows(folder: Path, path: Path, keys: tuple[str, ...]) -> tuple[list[dict], str]:
    """Return the chosen entries of a run's rows, rounded to four decimals, and its note; write both to `path`."""
    content = json.loads((folder / "results.json").read_text())
    rows = [{key: row[key] for key in keys if key in row} for row in content["rows"]]
    for row in rows:
        row.update({key: round(value, 4) for key, value in row.items() if isinstance(value, float)})
    lines = ",\n".join(map(json.dumps, rows))
    path.write_text(f'{{"note": {json.dumps(content["note"])}, "rows": [\n{lines}\n]}}\n')
    return rows, content["note"]


def keep_results(folder: Path, kept: Path, name: str, metrics: dict[str, str]) -> Results:
    """Write the chosen metrics (with their headings) of all runs as JSON, and every table as Markdown."""
    rows, note = keep_rows(folder, kept / f"{name}.json", ("setting", "method", "seed", *metrics))
    digits = {column: 1 if column in ACCURACIES or column == "nc1" else 2 for column in metrics}
    results = Results(rows, list(metrics), note, metrics, digits)
    (kept / f"{name}.md").write_text(f"{results.markdown()}\n\n{note}\n")
    return results


def paired_changes(results: Results, column: str, adapter: str) -> str:
    """Return a metric's mean change against the plain run of the same loss, setting and seed, and its error."""
    rows = [row for row in results.rows if row["setting"].startswith(f"{adapter}, ")]
    values = {(row["method"], row["setting"], row["seed"]): row[column] for row in rows}
    losses = list(dict.fromkeys(method for method, *_ in values if not method.endswith(TURNS)))
    lines = [f"| {adapter}, {column} | plain | {' | '.join(turn.strip(' +') for turn in TURNS)} |"]
    lines.append("|---|" + "---|" * (len(TURNS) + 1))
    for loss in losses:
        plain = [value for (method, *_), value in values.items() if method == loss]
        cells = [f"{statistics.fmean(plain):.1f}"]
        for turn in TURNS:
            turned = {key[1:]: value for key, value in values.items() if key[0] == loss + turn}
            changes = [value - values[(loss, *run)] for run, value in turned.items()]
            error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
            cells.append(f"{statistics.fmean(changes):+.1f} ± {error:.1f}" if changes else "")
        lines.append(f"| {loss} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_alignment(folder: Path, kept: Path, root: Path) -> None:
    """Write changes over all settings, one setting in full, and validation accuracy over the post-hoc fraction."""
    results = keep_results(folder, kept, "space_alignment_demo", ALIGNMENT)
    adapters = dict.fromkeys(row["setting"].split(", ")[0] for row in results.rows)
    shown = next(s for s in (f"{next(iter(adapters))}, IF 100", results.rows[0]["setting"]) if s in results.settings)
    one = Results([r for r in results.rows if r["setting"] == shown], results.columns, "", ALIGNMENT, results.digits)
    changes = "\n\n".join(paired_changes(results, c, a) for a in adapters for c in ("all", "few"))
    table = f"{changes}\n\n{one.markdown()}\n\n{results.note}\n"
    curves = [
        {"method": row["method"], "seed": row["seed"], **point, "accuracy": 100 * point["accuracy"]}
        for adapter in adapters
        for row in json.loads((folder / adapter / "results.json").read_text())["rows"]
        for point in row.get("validation_sweep", [])
        if f"{adapter}, {row['setting']}" == shown
    ]
    labels = {"x_label": f"share of the angle turned after training ({shown})", "y_label": "validation accuracy (%)"}
    plot_curve(curves, "fraction", "accuracy", kept / "post_hoc_fraction.png", **labels)
    write_table(root, "alignment", table)


def write_prototypes(folder: Path, kept: Path, root: Path) -> None:
    """Write a table of every setting, and the figure of Delta_G* over the number of copies."""
    results = keep_results(folder, kept, "prototypes_demo", PROTOTYPES)
    curves = []
    for row in results.rows:
        geometry, _, copies = row["method"].partition(", ")
        count = copies.removesuffix(" copies")
        for name in (geometry,) if geometry != "SupCon" else ("etf",):
            if count.isdigit() or geometry == "SupCon":
                x = int(count) if count.isdigit() else 0
                curves.append({**row, "method": f"{row['setting']}, {name}", "copies": x})
    curves = [row for row in curves if ", trained" not in row["method"]]
    plot_curve(
        curves,
        "copies",
        "train_gram_distance",
        kept / "prototype_copies.png",
        x_label="copies of each prototype in a batch",
        y_label="Delta_G* of training images",
        log_x=True,
    )
    table = f"<details><summary>All settings</summary>\n\n{results.markdown()}\n\n</details>\n\n{results.note}\n"
    write_table(root, "prototypes", table)


def write_copa(folder: Path, kept: Path, root: Path) -> None:
    """Write the first backbone's tables and figure, and accuracies of other backbones and kinds of episodes."""
    found = {path: folder / path / "results.json" for path in COPA}
    runs = {path: EpisodeResults.load(file) for path, file in found.items() if file.exists()}
    if not runs:
        return
    first, *others = runs
    plot_gaps(runs[first], kept / "copa_gap.png")
    tables = [*runs[first].tables(PAIRS, [ADAPTERS.name]), runs[first].note]
    tables += ["<details><summary>Gap, NC1 and seconds</summary>", runs[first].on_common_episodes().geometry_table()]
    tables += ["</details>", "<details><summary>Other backbones, and other kinds of episodes</summary>"]
    for path in others:
        tables += [runs[path].note, *runs[path].tables(PAIRS, [ADAPTERS.name])]
    tables.append("</details>")
    content = {path: kept_episodes(results) for path, results in runs.items()}
    (kept / "adapt_copa_demo.json").write_text(json.dumps(content) + "\n")
    logs = {
        path.parent.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("tune/*/*/tuned.json"))
    }
    if logs:
        (kept / "tune_copa.json").write_text(json.dumps(logs, indent=1) + "\n")
    write_table(root, "copa", "\n\n".join(tables) + "\n")


def kept_episodes(results: EpisodeResults) -> dict:
    """Return each episode's accuracy, and the means of the other metrics."""
    accuracy, means = {}, {}
    for domain in results.domains:
        for method in results.methods:
            key = f"{domain}, {method}"
            accuracy[key] = [round(value, 2) for value in results.values(domain, method).values()]
            means[key] = {column: round(results.mean(domain, method, column)[0], 4) for column in EPISODE_COLUMNS}
    return {"note": results.note, "seen": results.seen, "accuracy": accuracy, "means": means}


def write_versions(kept: Path, root: Path) -> None:
    """Write the results of `tests/run_versions.py` with each set of versions, the oldest first."""
    results = [json.loads(path.read_text()) for path in kept.glob("*.json")]
    if not results:
        return
    names = list(results[0]["versions"])
    results.sort(key=lambda result: [[*map(int, re.findall(r"\d+", result["versions"][name]))] for name in names])
    lines = [f"| {' | '.join(names)} | tests | passed | failed | skipped |", "|---" * (len(names) + 4) + "|"]
    for result in results:
        parts = ", ".join("all" if part == "tests" else f"`{part.removeprefix('tests/')}`" for part in result["tests"])
        counts = (parts, result["passed"], len(result["failed"]), result["skipped"])
        lines.append(f"| {' | '.join(map(str, (*result['versions'].values(), *counts)))} |")
    write_table(root, "versions", "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="folder with the results of the runs")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs")
    args = parser.parse_args()
    kept = ROOT / "examples" / "results"
    kept.mkdir(exist_ok=True)
    for mark, run in TABLES.items():
        folder = args.outputs / run
        if (folder / "results.md").exists():
            write_table(args.root, mark, (folder / "results.md").read_text())
            shutil.copy(folder / "results.json", kept / f"{run}_demo.json")
    if list((args.outputs / "adapt_copa").glob("*/*/results.json")):
        write_copa(args.outputs / "adapt_copa", kept, args.root)
    writers = {
        "space_alignment": write_alignment,
        "prototypes_table": write_prototypes,
    }
    for run, write in writers.items():
        if (args.outputs / run / "results.json").exists():
            write(args.outputs / run, kept, args.root)
    write_versions(ROOT / "tests" / "versions", args.root)


if __name__ == "__main__":
    main()
