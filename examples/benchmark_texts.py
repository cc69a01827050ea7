"""Class texts in pieces and shared by processes: memory, time and operations, on the text tower of ViT-B/16.

    python examples/benchmark_texts.py                  # 1,000 and 4,000 classes, a few minutes on one thread
    python examples/benchmark_texts.py --classes 21841  # only the memory, for this number of classes

Weights are random. Each measurement of memory runs a forward and a backward pass in its own process, with
`MALLOC_MMAP_THRESHOLD_=65536`, so that the C library returns freed memory. Times are measured without this variable;
they are medians of passes that take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from peft_ncgeo import NPTConfig
from peft_ncgeo.models import encode_texts
from peft_ncgeo.training.features.text_share import deal

BOS, EOT = 49406, 49407
CONTEXT = [BOS, 320, 1125, 539, 320]  # "a photo of a"


def tuned() -> Any:
    """Return CLIP with the text tower of ViT-B/16, a small image tower, and prompts in all text layers."""
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"eos_token_id": EOT}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=512)
    prompts = NPTConfig(num_text_tokens=4, text_depth=12, text_init=CONTEXT[1:])
    return get_peft_model(transformers.CLIPModel(config), prompts).train()


def texts(classes: int) -> torch.Tensor:
    """Token ids (K, L) of names of one to five tokens and a full stop in a template."""
    draws = random.Random(0)
    rows = []
    for _ in range(classes):
        name = [draws.randrange(1000, 40000) for _ in range(draws.choice((1, 2, 2, 3, 3, 4, 5)))]
        rows.append([*CONTEXT, *name, 269, EOT])
    length = max(map(len, rows))
    return torch.tensor([row + [EOT] * (length - len(row)) for row in rows])


def step(model: Any, ids: torch.Tensor, batch_size: int | None) -> None:
    model.zero_grad()
    encode_texts(model, ids, batch_size=batch_size).square().sum().backward()


def memory(classes: int, batch_size: int | None) -> dict[str, float]:
    """Return the peak above the model, in MiB, and the seconds of a pass."""
    model, ids = tuned(), texts(classes)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    step(model, ids, batch_size)
    seconds = time.perf_counter() - start
    return {"MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "seconds": seconds}


def in_a_process(classes: int, batch_size: int | None) -> dict[str, float]:
    command = [sys.executable, __file__, "--inside", str(classes), str(batch_size or 0)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def times(classes: int, repeats: int) -> float:
    """Return the CPU time in pieces of the default size, divided by that in one piece, as medians over turns."""
    model, ids = tuned(), texts(classes)
    seconds: dict[int | None, list[float]] = {classes: [], None: []}
    for round_ in range(repeats + 1):
        for batch_size in seconds:
            start = time.process_time()
            step(model, ids, batch_size)
            if round_:  # the first round, which prepares the texts, is not counted
                seconds[batch_size].append(time.process_time() - start)
    return statistics.median(seconds[None]) / statistics.median(seconds[classes])


def operations(classes: int, processes: int) -> float:
    """Return the operations of the busiest of several processes, divided by an even share of all."""
    model, ids = tuned(), texts(classes)
    lengths = ((ids == EOT).int().argmax(1) + 1).tolist()

    def count(rows: torch.Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            step(model, rows, len(rows))
        return counter.get_total_flops()

    return processes * max(count(ids[share]) for share in deal(lengths, processes)) / count(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", help="measure only memory, for these numbers of classes")
    parser.add_argument("--repeats", type=int, default=5, help="number of timed passes of each kind")
    parser.add_argument("--inside", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.inside:
        print(json.dumps(memory(args.inside[0], args.inside[1] or None)))
        return
    print(
        "| classes | pieces | peak above the model, MiB | KiB a class | seconds |\n|---|---|---|---|---|", flush=True
    )
    for classes in args.classes or (1000, 4000):
        for title, batch_size in {"one": classes, "as chosen": None}.items():
            if title == "one" and classes > 1000:
                continue  # gigabytes
            found = in_a_process(classes, batch_size)
            each = 1024 * found["MiB"] / classes
            print(f"| {classes:,} | {title} | {found['MiB']:.0f} | {each:.0f} | {found['seconds']:.1f} |", flush=True)
    if args.classes:
        return
    print(f"\nPieces take {times(1000, args.repeats):.2f} of the time of one piece at 1,000 classes.", flush=True)
    for processes in (2, 4):
        share = operations(1000, processes)
        print(f"The busiest of {processes} processes has {share:.3f} of an even share of the operations.", flush=True)
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} thread(s).")


if __name__ == "__main__":
    main()
