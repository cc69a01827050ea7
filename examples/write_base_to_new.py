"""Write docs/results/base_to_new.md, its figure, and README's table from the last run of benchmark_base_new.py.

python examples/benchmark_base_new.py && python examples/write_base_to_new.py

The numbers of a run are kept in `results/base_to_new_demo.json`; without a run the page is made from that file. How
settings were chosen is read from the logs of search_recipes.py. The runs with prompts also make the table and figures
of docs/results/neural_collapse.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from result_pages import INTERVALS, all_columns, choices, kept_run, lead, page_parser
from update_docs import ROOT, write_table

from peft_ncgeo.files import write_whole
from peft_ncgeo.markdown import table
from peft_ncgeo.plots import plot_relation, plot_settings
from peft_ncgeo.plots.relation import correlations
from peft_ncgeo.protocols import Results

KEPT = ("setting", "method", "seed", "base", "new", "H", "base_other", "new_other", "H_other")
KEPT += ("many", "medium", "few", "kept", "trainable")
GEOMETRY = ("base_text_nc2", "new_text_nc2", "base_nc1", "base_nc3_cosine", "base_modality_gap")
GEOMETRY += ("seconds", "cpu_seconds")
PROMPTS = ("coop", "vpt", "ivlp", "maple", "promptsrc", "prompt_ot", "npt_v1", "npt_v2", "cpt", "budget")
SHOTS, IMAGES = ("tau=1", "tau=0.25", "tau=0.06"), ("IF 10", "IF 50", "IF 100")
HIGHLIGHTED = ("tip_adapter_f", "two_stages", "prompt_ot", "promptsrc", "coop", "clip_lora", "zero-shot")
SCORES = {  # of what a search chose
    "mean": lambda log, chosen: chosen["score"],
    "base validation": lambda log, chosen: chosen["validation"],
    "mean of the choice by validation alone": lambda log, chosen: log["by_validation_alone"]["score"],
}
LABELS = ("NC2 error of the new classes' text features", "accuracy on new classes (%)")
IN_SHORT = {"tau=1": "balanced", "IF 100": "tail, 100 to 1"}  # setting -> column of README's table
TITLES = {
    "kept": "knowledge kept",
    "base_other": "base, other artist",
    "new_other": "new, other artist",
    "H_other": "H, other artist",
    "trainable": "trained numbers",
}
INTRODUCTION = """\
# From base to new classes

This page compares methods that are trained on thirty classes: on other images of these classes, on classes that were
not trained, and on drawings by another artist. `python examples/benchmark_base_new.py` computes the numbers, and
`python examples/write_base_to_new.py` writes the page. All accuracies are percentages.

- **base**: test images of the 30 trained classes, classified among these 30 names. They are other views of the same
  drawings that training showed, so a method that only remembers drawings does well here.
- **new**: images of 30 classes that were not trained, classified among their names. **H**: harmonic mean of base and
  new.
- **other artist**: the model is trained on the drawings of one artist, and tested on the other artist's drawings of
  the same classes. None of these was trained on, so remembering does not help.
- **many, medium, few**: thirds of the base classes by their number of training images.
- **knowledge kept**: accuracy on Fashion-MNIST, photographs that have nothing in common with the training.
- **trained numbers**: how many values the training changes, with the class rows of `two_stages` and `adaptformer`,
  without fitted heads such as Tip-Adapter's. **seconds**: of training and head, on one thread; other programs ran too.

At tau = 1, each base class has 16 images. The numbers fall from 16 to 4 at tau = 0.25, and from 16 to 1 at tau = 0.06.
IF 10, IF 50 and IF 100 are exponential tails: 50 to 5 images, 50 to 1, 100 to 1. The seed decides which class gets
which number. A dash means that the method cannot do this: heads that read no texts do not know new classes.

These are small models, drawings, and thirty classes at a time. The tables say nothing about photographs or large
models.\
"""
OURS = """\
Our method, `{ours}`, minus the best other method of each setting.
[Intervals of 95 %](#differences-from-{ours}) are a stricter test than one standard deviation.\
"""
ALONE = "A model is trained on the drawings of one artist alone. The columns name this artist."
HEADINGS = {
    "H": "H, on other views of the trained drawings",
    "base_other": "Base classes, drawn by the artist who was not trained",
    "new_other": "New classes, drawn by the artist who was not trained",
    "H_other": "H, on drawings by the artist who was not trained",
}
CHOSEN = """\
The search used 60 other concepts and at most twelve runs for each method; some heads have fewer settings. A run trains
twice: on one artist's drawings at tau = 1, and on the other's at IF 50. Its score is the mean H over both trainings,
on drawings of both artists. If a method cannot classify new classes, its score is the mean accuracy on base classes,
over validation images and the other artist's drawings. The run with the highest score is chosen.\
"""


def page(results: Results, ours: str, search: str, figure: str) -> str:
    """Return the page: the figure, H, the other artist, paired differences, choices and all columns."""
    both = [name for name in (*SHOTS, *IMAGES) if name in results.settings]
    alone = [name for name in results.settings if name not in both]
    others = [m for m in dict.fromkeys(row["method"] for row in results.rows) if m != ours]
    parts = [INTRODUCTION, f"![H in every setting]({figure})", "## H", results.pivot("H", both)]
    parts += [OURS.format(ours=ours), lead(results, ours, others, "H", both)]
    if alone:
        parts += ["## Other artist", ALONE]
        for column in ("H", "base_other", "new_other", "H_other"):
            parts += [f"### {HEADINGS[column]}", results.pivot(column, alone)]
            if column in ("H", "H_other"):
                parts.append(lead(results, ours, others, column, alone))
    parts += [f"## Differences from {ours}", INTERVALS, results.paired_differences("H", ours, both)]
    if alone:
        parts.append(results.paired_differences("H_other", ours, alone))
    if search:
        parts += ["## How the settings were chosen", CHOSEN, search]
    return "\n\n".join([*parts, *all_columns(results)]) + "\n"


def in_short(results: Results, methods: Sequence[str]) -> str:
    """Return README's table: H of a few methods, balanced, on a tail, and on drawings of another artist."""
    rows = [row for row in results.rows if row["method"] in methods]
    short = [{**row, "setting": IN_SHORT[row["setting"]]} for row in rows if row["setting"] in IN_SHORT]
    of_artists: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row["setting"].startswith("tau=1, ") and row["H_other"] is not None:
            of_artists.setdefault((row["method"], row["seed"]), []).append(row["H_other"])
    for (method, seed), values in of_artists.items():
        short.append({"setting": "another artist", "method": method, "seed": seed, "H": fmean(values)})
    return Results(short, ["H"]).pivot("H")


def collapse(results: Results, kept: Path) -> str:
    """Draw NC2 of the new classes' texts against their accuracy, over the runs with prompts; return correlations."""
    lines = []
    for part in ("base", "new"):
        for without in ("", "coop"):  # CoOp starts from a random context, so its texts differ from all others
            rows = [row for row in results.rows if row["method"] in PROMPTS and row["method"] != without]
            chosen, nc2 = Results(rows, results.columns), f"{part}_text_nc2"
            if part == "new":
                path = kept / f"{nc2}{without and '_without_' + without}.png"
                found = plot_relation(chosen, nc2, "new", path, *LABELS)
            else:
                found = correlations(chosen, nc2, "new")
            numbers = (f"{found[name]:.2f}" for name in ("pearson", "spearman", "pearson_within"))
            lines.append([f"{part}{without and ', without CoOp'}", f"{found['runs']:.0f}", *numbers])
    return table(["texts of", "runs", "Pearson", "Spearman", "Pearson within settings"], lines)


def main() -> None:
    parser = page_parser(__doc__.splitlines()[0], "base_new", "base_to_new")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md")
    parser.add_argument("--ours", default="lora_budget", help="row that the others are compared with")
    args = parser.parse_args()
    content = kept_run(parser, args, "base_to_new_demo.json", (*KEPT, *GEOMETRY))
    columns = [c for c in (*KEPT[3:], "seconds") if any(row.get(c) is not None for row in content["rows"])]
    results = Results(content["rows"], columns, content["note"], TITLES, {"trainable": 0, "seconds": 0})
    methods = {row["method"] for row in results.rows}
    if args.ours not in methods:
        parser.error(f"the run has no row {args.ours!r}; name one of {sorted(methods)} with --ours.")
    args.page.parent.mkdir(parents=True, exist_ok=True)
    figure = args.page.with_suffix(".png")
    groups = [[name for name in group if name in results.settings] for group in (SHOTS, IMAGES)]
    highlighted = [args.ours, *(name for name in HIGHLIGHTED if name in methods)]
    plot_settings(results, "H", figure, [g for g in groups if g], highlighted, "harmonic mean of base and new (%)")
    write_whole(args.page, page(results, args.ours, choices(args.kept / "search", SCORES), figure.name))
    write_table(args.root, "results", in_short(results, highlighted) + "\n")
    if len({row["method"] for row in results.rows} & {*PROMPTS}) > 1:
        both = [row for row in results.rows if row["setting"] in (*SHOTS, *IMAGES)]
        write_table(args.root, "collapse", collapse(Results(both, results.columns), args.kept) + "\n")
    print(f"{args.page}, {figure} and the table in {args.root / 'README.md'} are written.")


if __name__ == "__main__":
    main()
