"""Time and memory of the geometry that `GeometryMonitor` logs, at many classes.

    python examples/benchmark_geometry.py

Features of images and texts are random unit vectors, with two images for each class. Each number of classes runs in
its own process, on one thread. Seconds are CPU time. The peak of memory is that of the process, with and without what
the process held before.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

import torch
from torch.nn import functional as F

from peft_ncgeo.metrics.feature_geometry import FeatureGeometry

BATCH, A_CLASS = 256, 2


def peak() -> float:
    """Return the largest memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(classes: int, dim: int, nc4: bool) -> None:
    """Print a row of the table."""
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(classes, dim, generator=generator))
    geometry, before, start = FeatureGeometry(nc4=nc4), peak(), time.process_time()
    geometry.begin()
    for labels in torch.arange(A_CLASS * classes).remainder(classes).split(BATCH):
        noise = torch.randn(len(labels), dim, generator=generator) / dim**0.5
        geometry.update(text[labels] + noise, labels, classes, reads_text=True)
    collected = time.process_time() - start
    geometry.compute(text)
    computed = time.process_time() - start - collected
    print(f"| {classes:,} | {collected:.1f} | {computed:.1f} | {peak() - before:,.0f} | {peak():,.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 5000, 21841])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--no_nc4", action="store_true", help="leave out NC4, as GeometryMonitor(nc4=False) does")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a row, in this process
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.classes[0], arguments.dim, not arguments.no_nc4)
        return
    print(
        "| classes | s, batches | s, numbers | peak MiB above the start | peak MiB |\n|---|---|---|---|---|",
        flush=True,
    )
    for classes in arguments.classes:
        given = ["--classes", str(classes), "--dim", str(arguments.dim), *["--no_nc4"] * arguments.no_nc4]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        subprocess.run([sys.executable, __file__, "--one", *given], check=True, env=one_thread)


if __name__ == "__main__":
    main()
