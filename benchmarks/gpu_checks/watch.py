"""Costs of each training step: seconds, memory, and waits of the host for the device."""

from __future__ import annotations

import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import peft_ncgeo

PACKAGE = str(Path(peft_ncgeo.__file__).parent)


class Watch(TrainerCallback):
    """Notes what each step from the third on costs: seconds, memory, and places where the host waited."""

    def __init__(self, device: torch.device, count_waits: bool = False) -> None:
        self.on_gpu, self.count_waits = device.type == "cuda", count_waits and device.type == "cuda"
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self.waits: list[list[str]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < 2:
            return
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        if self.count_waits:
            self.waits.append([])
            self.recording = warnings.catch_warnings()
            self.recording.__enter__()
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = self.note
            torch.cuda.set_sync_debug_mode("warn")
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < 3:
            return
        if self.count_waits:
            torch.cuda.set_sync_debug_mode("default")
            self.recording.__exit__(None, None, None)
        if self.on_gpu:
            torch.cuda.synchronize()
            self.bytes.append(torch.cuda.max_memory_allocated() - self.before)
        self.seconds.append(time.perf_counter() - self.start)

    def note(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchroniz" in str(message):
            skipped = "/torch/", __file__, warnings.__file__
            frames = [f for f in traceback.extract_stack() if not any(part in f.filename for part in skipped)]
            place = "/".join(Path(frames[-1].filename).parts[-2:])
            owner = "ours" if frames[-1].filename.startswith(PACKAGE) else "others"
            self.waits[-1].append(f"{owner}: {place}:{frames[-1].lineno}")
