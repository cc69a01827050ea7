"""A protocol on several processes, twice: what each of them returns, as a file."""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
import warnings
import weakref
from pathlib import Path

import torch.distributed as dist

from peft_ncgeo import GeometryTrainingArguments
from peft_ncgeo.protocols import base_to_new

from ..conftest import tiny_clip, tiny_images, tiny_processor
from .test_protocols import COOP, SIX


def process_group_threads() -> int:
    """Count the threads of Gloo in this process (0 where the system does not name threads)."""
    return sum(comm.read_text().startswith("pt_gloo") for comm in Path("/proc/self/task").glob("*/comm"))


if __name__ == "__main__":
    warnings.simplefilter("ignore", UserWarning)
    folder = sys.argv[1]
    # what was registered first is called last
    note = Path(folder, f"group-{os.environ['RANK']}")
    atexit.register(lambda: note.write_text(f"{dist.is_initialized()} {process_group_threads()}"))
    arguments = [weakref.ref(GeometryTrainingArguments(output_dir=folder, report_to="none")) for _ in range(5)]
    gc.collect()
    Path(folder, f"kept-{os.environ['RANK']}").write_text(str(sum(one() is not None for one in arguments)))
    images = tiny_images(60, SIX)
    tails = {"flat": {"tau": 1.0, "n_max": 4}}
    rank = int(os.environ["RANK"])
    for time in ("first", "again"):
        results = base_to_new([COOP], images, images, tiny_clip, tiny_processor(), folder, tails=tails, seeds=(1, 2))
        Path(folder, f"{time}-{rank}.json").write_text(json.dumps(results.rows))
        dist.barrier()
        if rank == 0 and time == "first":  # then one cell is read, and one is made by both alike
            Path(folder, "cells").write_text(str(len(list(Path(folder, "flat").rglob("seed-*.json")))))
            Path(folder, "flat", "coop", "seed-2.json").unlink()
        dist.barrier()
