"""Check of this package on a GPU: losses, half precision, waits of the host, compilation, memory, speed, processes.

    python benchmarks/check_gpu.py --output gpu.json    on the first GPU, in under six minutes
    python benchmarks/check_gpu.py --device cpu         the same, small: what the tests run

Nothing but the installed package is needed: the images are the built-in ones, larger models have random weights. It
prints a Markdown table, and ends with exit code 1 where a check failed, whose names it says. Rows without a verdict
only tell a number, or why there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import accelerate
import peft
import torch
import transformers
from gpu_checks.losses import check_losses
from gpu_checks.processes import check_processes, train_to
from gpu_checks.rows import Row, markdown
from gpu_checks.steps import check_compile, check_precision, check_waits
from gpu_checks.towers import check_memory, check_speed

from peft_ncgeo.files import write_whole

CHECKS: dict[str, Callable[[torch.device], Iterator[Row]]] = {
    "losses": check_losses,
    "precision": check_precision,
    "waits": check_waits,
    "compile": check_compile,
    "memory": check_memory,
    "speed": check_speed,
    "processes": check_processes,
}


def rows_of(name: str, device: torch.device) -> list[Row]:
    """Run a check; an error is a row that failed, so that the other checks still run."""
    rows, start = [], time.perf_counter()
    try:
        for row in CHECKS[name](device):
            row.seconds, start = time.perf_counter() - start, time.perf_counter()
            rows.append(row)
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        notes = traceback.format_exc()
        rows.append(Row(f"{name}: error", message[:200], "none", False, time.perf_counter() - start, notes))
    return rows


def where(device: torch.device) -> str:
    name = f"CPU ({platform.machine()})"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    versions = {"torch": torch, "transformers": transformers, "peft": peft, "accelerate": accelerate}
    found = ", ".join(f"{package} {module.__version__}" for package, module in versions.items())
    return f"{name}; Python {platform.python_version()}, {found}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--output", type=Path, help="JSON file for the rows, with places and tracebacks")
    parser.add_argument("--train_to", type=Path, help=argparse.SUPPRESS)  # one of two processes of the last check
    args = parser.parse_args()
    if args.device == "cuda" and args.train_to is None:  # the trainer asks for one GPU a process
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu runs the checks small.")
    device = torch.device(args.device)
    warnings.filterwarnings("ignore", category=UserWarning)  # of what tiny batches and towers cannot do
    transformers.logging.set_verbosity_error()
    if args.train_to is not None:
        train_to(device, args.train_to)
        return
    rows = []
    for name in args.checks:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += rows_of(name, device)
    print(f"{markdown(rows)}\n\n{where(device)}")
    failed = [row.check for row in rows if row.good is False]
    if args.output is not None:
        report = {"device": where(device), "failed": failed, "rows": [asdict(row) for row in rows]}
        write_whole(args.output, json.dumps(report, indent=2) + "\n")
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")  # exit code 1


if __name__ == "__main__":
    main()
