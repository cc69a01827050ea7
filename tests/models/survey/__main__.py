"""Try everything on every model: python -m tests.models.survey [part of a name ...]

The results, those of some models or of all, are written into results.json beside this file, and as a page in docs.
timm's models are tried where timm can be imported, or has been fetched; elsewhere their rows stay as they are.
"""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec

import transformers

from ..fetch_timm import FOLDER, run
from .outcomes import outcome
from .table import PAGE, short, write_results
from .tries import TRIES, specs


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning)
    transformers.logging.set_verbosity_error()
    wanted, found, wrong = [part.lower() for part in sys.argv[1:]], {}, []
    for spec in specs():
        if wanted and not any(part in spec.name.lower() for part in wanted):
            continue
        ends = {}
        for name, (attempt, kinds) in TRIES.items():
            if spec.kind in kinds:
                status, message = outcome(lambda attempt=attempt, spec=spec: attempt(spec))
                print(f"{spec.name:55.55s} {name:18s} {status:8s} {message[:230]}", flush=True)
                ends[name] = short(status, message)
                wrong += [(spec.name, name)] if status in ("WRONG", "CRASH") else []
        found[spec.name] = {"kind": spec.kind, "tries": ends}
    if wrong:
        raise SystemExit(f"{len(wrong)} tries are wrong or crash, so nothing is written: {wrong}")
    write_results(found, [spec.name for spec in specs()])
    counted = [end for row in found.values() for end in row["tries"].values()]
    print(f"{counted.count('works')} of {len(counted)} work, {counted.count('n/a')} do not apply, the rest is refused")
    print(PAGE)
    if not wanted and find_spec("timm") is None and FOLDER.exists():
        result = run("import sys; sys.argv[1:] = ['Timm']; from tests.models.survey.__main__ import main; main()")
        print(result.stdout, result.stderr[-2000:] if result.returncode else "")
        raise SystemExit(result.returncode)


if __name__ == "__main__":
    main()
