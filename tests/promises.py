"""The table of promises in docs/reliability.md: what each comes to in the last run of all tests.

make promises   # runs the tests with coverage and 25 kills a training, and writes the table
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """One test of a run: where it stands, its name, how it ended and what it noted."""

    file: str
    name: str
    outcome: str
    notes: dict[str, list[float]] = field(default_factory=dict)


def read_tests(report: Path) -> list[Case]:
    """The tests of pytest's JUnit file."""
    tests = []
    for case in ElementTree.parse(report).iter("testcase"):
        parts = str(case.get("classname")).split(".")
        stop = next((i for i, part in enumerate(parts) if part.startswith("test_")), len(parts) - 1)
        outcome = next((part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed")
        if outcome == "skipped" and "xfail" in str(case.find("skipped").get("type")):  # type: ignore[union-attr]
            outcome = "not applicable"
        notes: dict[str, list[float]] = {}
        for note in case.iter("property"):
            notes.setdefault(str(note.get("name")), []).append(float(str(note.get("value"))))
        name = "::".join([*parts[stop + 1 :], str(case.get("name"))])
        tests.append(Case("/".join(parts[: stop + 1]) + ".py", name, outcome, notes))
    return tests


def noted(tests: Sequence[Case], name: str) -> list[float]:
    return [value for test in tests for value in test.notes.get(name, [])]


def counted(tests: Sequence[Case]) -> str:
    return f"{sum(test.outcome == 'passed' for test in tests):,} tests"


def processes(tests: Sequence[Case]) -> str:
    runs = {test.name.split("[")[1].rpartition("-")[0] for test in tests if "several_processes_equal_one" in test.name}
    worst = max(noted(tests, "difference"))
    return f"{len(runs)} trainings; gradients differ by {worst:.0e} of their largest entry at most"


def interruptions(tests: Sequence[Case]) -> str:
    kills, half = sum(noted(tests, "kills")), sum(noted(tests, "half written"))
    return f"{kills:.0f} kills, {half:.0f} of them with a checkpoint half written; equal to the last bit"


def peft_suite(tests: Sequence[Case]) -> str:
    ends = Counter(test.outcome for test in tests)
    return f"{ends['passed']:,} pass, {ends['not applicable']:,} cannot apply, each with its reason"


def bad_input(tests: Sequence[Case]) -> str:
    return f"{sum(noted(tests, 'cases')):,.0f} made-up cases"


def references(tests: Sequence[Case]) -> str:
    stored = json.loads((ROOT / "tests" / "references" / "reference_values.json").read_text())
    return f"{len(stored)} values and gradients, to a millionth"


@dataclass(frozen=True)
class Promise:
    """A promise to users, the folders and files of the tests that hold it, and a summary of their results."""

    says: str
    held_by: tuple[str, ...]
    figure: Callable[[Sequence[Case]], str] = counted


PROMISES = [
    Promise(
        "Losses and geometry are the papers' formulas, recomputed in float64 by other code.",
        ("tests/papers", "tests/geometry", "tests/losses"),
    ),
    Promise("Losses give the same numbers in each release.", ("tests/references",), references),
    Promise(
        "Adapters, classifiers, checkpoints and recipes that 0.1.0 wrote can be loaded, and give the same results.",
        ("tests/old_files",),
    ),
    Promise(
        "Two and three processes give the result of one, for every loss and callback: also if the last batch cannot "
        "be divided equally, and if only one process sees a class.",
        ("tests/training/test_processes.py",),
        processes,
    ),
    Promise(
        "A training that is killed and resumed ends with the same weights; checkpoints that are incomplete, also "
        "after a full disk, are skipped.",
        ("tests/training/state/test_interruptions.py",),
        interruptions,
    ),
    Promise(
        "Eight threads on one classifier or one prompted model get what one thread gets.",
        ("tests/classifiers/test_threads.py",),
    ),
    Promise(
        "Packed texts have the features and gradients of padded ones.",
        ("tests/models/test_text_packing.py", "tests/models/test_packing_memory.py"),
    ),
    Promise(
        "Values that are kept (features, weights in half precision) equal values that are computed again.",
        tuple(f"tests/training/features/test_{name}.py" for name in ("step_features", "half_weights")),
    ),
    Promise(
        "Methods behave as PEFT's own do: PEFT's test-suite.", ("tests/contracts/test_peft_suite.py",), peft_suite
    ),
    Promise(
        "A pushed adapter is loaded as it was, by every way of loading, and nothing else is published.", ("tests/hub",)
    ),
    Promise(
        "Bad input, damaged files included, gets one line that names it; never a wrong number.",
        ("tests/properties",),
        bad_input,
    ),
]


def find(tests: Sequence[Case], places: Sequence[str]) -> list[Case]:
    """The tests in these files and folders.

    Raises:
        ValueError: there are none, or one of them failed.
    """
    found = [
        test for test in tests if any(test.file == place or test.file.startswith(f"{place}/") for place in places)
    ]
    failed = [f"{test.file}::{test.name}" for test in found if test.outcome in ("failure", "error")]
    if failed or not found:
        raise ValueError(f"{', '.join(places)}: {'no tests' if not found else 'failed: ' + ', '.join(failed)}.")
    return found


def table(tests: Sequence[Case], covered: float, import_ratio: float) -> str:
    """The table in Markdown, from a run's tests, the percentage of lines and branches run, and the cost of import."""
    lines = ["| promise | tests | in the last run |", "| --- | --- | --- |"]
    for promise in PROMISES:
        places = ", ".join(f"`{place.removeprefix('tests/')}`" for place in promise.held_by)
        lines.append(f"| {promise.says} | {places} | {promise.figure(find(tests, promise.held_by))} |")
    run = f"{counted(tests)}, {covered:.1f} % of lines and branches"
    lines.append(
        f"| Everything is tested, error paths included, and strictly typed. | `make coverage quality` | {run} |"
    )
    lines.append(
        "| Registering the methods costs little beside PEFT and Transformers' CLIP. | `test_house.py`, "
        f"`examples/benchmark_import.py` | {import_ratio:.2f} of their import time |"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--reports",
        type=Path,
        nargs="+",
        default=[ROOT / "build" / "tests.xml"],
        help="pytest's JUnit files; of a test that was run again the last one counts",
    )
    parser.add_argument("--coverage", type=Path, default=ROOT / "build" / "coverage.json")
    parser.add_argument("--import_times", type=Path, default=ROOT / "build" / "import.txt")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reliability.md")
    args = parser.parse_args()
    covered = json.loads(args.coverage.read_text())["totals"]["percent_covered"]
    (ratio,) = re.findall(r"([\d.]+)\s+ratio", args.import_times.read_text())
    tests = {(test.file, test.name): test for report in args.reports for test in read_tests(report)}
    text = table(list(tests.values()), covered, float(ratio))
    before, after = (f"<!-- {mark}promises table -->" for mark in ("", "end of "))
    head, rest = args.page.read_text().split(before)
    args.page.write_text(f"{head}{before}\n{text}{after}{rest.split(after)[1]}")


if __name__ == "__main__":
    main()
