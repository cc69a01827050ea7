"""Write the table of the demo's last run into README.md and keep its numbers in the repository.

python examples/train_prompt_ot.py && python examples/update_readme.py
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- demo table -->", "<!-- end of demo table -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "outputs" / "prompt_ot", help="folder of the run")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args()
    before, _, rest = args.readme.read_text().partition(START)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{args.readme} lacks the marks {START} and {END}.")
    table = (args.results / "results.md").read_text()
    args.readme.write_text(f"{before}{START}\n{table}{END}{after}")
    kept = ROOT / "examples" / "results"
    kept.mkdir(exist_ok=True)
    shutil.copy(args.results / "results.json", kept / "prompt_ot_demo.json")


if __name__ == "__main__":
    main()
