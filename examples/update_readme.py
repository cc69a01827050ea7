"""Write the tables of the last runs into README.md and keep their numbers in the repository.

python examples/train_prompt_ot.py && python examples/compare_transport.py && python examples/update_readme.py
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLES = {"demo": "prompt_ot", "transport": "compare_transport"}  # mark in README -> folder of the run


def write_table(text: str, mark: str, table: str) -> str:
    """`text` with `table` between the comments `<!-- mark table -->` and `<!-- end of mark table -->`."""
    start, end = f"<!-- {mark} table -->", f"<!-- end of {mark} table -->"
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"README lacks the marks {start} and {end}.")
    return f"{before}{start}\n{table}{end}{after}"


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


if __name__ == "__main__":
    main()
