"""Write docs/results/image_tail.md from the last run of benchmark_image_tail.py.

python examples/benchmark_image_tail.py && python examples/write_image_tail.py

The run's numbers are kept in `results/image_tail_demo.json`; without a run the page is made of those. How the settings
were chosen is read from the logs of search_recipes.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmark_image_tail import COLUMNS, DIGITS, LOGS, TITLES
from update_docs import ROOT, keep_rows

from peft_ncgeo.files import write_whole
from peft_ncgeo.markdown import escape, table
from peft_ncgeo.protocols import Results

REFERENCE = "balanced_softmax"
ANGLES = ("etf", "minority_margin", "minority_margin_balanced")
INTRODUCTION = """\
# Long tails of an image classifier

Written by `python examples/write_image_tail.py`; all accuracies are percentages.

The demo's ViT (0.8 million parameters, pre-trained on drawings alone) on Fashion-MNIST: 200 photographs of the largest
class, 20, 4 and 2 of the smallest (IF 10, 50, 100). The seed draws which class gets which count. Rows are
`adapter_method`: LoRA, AdaptFormer or prompts, and a loss, a head or a way to align.

- **all, many, medium, few**: 2,000 test photographs, all classes and thirds of them by number of training images.
- **alignment**: mean cosine of a class's weight and its centred mean. **NC1**: spread inside classes against spread
  between them; both on test photographs.
- **trained numbers**: how many values the training changes, those of the head too. **seconds**: of the training alone.

`lift` has LIFT's parts: cosine head, logit adjustment and, where the search took them, test views; its head starts at
random, since this ViT reads no texts. `spa_` rows are space alignment, `etf` and `minority_margin` fixed prototypes
under the supervised contrastive loss, `minority_margin_balanced` the same prototypes under balanced softmax. `budget`
is ours: logit adjustment with image features held near the frozen ViT's by a transport budget.

This shows one small model on ten classes of small photographs.
"""
WIDER = """\
Does it help to give rare classes wider angles (`minority_margin`), beside an ordinary head under a balanced loss on
the same tower with the same number of runs? Differences of the fixed prototypes from that head:"""
NOTE = "Same setting and seed, mean and 95 % t interval over the seeds. An interval without 0 is a clear difference."


def adapter_of(method: str) -> str:
    return method.partition("_")[0]


def differences(results: Results, columns: Sequence[str], methods: Sequence[str] | None = None) -> list[str]:
    """Return tables of differences from balanced softmax under the same adapter, for all methods or for some."""
    tables = []
    for adapter in dict.fromkeys(adapter_of(row["method"]) for row in results.rows):
        reference = f"{adapter}_{REFERENCE}"
        names = {row["method"] for row in results.rows if adapter_of(row["method"]) == adapter}
        if methods is not None:
            names &= {f"{adapter}_{method}" for method in (REFERENCE, *methods)}
        if reference in names and len(names) > 1:
            rows = [row for row in results.rows if row["method"] in names]
            chosen = Results(rows, results.columns, "", results.titles, results.digits)
            tables += [chosen.paired_differences(column, reference) for column in columns]
    return tables


def choices(folder: Path) -> str:
    """Return a table of what each search chose, by accuracy on validation photographs."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        log = json.loads(path.read_text())
        chosen = log["runs"][log["chosen"]["run"] - 1]
        changes = ", ".join(f"{key} {value}" for key, value in chosen["changes"].items()) or "start"
        spent = sum(run["cpu_seconds"] for run in log["runs"]) / 3600
        validation = f"{chosen['validation']:.1f}"
        lines.append([escape(log["method"]), str(len(log["runs"])), f"{spent:.2f}", escape(changes), validation])
    return table(["method", "runs", "CPU hours", "choice", "validation"], lines) if lines else ""


def page(results: Results, search: str) -> str:
    """Return the page: accuracies, paired differences, the question of wider angles, choices and all columns."""
    parts = [INTRODUCTION, "## All classes", results.pivot("all"), "## Few", results.pivot("few")]
    parts += [f"## Differences from {REFERENCE}", NOTE, *differences(results, ["all"])]
    if wider := differences(results, ["all", "few"], ANGLES):
        parts += ["## Wider angles for rare classes", WIDER, *wider]
    if search:
        told = "The mean validation accuracy at IF 10 and IF 100 decides, on a tail of another seed; every method has "
        parts += ["## How the settings were chosen", f"{told}the same number of runs.", search]
    spent = sum(row.get("cpu_seconds") or 0 for row in results.rows) / 3600
    cost = f" {spent:.1f} CPU hours." if spent else ""
    return "\n\n".join([*parts, "## All columns", results.markdown(), f"{results.note}{cost}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "image_tail", help="folder of the run")
    parser.add_argument("--kept", type=Path, default=ROOT / "examples" / "results", help="folder of kept results")
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of the searches' logs")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results" / "image_tail.md")
    args = parser.parse_args()
    path = args.kept / "image_tail_demo.json"
    if (args.outputs / "results.json").exists():
        keep_rows(args.outputs, path, ("setting", "method", "seed", *COLUMNS, "cpu_seconds"))
    if not path.exists():
        parser.error(f"there is neither a run in {args.outputs} nor {path}; run benchmark_image_tail.py first.")
    content = json.loads(path.read_text())
    results = Results(content["rows"], COLUMNS, content["note"], TITLES, DIGITS)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.page, page(results, choices(args.logs)))
    print(f"{args.page} is written.")


if __name__ == "__main__":
    main()
