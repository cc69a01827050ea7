"""Write docs/results/image_tail.md and its figure from the last run of benchmark_image_tail.py.

python examples/benchmark_image_tail.py && python examples/write_image_tail.py

The run's numbers are kept in `results/image_tail_demo.json`; if there is no run, the page is written from this file.
The logs of search_recipes.py show how the settings were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_image_tail import COLUMNS, DIGITS, LOGS, TITLES
from result_pages import INTERVALS, all_columns, choices, kept_run, lead, page_parser

from peft_ncgeo.files import write_whole
from peft_ncgeo.plots import plot_settings
from peft_ncgeo.protocols import Results

ADAPTERS = ("lora", "adaptformer", "prompts")
METHODS = ("ce", "ldam", "balanced_softmax", "logit_adjustment", "lift", "spa_reg", "spa_slerp", "spa_proj")
METHODS += ("spa_post_hoc", "etf", "minority_margin", "minority_margin_balanced", "budget")
REFERENCE, OURS = "balanced_softmax", "budget"
HIGHLIGHTED = ("lora_spa_post_hoc", "lora_balanced_softmax", "lora_ce", "lora_etf", "lora_minority_margin")
HIGHLIGHTED += ("adaptformer_lift",)
ANGLES = ("etf", "minority_margin", "minority_margin_balanced")
INTRODUCTION = """\
# Long tails of an image classifier

This page compares losses, heads and ways to align on long tails, under LoRA, AdaptFormer and prompts.
`python examples/benchmark_image_tail.py` computes the numbers, and `python examples/write_image_tail.py` writes the
page. All accuracies are percentages.

The model is the demo's ViT (0.8 million parameters, pre-trained on drawings alone), on Fashion-MNIST. The largest
class has 200 photographs, and the smallest has 20, 4 and 2 (IF 10, 50, 100). The seed decides which class gets which
number. A row `lora_ce` has LoRA and the method `ce`, and so on.

The columns:

- **all, many, medium, few**: 2,000 test photographs, all classes and thirds of them by number of training images.
- **alignment**: mean cosine of a class's weight and its centred mean. **NC1**: spread inside classes against spread
  between them; both on test photographs.
- **trained numbers**: how many values the training changes, those of the head too.

The methods:

- `ce`: cross-entropy. `ldam`, `balanced_softmax`, `logit_adjustment`: losses for long tails.
- `lift`: LIFT's parts, which are a cosine head, logit adjustment and, if the search chose them, test views. Its head
  starts at random, because this ViT reads no texts.
- `spa_reg`, `spa_slerp`, `spa_proj`: space alignment during training. `spa_post_hoc`: after training.
- `etf`, `minority_margin`: fixed prototypes under the supervised contrastive loss; in the second, rare classes have
  wider angles. `minority_margin_balanced`: the second one's prototypes under balanced softmax.
- `budget`: ours, logit adjustment under a transport budget, which keeps the image features near those of the frozen
  model.

This shows one small model on ten classes of small photographs."""
WIDER = """\
Do wider angles for rare classes (`minority_margin`) help, compared with an ordinary head under a balanced loss? Tower
and number of runs are the same. The tables show the fixed prototypes minus that head:"""
SCORES = {"validation": lambda log, chosen: chosen["validation"]}  # of what a search chose


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of each setting by adapter and method, in the order of this page; others come last."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    order = [f"{adapter}_{method}" for adapter in ADAPTERS for method in METHODS]
    place = {method: i for i, method in enumerate(order)}
    return sorted(rows, key=lambda row: (settings.index(row["setting"]), place.get(row["method"], len(order))))


def parts_of(row: dict[str, Any]) -> tuple[str, str]:
    """Return a row's adapter and method; its name is `adapter_method`."""
    adapter, _, method = row["method"].partition("_")
    return adapter, method


def by_adapter(results: Results, column: str) -> list[str]:
    """Return a table for each setting: a row for each method, a column for each adapter."""
    parts = []
    for setting in results.settings:
        rows = []
        for row in (row for row in results.rows if row["setting"] == setting):
            adapter, method = parts_of(row)
            rows.append({**row, "setting": adapter, "method": method})
        parts += [f"### {setting}", Results(rows, [column], "", results.titles, results.digits).pivot(column)]
    return parts


def of_ours(results: Results) -> list[str]:
    """Return, for each adapter, the difference of our row from the best other row under any adapter."""
    ours = list(dict.fromkeys(row["method"] for row in results.rows if parts_of(row)[1] == OURS))
    others = list(dict.fromkeys(row["method"] for row in results.rows if parts_of(row)[1] != OURS))
    return [
        f"`{own}` minus the best of the other methods:\n\n{lead(results, own, others, 'all', results.settings)}"
        for own in ours
    ]


def differences(results: Results, columns: Sequence[str], methods: Sequence[str] | None = None) -> list[str]:
    """Return tables of differences from balanced softmax under the same adapter, for all methods or for some."""
    tables = []
    for adapter in dict.fromkeys(parts_of(row)[0] for row in results.rows):
        reference = f"{adapter}_{REFERENCE}"
        names = {row["method"] for row in results.rows if parts_of(row)[0] == adapter}
        if methods is not None:
            names &= {f"{adapter}_{method}" for method in (REFERENCE, *methods)}
        if reference in names and len(names) > 1:
            rows = [row for row in results.rows if row["method"] in names]
            chosen = Results(rows, results.columns, "", results.titles, results.digits)
            tables += [chosen.paired_differences(column, reference) for column in columns]
    return tables


def page(results: Results, search: str, figure: str) -> str:
    """Return the page: accuracies, paired differences, wider angles for rare classes, choices and all columns."""
    parts = [INTRODUCTION, f"![Accuracy on every tail]({figure})", "## All classes", *by_adapter(results, "all")]
    parts += [*of_ours(results), "## The third of the classes with the fewest images", *by_adapter(results, "few")]
    parts += [f"## Differences from {REFERENCE}", INTERVALS, *differences(results, ["all"])]
    if wider := differences(results, ["all", "few"], ANGLES):
        parts += ["## Wider angles for rare classes", WIDER, *wider]
    if search:
        told = "The mean validation accuracy at IF 10 and IF 100 decides, on a tail of another seed; every method has "
        parts += ["## How the settings were chosen", f"{told}the same number of runs.", search]
    return "\n\n".join([*parts, *all_columns(results)]) + "\n"


def main() -> None:
    parser = page_parser(__doc__.splitlines()[0], "image_tail", "image_tail")
    parser.add_argument("--logs", type=Path, default=LOGS, help="folder of the searches' logs")
    args = parser.parse_args()
    content = kept_run(parser, args, "image_tail_demo.json", ("setting", "method", "seed", *COLUMNS, "cpu_seconds"))
    results = Results(in_order(content["rows"]), COLUMNS, content["note"], TITLES, DIGITS)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    figure, names = args.page.with_suffix(".png"), [row["method"] for row in results.rows]
    highlighted = [name for name in (f"lora_{OURS}", *HIGHLIGHTED) if name in names]
    label = "accuracy on all classes (%)"
    plot_settings(results, "all", figure, [results.settings], highlighted, label, name_others=False)
    write_whole(args.page, page(results, choices(args.logs, SCORES), figure.name))
    print(f"{args.page} and {figure} are written.")


if __name__ == "__main__":
    main()
