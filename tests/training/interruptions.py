"""Trainings that are killed, in processes of their own: everything that has a state is on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import EarlyStoppingCallback, TrainerCallback

from peft_ncgeo import NPTConfig
from peft_ncgeo.losses import LDAM, ClusterCollapse, OTPreservation, SpaceAlignment
from peft_ncgeo.training import GeometryMonitor, GradientProjection, PromptAveraging, SlerpAlignment
from peft_ncgeo.training.state.checkpoints import why_not_resumable

from ..conftest import tiny_clip, tiny_images
from .runs import lora_vit, ot_and_budget, trainer, weights


def clip_with_dropout() -> Any:
    """So that the random numbers of a resumed training matter."""
    model = tiny_clip()
    for layer in [*model.text_model.encoder.layers, *model.vision_model.encoder.layers]:
        layer.self_attn.dropout = 0.1
    torch.manual_seed(3)
    return get_peft_model(model, NPTConfig.ivlp(text_depth=2, vision_depth=2, text_init=[6, 7, 8, 6]))


CASES: dict[str, Any] = {
    "prompts": lambda: {
        "model": clip_with_dropout(),
        "losses": [*ot_and_budget(), ClusterCollapse(weight=0.25, num_clusters=2), SpaceAlignment(weight=0.1)],
        "callbacks": [PromptAveraging(mean=2, std=2), GradientProjection()],
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "class_balanced_sampling": True,
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "learning_rate": 0.01,
    },
    "head": lambda: {
        "model": lora_vit(),
        "losses": [OTPreservation(budget=0.01, modality="image")],
        "classification_loss": LDAM(max_margin=0.1, reweight_after=0.5),
        "callbacks": [SlerpAlignment(alpha=2e-5), GeometryMonitor(), EarlyStoppingCallback(6)],
        "eval_dataset": tiny_images(10, seed=1),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "save_total_limit": 1,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
    },
}
STEPS = 14


class Killer(TrainerCallback):
    """SIGKILL for this process, or another signal, so many seconds after a step has begun, or has ended.

    Checkpoints are written at the end of steps.
    """

    def __init__(self, step: int, delay: float, at_end: bool, sent: signal.Signals = signal.SIGKILL) -> None:
        self.step, self.delay, self.at_end, self.sent = step, delay, at_end, sent

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.at_end:
            self._kill()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.at_end:
            self._kill()

    def _kill(self) -> None:
        threading.Timer(self.delay, os.kill, (os.getpid(), self.sent)).start()


class FileLimit(TrainerCallback):
    """From the first step on no file can grow beyond so many bytes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_step_begin(self, args, state, control, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def run_limited(case: str, output_dir: str, size: int) -> None:
    """Leaves the first line of the error in a file of its own."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            train(case, output_dir, limit=size)
        except OSError as error:
            Path(output_dir, "error.txt").write_text(str(error)[:size])


def train(
    case: str,
    output_dir: str,
    kill_at: int = -1,
    delay: float = 0.0,
    at_end: bool = False,
    rank: int = 0,
    limit: int | None = None,
    sent: signal.Signals = signal.SIGKILL,
    **arguments: Any,
) -> None:
    """Start a training, or go on with it. What it comes to is written when it has ended."""
    warnings.simplefilter("ignore", UserWarning)
    options = CASES[case]()
    if int(os.environ.get("RANK", 0)) == rank:
        options["callbacks"].append(Killer(kill_at, delay, at_end, sent))
    if limit is not None:
        options["callbacks"].append(FileLimit(limit))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    options["per_device_train_batch_size"] = options.get("per_device_train_batch_size", 8) // processes
    run = trainer(
        output_dir,
        augmentation="crop_flip",
        **{
            "train": tiny_images(30),
            "save_strategy": "steps",
            "save_steps": 2,
            "max_steps": STEPS,
            **options,
            **arguments,
        },
    )
    run.train(
        resume_from_checkpoint=any(not why_not_resumable(folder) for folder in Path(output_dir).glob("checkpoint-*"))
    )
    result = {
        "weights": weights(run.model),
        "state": {f"{own.name}.{key}": v for own in run._stateful() for key, v in own.state_dict().items()},
        "step": run.state.global_step,
        "best": run.state.best_metric,
        "log": [entry for entry in run.state.log_history if "loss" in entry],
    }
    if run.args.should_save:
        torch.save(result, Path(output_dir) / "result.pt")


def train_cut_off(case: str, output_dir: str, cut_at: int, sent: int, timeout: int) -> None:
    """From this step on nothing is heard of process 1. What the other one says of it is left in a file."""
    try:
        train(case, output_dir, cut_at, 0.03, rank=1, sent=signal.Signals(sent), ddp_timeout=timeout)
    except ConnectionError as error:
        Path(output_dir, "error.txt").write_text(str(error))
        raise


def resume_apart(folder: str) -> None:
    """Each process has an output folder of its own, as on machines that share no disk."""
    own = Path(folder, os.environ["RANK"])
    try:
        trainer(own).train(resume_from_checkpoint=True)
    except ValueError as error:
        Path(own, "error.txt").write_text(str(error))


if __name__ == "__main__":  # one process of a machine, started by `accelerate launch --module`
    train(*sys.argv[1:])
