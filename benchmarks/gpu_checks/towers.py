"""ViT-B/16's towers with random weights: memory by number of classes, and speed against published code."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from peft_ncgeo import GeometryTrainingArguments, NPTConfig
from peft_ncgeo.data import load_demo
from peft_ncgeo.geometry.sphere import cosine_logits
from peft_ncgeo.losses import GeometryBatch, OTPreservation
from peft_ncgeo.models.adapters import adapters_off
from peft_ncgeo.models.image_encoder import encode_images
from peft_ncgeo.models.text_encoder import encode_texts

from .rows import Row
from .trainings import train
from .watch import Watch

MIB = 2**20


def large_clip(vision: CLIPVisionConfig | None = None) -> CLIPModel:
    """Return CLIP with ViT-B/16's towers, random weights and the special tokens of the demo's tokenizer."""
    torch.manual_seed(0)
    own = load_demo(shots=1).model.config.text_config
    special = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text, vision = CLIPTextConfig(**special).to_dict(), (vision or CLIPVisionConfig(patch_size=16)).to_dict()
    return CLIPModel._from_config(CLIPConfig(text_config=text, vision_config=vision)).eval()


def class_names(number: int) -> list[str]:
    """Return different names of one to four words."""
    words = load_demo(shots=1).splits["train"].features["label"].names
    names = []
    for i in range(number):
        name, left = [words[i % len(words)]], i // len(words)
        while left:
            name.append(words[left % len(words)])
            left //= len(words)
        names.append(" ".join(name))
    return names


def check_memory(device: torch.device) -> Iterator[Row]:
    """Measure the peak memory of a step of a ViT-B/16 text tower with prompts in all layers, by number of classes."""
    chunked = "text_batch_size" in {field.name for field in fields(GeometryTrainingArguments)}
    for classes in (100, 1000, 21841) if device.type != "cpu" else (5, 50):
        check = f"memory of text tower, forward and backward, {classes:,} classes"
        names = class_names(classes)
        columns = Features({"image": Image(), "label": ClassLabel(names=names)})
        pictures = [load_demo(shots=1).splits["train"].with_format("arrow")[0]["image"][0].as_py()] * classes
        images = Dataset.from_dict({"image": pictures, "label": list(range(classes))}, features=columns)
        base = load_demo(shots=1).model
        if device.type != "cpu":
            base = large_clip(base.config.vision_config)
        depth = base.config.text_config.num_hidden_layers
        model = get_peft_model(base, NPTConfig.ivlp(text_depth=depth, num_vision_tokens=0, vision_depth=1))
        watch = Watch(device)
        parts = {"model": model, "train_dataset": images, "callbacks": [watch]}
        try:
            train(device, parts, max_steps=4, per_device_train_batch_size=4, logging_steps=100)
        except torch.OutOfMemoryError:
            yield Row(check, "out of memory", good=False if chunked else None)
            continue
        took = f"{statistics.median(watch.seconds):.3g} s"
        if not watch.bytes:
            yield Row(check, f"not measured on a CPU; {took}")
            continue
        limit, most = 1024 + classes / 64, max(watch.bytes) / MIB
        verdict = most <= limit if chunked else None
        yield Row(check, f"{most:,.0f} MiB, {took}", f"at most {limit:,.0f} MiB" if chunked else "", verdict)
        del model, base, parts


def check_speed(device: torch.device) -> Iterator[Row]:
    """Time our steps and those of published code (77 tokens, eager attention, no reuse) in turns."""
    small = device.type == "cpu"
    base, classes, rounds = (load_demo(shots=1).model, 20, 2) if small else (large_clip().to(device), 100, 9)
    config = NPTConfig.prompt_ot(text_depth=3, vision_depth=4) if small else NPTConfig.prompt_ot()
    sides = []
    for attention, pack in (("eager", False), ("sdpa", True)):
        torch.manual_seed(1)
        copy = CLIPModel._from_config(base.config, attn_implementation=attention).to(device)
        copy.load_state_dict(base.state_dict())
        torch.manual_seed(1)
        sides.append(get_peft_model(copy, replace(config, pack_text=pack)).to(device).train())
    texts, labels = class_texts(base, classes), torch.arange(32, device=device) % classes
    short, padded = (ids.to(device) for ids in texts)
    size = base.config.vision_config.image_size
    pixels = torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), adapters_off(sides[1]):
        known = encode_images(sides[1], pixels), encode_texts(sides[1], short)
    term, direction = OTPreservation(weight=1.0).to(device), known[1][0]

    def text_tower(model: PeftModel, ids: Tensor, frozen: Any) -> Tensor:
        return nn.functional.cosine_similarity(encode_texts(model, ids), direction).mean()

    def prompt_ot(model: PeftModel, ids: Tensor, frozen: Any) -> Tensor:
        if frozen is None:
            with torch.no_grad(), adapters_off(model):
                frozen = encode_images(model, pixels), known[1]
        image, text = encode_images(model, pixels), encode_texts(model, ids)
        logits = cosine_logits(image, text, base.logit_scale)
        features = {"image_features": image, "text_features": text, "logits": logits, "labels": labels}
        batch = GeometryBatch(**features, frozen_image_features=frozen[0], frozen_text_features=frozen[1])
        return nn.functional.cross_entropy(logits, labels) + term(batch)

    def step(loss: Callable[..., Tensor], half: bool, *inputs: Any) -> float:
        inputs[0].zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            value = loss(*inputs)
        value.backward()
        return value.item()

    works = {f"text tower, {classes} classes": text_tower, f"Prompt-OT step, {classes} classes, batch 32": prompt_ot}
    for name, loss in works.items():
        for half in (False, True):
            runs = [
                partial(step, loss, half, sides[0], padded, None),
                partial(step, loss, half, sides[1], short, known),
            ]
            values, seconds = [run() for run in runs], [[], []]
            for _ in range(rounds):
                for run, found in zip(runs, seconds, strict=True):
                    found.append(timed(run, device))
            reference, ours = map(statistics.median, seconds)
            result = f"{reference / ours:.1f}x ({1000 * reference:.3g} / {1000 * ours:.3g} ms)"
            difference, limit = abs(values[1] - values[0]), 0.05 if half else 2e-3
            result += f", losses differ by {difference:.1g}"
            name_of = f"{name}, {'bf16' if half else 'fp32'}, against the published step"
            yield Row(name_of, result, f"losses within {limit:g}", difference <= limit)


def class_texts(base: CLIPModel, classes: int) -> tuple[Tensor, Tensor]:
    """Return names of one to six random tokens behind four slots (K, L): cut to the longest, and padded in full."""
    config = base.config.text_config
    rows = torch.randint(
        100, 1000, (classes, config.max_position_embeddings), generator=torch.Generator().manual_seed(0)
    )
    rows[:, 0], rows[:, 1:5] = config.bos_token_id, torch.arange(10, 14)
    ends, places = 6 + torch.arange(classes)[:, None] * 7 % 6, torch.arange(rows.shape[1])
    rows[places == ends], rows[places > ends] = config.eos_token_id, config.pad_token_id
    return rows[:, : int(ends.max()) + 1], rows


def timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
