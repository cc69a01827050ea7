"""Try everything on every model: python -m tests.models.survey [part of a name ...] > a table in build/.

make models
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import transformers

from .outcomes import outcome
from .tries import TRIES, specs

BUILD = Path(__file__).parents[3] / "build"


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning)
    transformers.logging.set_verbosity_error()
    wanted, rows = [part.lower() for part in sys.argv[1:]], []
    for spec in specs():
        if wanted and not any(part in spec.name.lower() for part in wanted):
            continue
        for name, (run, kinds) in TRIES.items():
            if spec.kind in kinds:
                start = time.time()
                status, message = outcome(lambda run=run, spec=spec: run(spec))
                row = {"model": spec.name, "kind": spec.kind, "test": name, "status": status, "message": message}
                rows.append({**row, "seconds": round(time.time() - start, 1)})
                print(f"{spec.name:55.55s} {name:18s} {status:8s} {message[:230]}", flush=True)
    BUILD.mkdir(exist_ok=True)
    (BUILD / "models.json").write_text(json.dumps(rows, indent=1) + "\n")
    found = {(row["model"], row["test"]): row["status"] for row in rows}
    lines = [f"| model | {' | '.join(TRIES)} |", "|---" * (1 + len(TRIES)) + "|"]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines.append(f"| {model} | {' | '.join(found.get((model, name), '') for name in TRIES)} |")
    (BUILD / "models.md").write_text("\n".join(lines) + "\n")
    raise SystemExit(any(status in ("WRONG", "CRASH") for status in found.values()))


if __name__ == "__main__":
    main()
