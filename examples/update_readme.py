"""Write the tables of the last runs into README.md and keep their numbers in the repository.

python examples/train_prompt_ot.py && python examples/compare_transport.py
python examples/benchmark_base_new.py && python examples/update_readme.py
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from peft_ncgeo.plots import plot_relation
from peft_ncgeo.protocols import Results

ROOT = Path(__file__).parents[1]
TABLES = {"demo": "prompt_ot", "transport": "compare_transport"}  # mark in README -> folder of the run
KEPT = ("setting", "method", "seed", "base", "new", "H", "many", "medium", "few", "kept")
GEOMETRY = ("base_text_nc2", "new_text_nc2", "base_nc1", "base_nc3_cosine", "base_modality_gap", "seconds")


def write_table(text: str, mark: str, table: str) -> str:
    """`text` with `table` between the comments `<!-- mark table -->` and `<!-- end of mark table -->`."""
    start, end = f"<!-- {mark} table -->", f"<!-- end of {mark} table -->"
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"README lacks the marks {start} and {end}.")
    return f"{before}{start}\n{table}{end}{after}"


def lead(results: Results, ours: str, others: list[str]) -> str:
    """How far our H is from the best of the others, in each setting."""
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in results.rows):
        own = results.summary(setting, ours, "H")
        best = max(others, key=lambda other: results.summary(setting, other, "H")[0])
        mean, spread = results.summary(setting, best, "H")
        larger = max(spread, own[1])
        word = "beyond" if abs(own[0] - mean) > larger else "within"
        lines.append(f"- {setting}: {own[0] - mean:+.1f} to {best}, {word} one standard deviation ({larger:.1f})")
    return "\n".join(lines)


def write_base_new(folder: Path, kept: Path, readme: str) -> str:
    """The comparison of all methods: H at a glance, everything folded, and the figure of NC2 against new accuracy."""
    content = json.loads((folder / "results.json").read_text())
    rows = [{key: row.get(key) for key in (*KEPT, *GEOMETRY)} for row in content["rows"]]
    for row in rows:
        row.update({key: round(value, 4) for key, value in row.items() if isinstance(value, float)})
    titles = {"kept": "knowledge kept"}
    results = Results(rows, list(KEPT[3:]), content["note"], titles)
    (kept / "base_new_demo.json").write_text(
        '{"note": ' + json.dumps(content["note"]) + ', "rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"
    )
    ours = "budget"
    methods = dict.fromkeys(row["method"] for row in rows)
    published = [m for m in methods if m not in ("zero-shot", ours)]
    tuned = [m for m in published if not m.endswith("_long")]
    table = (
        f"{results.pivot('H')}\n\n<details><summary>Base, new, H, many / medium / few, knowledge kept</summary>\n\n"
        f"{results.markdown()}\n\n</details>\n\n{content['note']}\n\n"
        "H of `budget` against the best published recipe, tuned on base validation images:\n\n"
        f"{lead(results, ours, tuned)}\n\nand with those that had sixty epochs and a weight chosen by H:\n\n"
        f"{lead(results, ours, published)}\n"
    )
    readme = write_table(readme, "comparison", table)
    trained = [row for row in rows if row["seconds"] is not None]
    lines = []
    for column, name in (("base_text_nc2", "base"), ("new_text_nc2", "new")):
        for without in ("", "coop"):  # CoOp's random texts stand apart from all others
            chosen = Results([row for row in trained if row["method"] != without], results.columns)
            path = kept / f"{column}{without and '_without_' + without}.png"
            x_label = f"NC2 error of the {name} classes' text features"
            found = plot_relation(chosen, column, "new", path, x_label, "accuracy on new classes (%)")
            lines.append(
                f"| {name}{without and ', without CoOp'} | {found['runs']:.0f} | {found['pearson']:.2f} | "
                f"{found['spearman']:.2f} | {found['pearson_within']:.2f} |"
            )
    head = "| texts of | runs | Pearson | Spearman | Pearson within settings |\n|---|---|---|---|---|\n"
    return write_table(readme, "collapse", head + "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="where the runs left their results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args()
    kept = ROOT / "examples" / "results"
    kept.mkdir(exist_ok=True)
    for mark, run in TABLES.items():
        folder = args.outputs / run
        if (folder / "results.md").exists():
            text = write_table(args.readme.read_text(), mark, (folder / "results.md").read_text())
            args.readme.write_text(text)
            shutil.copy(folder / "results.json", kept / f"{run}_demo.json")
    if (args.outputs / "base_new" / "results.json").exists():
        args.readme.write_text(write_base_new(args.outputs / "base_new", kept, args.readme.read_text()))


if __name__ == "__main__":
    main()
