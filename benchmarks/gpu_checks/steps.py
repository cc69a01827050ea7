"""Steps in half precision and of compiled models, and how often the host waits in a step."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from peft_ncgeo.models.adapters import unwrap

from .rows import Row, limited
from .trainings import TRAININGS, distance, lora, prompts, seeded, train
from .watch import Watch

# of the change of the weights in one step, as a share of its norm
STEP_LIMITS = {"bf16": 0.1, "fp16": 0.03}
COMPILED = 0.01  # of six steps
AGAINST_CPU = 0.02  # convolutions use TF32 unless told not to
SCALE = 2.0**10  # of gradients in fp16: the scaler's own start would leave the first steps out


def check_precision(device: torch.device) -> Iterator[Row]:
    """Compare one optimiser step in half precision with one in float32, and float32 with the CPU's."""
    for name, make in TRAININGS.items():
        build = partial(seeded, make)
        expected = train(device, build())[1]
        if device.type != "cpu":
            on_cpu = train(torch.device("cpu"), build())[1]
            yield limited(
                f"step in fp32 against the CPU: {name}", distance(expected, on_cpu), AGAINST_CPU, "of its norm"
            )
        for half, limit in STEP_LIMITS.items():
            check = f"step in {half} against fp32: {name}"
            if half == "fp16" and device.type == "cpu":
                yield Row(check, "not on a CPU")
                continue
            value = distance(train(device, build(), SCALE, **{half: True})[1], expected)
            yield limited(check, value, limit, "of its norm")
    if device.type == "cpu":
        return
    last = [
        train(device, seeded(prompts), max_steps=10, **half)[0].state.log_history[-2]["loss"]
        for half in ({}, {"fp16": True})
    ]
    value = abs(last[1] / last[0] - 1)
    yield limited("loss after ten steps in fp16, scaler as it starts, against fp32", value, 0.1, "of the loss")


OWN_WAITS = {"prompts and transport under a budget": 3, "LoRA": 1, "image classifier": 1}


def check_waits(device: torch.device) -> Iterator[Row]:
    """Count the places in a step where the host waits for the device: one of ours, and two for exact transport."""
    for name, make in TRAININGS.items():
        check = f"waits of the host in a step: {name}"
        if device.type == "cpu":
            yield Row(check, "nothing to wait for on a CPU")
            continue
        watch = Watch(device, count_waits=True)
        train(device, seeded(make) | {"callbacks": [watch]}, max_steps=5, logging_steps=100)
        most = max(watch.waits, key=len)
        own, limit = sum(place.startswith("ours") for place in most), OWN_WAITS[name]
        result = f"{own} of ours, {len(most) - own} of other packages"
        yield Row(check, result, f"at most {limit} of ours", own <= limit, notes=dict(Counter(most)))


def check_compile(device: torch.device) -> Iterator[Row]:
    """Compare steps with `torch_compile` with eager ones: change of the weights, text tokens, and time."""
    small = device.type == "cpu"
    backend = "aot_eager" if small else "inductor"  # the first needs no compiler
    models = {"prompts and transport under a budget": prompts} | ({} if small else {"LoRA": lora})
    for name, make in models.items():
        changes, tokens, seconds = [], [], []
        for options in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
            torch.compiler.reset()
            watch, parts = Watch(device), seeded(make)
            norm = note_tokens(parts["model"])
            changes.append(train(device, parts | {"callbacks": [watch]}, max_steps=6, **options)[1])
            tokens.append(norm.tokens)
            seconds.append(statistics.median(watch.seconds[1:]))
        yield limited(
            f"compiled steps against eager: {name}", distance(changes[1], changes[0]), COMPILED, "of their norm"
        )
        packed = "packed as without" if tokens[0] == tokens[1] else f"padded: {tokens[1]} text tokens for {tokens[0]}"
        yield Row(f"texts of compiled steps: {name}", f"{packed}; {seconds[0] / seconds[1]:.2f}x the speed of eager")


def note_tokens(model: PeftModel) -> Any:
    """Return the text tower's last layer norm, which notes the number of tokens of its last pass as `tokens`."""
    norm = unwrap(model).text_model.final_layer_norm

    def note(module: Any, args: tuple[Tensor, ...]) -> None:
        # an attribute, only written: a list that grows would have the graph compiled anew in every step
        module.tokens = args[0].shape[0] * args[0].shape[1]

    norm.register_forward_pre_hook(note)
    return norm
