"""CPU time of `import peft_ncgeo`, compared with importing PEFT and Transformers' CLIP.

    python examples/benchmark_import.py

Each import runs in a new process. The imports take turns; the output shows medians over the rounds, minus the time of
a process that imports nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from statistics import median

NOTHING = "pass"
HOST = "import peft; from transformers import CLIPModel, CLIPProcessor"
PLUGIN = "import peft_ncgeo"


def cpu_seconds(code: str) -> float:
    """Return user and system time of a new process that runs the code."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    seconds = {code: [] for code in (NOTHING, HOST, PLUGIN)}
    for _ in range(rounds + 1):  # the first round, left out below, compiles bytecode and reads files from disk
        for code, times in seconds.items():
            times.append(cpu_seconds(code))
    medians = {code: median(times[1:]) for code, times in seconds.items()}
    for code in (HOST, PLUGIN):
        print(f"{medians[code] - medians[NOTHING]:6.2f} s  {code}")
    print(f"{(medians[PLUGIN] - medians[NOTHING]) / (medians[HOST] - medians[NOTHING]):6.2f}    ratio")


if __name__ == "__main__":
    main()
