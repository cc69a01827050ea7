"""Two processes against one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .rows import Row, limited
from .trainings import distance, prompts, seeded, train

SCRIPT = Path(__file__).parents[1] / "check_gpu.py"
STEPS = 3
# before `check_gpu.py` keeps one GPU for itself
ENVIRONMENT, GPUS = dict(os.environ), torch.cuda.device_count()


def check_processes(device: torch.device) -> Iterator[Row]:
    """Train on two processes and on one; where there are no two GPUs, say so."""
    check = "two processes against one: prompts and transport under a budget"
    if device.type == "cuda" and GPUS < 2:
        yield Row(check, "not run: one GPU")
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(SCRIPT), "--device", device.type, "--train_to", f"{folder}/weights.pt"]
        environment = ENVIRONMENT | ({"ACCELERATE_USE_CPU": "true"} if device.type == "cpu" else {})
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        two = torch.load(f"{folder}/weights.pt")
    yield limited(check, distance(two, train_alone(device)), 1e-3, "of the change's norm")


def train_alone(device: torch.device) -> Tensor:
    """Return the change of the weights by the training that two processes share."""
    return train(device, seeded(prompts), max_steps=STEPS)[1]


def train_to(device: torch.device, path: Path) -> None:
    """Train as one of several processes; the first one writes the change of the weights."""
    trainer, change = train(device, seeded(prompts), max_steps=STEPS, per_device_train_batch_size=15)
    if trainer.args.should_save:
        torch.save(change, path)
