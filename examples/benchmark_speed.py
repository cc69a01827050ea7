"""CPU time and memory of this library and of published code, which take turns in one process on one thread.

    python examples/benchmark_speed.py            ViT-B/16 shapes with random weights
    python examples/benchmark_speed.py --quick    the demo's mini-CLIP

Both sides have the same weights, data and losses. The reference pads every text to the tower's full length, uses eager
attention, runs the teacher's image pass in every step through PEFT's `disable_adapter`, and encodes all classes again
for every batch of an evaluation. Under autocast, the reference is our own step without weights cast in advance.
Seconds are CPU time of the process, as medians of rounds in which both sides take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from peft_ncgeo.data import load_demo
from peft_ncgeo.files import write_whole
from peft_ncgeo.geometry.sphere import cosine_logits
from peft_ncgeo.losses import CrossEntropy, GeometryBatch
from peft_ncgeo.models import text_encoder
from peft_ncgeo.models.adapters import adapters_off, unwrap
from peft_ncgeo.models.image_encoder import encode_images
from peft_ncgeo.models.towers import max_text_length
from peft_ncgeo.training import Recipe
from peft_ncgeo.training.features.half_weights import HalfWeights

RECIPES = Path(__file__).parent / "recipes"
PROMPT_OT, COOP, CLIP_LORA = (Recipe.read(RECIPES / f"{name}.yaml") for name in ("prompt_ot", "coop", "clip_lora"))
# Tokens of each name with the full stop. As in ImageNet, a text with [BOS], 4 slots and [EOT] has 9, and 12 at most.
NAME_LENGTHS = (3, 2, 4, 1, 5, 2, 3, 4, 2, 6, 3, 1, 4, 2, 3, 5, 1, 4, 2, 3)
CHUNK = 100  # classes whose activations the reference keeps at a time
ATEN = torch.ops.aten
CPU_ATTENTION = {  # which torch's counter omits
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda *s, **_: sdpa_flop_count(*s[:3]),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda *s, **_: sdpa_backward_flop_count(*s[:4]),
}
CPUINFO, FLAGS = Path("/proc/cpuinfo"), ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass
class Part:
    """Part of a task, and the number of times it runs. Each run is timed; the first one also counts operations."""

    run: Callable[[], Any]
    times: int = 1
    flops: int = 0
    value: Any = None
    seconds: list[float] = field(default_factory=list)

    def once(self) -> None:
        start = time.process_time()
        if self.seconds:
            self.run()
        else:
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                self.value = self.run()
            self.flops = counter.get_total_flops()
        self.seconds.append(time.process_time() - start)


@dataclass
class Work:
    """Task done in two ways; the last part of each way returns a loss."""

    name: str
    reference: list[Part]
    ours: list[Part]
    dtype: torch.dtype = torch.float32  # dtype of our side
    long: bool = False  # True: only a third of the rounds is run


def encode_texts(model: PeftModel, ids: Tensor) -> Tensor:
    return text_encoder.encode_texts(model, ids, batch_size=len(ids))  # in one piece on both sides


def vit_b16() -> CLIPModel:
    torch.manual_seed(0)
    text, vision = CLIPTextConfig(eos_token_id=49407), CLIPVisionConfig(patch_size=16)
    return CLIPModel._from_config(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))


def tuned(base: CLIPModel, recipe: Recipe, dtype: torch.dtype = torch.float32) -> tuple[PeftModel, PeftModel]:
    """Return two copies of the model with the recipe's adapter, without dropout: the reference, and ours."""
    reference, ours = copy.deepcopy(base), copy.deepcopy(base).to(dtype)
    models = []
    for model, attention, pack in ((reference, "eager", False), (ours, "sdpa", True)):
        model.set_attn_implementation(attention)
        torch.manual_seed(1)
        config = recipe.config()
        own = {"pack_text": pack} if hasattr(config, "pack_text") else {"lora_dropout": 0.0}  # masks would differ
        models.append(get_peft_model(model, replace(config, **own)).train())
    return models[0], models[1]


def class_texts(base: CLIPModel, recipe: Recipe, classes: int) -> tuple[Tensor, Tensor]:
    """Return random names behind the recipe's slots (K, L): padded to the tower's length, and cut to the longest."""
    config, slots = base.config.text_config, getattr(recipe.config(), "num_text_tokens", 4)
    rows = torch.randint(100, 1000, (classes, max_text_length(base)), generator=torch.Generator().manual_seed(0))
    rows[:, 0], rows[:, 1 : 1 + slots] = config.bos_token_id, torch.arange(10, 10 + slots)
    ends = torch.tensor([1 + slots + NAME_LENGTHS[k % len(NAME_LENGTHS)] for k in range(classes)])[:, None]
    places = torch.arange(rows.shape[1])
    rows[places == ends], rows[places > ends] = config.eos_token_id, config.pad_token_id
    return rows, rows[:, : int(ends.max()) + 1]


def images(base: CLIPModel, count: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return random pixels (N, 3, H, W) and labels (N,)."""
    size = base.config.vision_config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)), torch.arange(count) % classes


def step(model: PeftModel, loss: Callable[..., Tensor], *inputs: Any) -> float:
    """Run a training step up to the optimiser."""
    model.zero_grad()
    value = loss(model, *inputs)
    value.backward()
    return value.item()


def text_tower(base: CLIPModel, classes: int) -> Work:
    """Return the work of a forward and backward pass through the prompted text tower alone."""
    reference, ours = tuned(base, PROMPT_OT)
    padded, short = class_texts(base, PROMPT_OT, classes)
    direction = torch.randn(base.config.projection_dim, generator=torch.Generator().manual_seed(0))

    def loss(model: PeftModel, ids: Tensor) -> Tensor:
        return F.cosine_similarity(encode_texts(model, ids), direction).mean()

    name = f"text tower, forward and backward, {classes} classes"
    return Work(name, [Part(partial(step, reference, loss, padded))], [Part(partial(step, ours, loss, short))])


def prompt_ot(base: CLIPModel, classes: int, dtype: torch.dtype = torch.float32) -> Work:
    """Return the work of a Prompt-OT step, batch 4, on fixed image views. Both sides know the frozen texts."""
    reference, ours = tuned(base, PROMPT_OT, dtype)
    padded, short = class_texts(base, PROMPT_OT, classes)
    pixels, labels = images(base, 4, classes)
    own_pixels, loss_of = pixels.to(dtype), prompt_ot_loss(base, labels)
    with torch.no_grad(), adapters_off(reference), adapters_off(ours):
        frozen_text = encode_texts(reference, short)
        own_frozen = encode_images(ours, own_pixels), encode_texts(ours, short)
    arrived = torch.zeros_like(frozen_text)  # gradient of the reference's texts in the previous step

    def reference_loss(model: PeftModel) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            frozen_image = encode_images(model, pixels)
        image = encode_images(model, pixels)
        text = encode_texts(model, padded) if classes <= CHUNK else chunked(model, padded, arrived)
        return loss_of(image, text, frozen_image, frozen_text)

    def our_loss(model: PeftModel) -> Tensor:
        return loss_of(encode_images(model, own_pixels), encode_texts(model, short), *own_frozen)

    name = f"Prompt-OT step, {classes} classes, batch 4" + ", ours in bf16" * (dtype == torch.bfloat16)
    parts = ([Part(partial(step, *side))] for side in ((reference, reference_loss), (ours, our_loss)))
    return Work(name, *parts, dtype, long=classes > CHUNK)


def prompt_ot_loss(base: CLIPModel, labels: Tensor) -> Callable[..., Tensor]:
    """Return the recipe's loss as a function of image and text features, and of the frozen model's."""
    terms, scale = PROMPT_OT.losses(), base.logit_scale

    def loss_of(image: Tensor, text: Tensor, frozen_image: Tensor, frozen_text: Tensor) -> Tensor:
        features = {"image_features": image, "text_features": text, "logits": cosine_logits(image, text, scale)}
        frozen = {"frozen_image_features": frozen_image, "frozen_text_features": frozen_text}
        batch = GeometryBatch(**features, **frozen, labels=labels)
        return CrossEntropy()(batch) + sum(term.factor() * term(batch) for term in terms)

    return loss_of


def autocast(base: CLIPModel, classes: int) -> Work:
    """Return the work of a Prompt-OT step, batch 4, on new views under autocast to bf16, twice on the same model.

    Here the reference is plain autocast, which casts the frozen weights in each of the three passes; our side has
    already cast them.
    """
    model = tuned(base, PROMPT_OT)[1]
    short = class_texts(base, PROMPT_OT, classes)[1]
    pixels, labels = images(base, 4, classes)
    loss_of = prompt_ot_loss(base, labels)
    with torch.no_grad(), adapters_off(model):
        frozen_text = encode_texts(model, short)

    @torch.autocast("cpu", torch.bfloat16)
    def loss(model: PeftModel) -> Tensor:
        with torch.no_grad(), adapters_off(model):
            frozen_image = encode_images(model, pixels)
        return loss_of(encode_images(model, pixels), encode_texts(model, short), frozen_image, frozen_text)

    def in_half(half: HalfWeights) -> float:
        with half:
            return step(model, loss)

    sides = HalfWeights(model, None), HalfWeights(model, torch.bfloat16)
    name = f"Prompt-OT step, {classes} classes, batch 4, bf16 autocast on both sides"
    return Work(name, *([Part(partial(in_half, half))] for half in sides), torch.bfloat16)


def chunked(model: PeftModel, ids: Tensor, gradient: Tensor) -> Tensor:
    """Return features (K, d), a leaf, of texts whose activations do not fit into memory together.

    Each chunk is back-propagated at once. Weights do not change here, so the texts' gradient is that of the previous
    step. To compute it, published code would need every chunk twice; this benchmark does not count that.
    """
    features = []
    for chunk, arrived in zip(ids.split(CHUNK), gradient.split(CHUNK), strict=True):
        part = encode_texts(model, chunk)
        part.backward(arrived)
        features.append(part.detach())
    leaf = torch.cat(features).requires_grad_()
    leaf.register_hook(gradient.copy_)  # for the next step
    return leaf


def text_only(base: CLIPModel, classes: int, batch_size: int) -> Work:
    """Return the work of a CoOp step; our side trains on image features that are computed once."""
    reference, ours = tuned(base, COOP)
    padded, short = class_texts(base, COOP, classes)
    pixels, labels = images(base, batch_size, classes)
    with torch.no_grad():
        known = encode_images(ours, pixels)

    def loss(model: PeftModel, ids: Tensor, image: Tensor | None = None) -> Tensor:
        image = encode_images(model, pixels) if image is None else image
        return F.cross_entropy(cosine_logits(image, encode_texts(model, ids), base.logit_scale), labels)

    name = f"text-only tuning step (CoOp), {classes} classes, batch {batch_size}"
    return Work(name, [Part(partial(step, reference, loss, padded))], [Part(partial(step, ours, loss, short, known))])


def lora(base: CLIPModel, classes: int, batch_size: int) -> Work:
    """Return the work of a CLIP-LoRA step; the reference encodes one text in a row of 77 tokens."""
    reference, ours = tuned(base, CLIP_LORA)
    padded, short = class_texts(base, CLIP_LORA, classes)
    pixels, labels = images(base, batch_size, classes)

    def loss(model: PeftModel, encode: Callable[..., Tensor], ids: Tensor) -> Tensor:
        return F.cross_entropy(
            cosine_logits(encode_images(model, pixels), encode(model, ids), base.logit_scale), labels
        )

    name = f"CLIP-LoRA step, {classes} classes, batch {batch_size}"
    sides = (reference, loss, text_encoder.text_features, padded), (ours, loss, encode_texts, short)
    return Work(name, *([Part(partial(step, *side))] for side in sides))


def evaluation(base: CLIPModel, classes: int, batches: int, batch_size: int) -> Work:
    """Return the work of an evaluation; our side encodes the classes once. One batch is timed for all."""
    reference, ours = (model.eval() for model in tuned(base, PROMPT_OT))
    padded, short = class_texts(base, PROMPT_OT, classes)
    pixels, labels = images(base, batch_size, classes)
    encode = torch.no_grad()(encode_texts)
    known = encode(ours, short)

    @torch.no_grad()
    def classify(model: PeftModel, text: Tensor | None = None) -> float:
        text = encode_texts(model, padded) if text is None else text
        logits = cosine_logits(encode_images(model, pixels), text, base.logit_scale)
        return F.cross_entropy(logits, labels).item()

    name = f"evaluation, {classes} classes, {batches * batch_size} images"
    ours_parts = [Part(partial(encode, ours, short)), Part(partial(classify, ours, known), batches)]
    return Work(name, [Part(partial(classify, reference), batches)], ours_parts, long=True)


def measure(work: Work, rounds: int, matrix_size: int) -> dict:
    """Return a row of the table. Our side runs one untimed round more, since it is short."""
    matrix = torch.randn(matrix_size, matrix_size).to(work.dtype)
    product = Part(lambda: matrix @ matrix)
    quick = [product, *work.ours]
    for part in tqdm(quick + [*quick, *work.reference] * rounds, desc=work.name):
        part.once()
    flops, seconds = {}, {}
    for side, parts in (("reference", work.reference), ("ours", work.ours), ("product", [product])):
        flops[side] = sum(part.times * part.flops for part in parts)
        seconds[side] = sum(part.times * median(part.seconds[-rounds:]) for part in parts)
    rate = flops["product"] / seconds["product"]
    return {
        "work": work.name,
        "reference s": seconds["reference"],
        "ours s": seconds["ours"],
        "ratio": seconds["reference"] / seconds["ours"],
        "limit by FLOPs": flops["reference"] / flops["ours"],
        "of the floor": flops["ours"] / rate / seconds["ours"],
        "reference loss": work.reference[-1].value,
        "our loss": work.ours[-1].value,
        "rounds": rounds,
        "our GFLOP": flops["ours"] / 1e9,
        "GFLOP/s of a product": rate / 1e9,
    }


def memory(base: CLIPModel) -> list[dict]:
    """Return peaks of memory. A peak never falls, so they are measured before all rows, and first for our side."""
    work, peaks = prompt_ot(base, CHUNK), [peak_mib()]
    for part in (*work.ours, *work.reference):
        part.run()
        peaks.append(peak_mib())
    name = f"peak of the process above {peaks[0]:.0f} MiB before: {work.name}"
    found = [(name, peaks[2] - peaks[0], peaks[1] - peaks[0])]
    for classes in (100, 200):
        models, texts = tuned(base, PROMPT_OT), class_texts(base, PROMPT_OT, classes)
        name = f"activations that the text tower keeps for backward, {classes} classes"
        found.append((name, *map(kept_mib, models, texts)))
    return [
        {"memory": name, "reference MiB": reference, "ours MiB": ours, "ratio": reference / ours if ours else None}
        for name, reference, ours in found
    ]


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def kept_mib(model: PeftModel, ids: Tensor) -> float:
    """Return the size of the storages, except weights, that autograd keeps for the text tower; each counts once."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in unwrap(model).state_dict().values()}
    kept: list[Tensor] = []
    with saved_tensors_hooks(kept.append, lambda nothing: nothing):
        encode_texts(model, ids)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in weights) / 2**20


ROWS: dict[str, Callable[[CLIPModel, bool], Work]] = {
    "text": lambda base, quick: text_tower(base, 100),
    "ot-50": lambda base, quick: prompt_ot(base, 50),
    "ot-50-bf16": lambda base, quick: prompt_ot(base, 50, torch.bfloat16),
    "ot-50-autocast": lambda base, quick: autocast(base, 50),
    "ot-100": lambda base, quick: prompt_ot(base, 100),
    "ot-500": lambda base, quick: prompt_ot(base, 500),
    "text-only": lambda base, quick: text_only(base, 100, 32),
    "lora-4": lambda base, quick: lora(base, 100, 4),
    "lora-32": lambda base, quick: lora(base, 100, 32),
    "evaluation": lambda base, quick: evaluation(base, 200, 5, 20) if quick else evaluation(base, 1000, 5, 100),
}


def markdown(rows: list[dict]) -> str:
    lines = [list(rows[0]), ["---"] + ["---:"] * (len(rows[0]) - 1)]
    lines += [[cell(key, value) for key, value in row.items()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(column: str, value: Any) -> str:
    """Return three digits of a value; six of a loss, to show that both sides are equal."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{6 if 'loss' in column else 3}g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the demo's mini-CLIP instead of ViT-B/16 shapes")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the longest rows of ViT-B/16 have a third")
    parser.add_argument("--rows", nargs="+", choices=["memory", *ROWS], default=["memory", *ROWS])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark_speed"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # random weights have no tokenizer for text_init
    torch.set_num_threads(1)
    base, size = (load_demo(shots=1).model, 1024) if args.quick else (vit_b16(), 4096)
    report: dict[str, Any] = {"speed": [], "memory": memory(base) if "memory" in args.rows else []}
    for name in sorted(set(args.rows) - {"memory"}, key=list(ROWS).index):
        work = ROWS[name](base, args.quick)
        rounds = -(-args.rounds // 3) if work.long and not args.quick else args.rounds
        report["speed"].append(measure(work, rounds, size))
    known = CPUINFO.read_text().split() if CPUINFO.exists() else []
    flags = ", ".join(f"{flag} {'yes' if flag in known else 'no'}" for flag in FLAGS) if known else "not known"
    shapes = "mini-CLIP" if args.quick else "ViT-B/16, random weights"
    note = f"{shapes}; torch {torch.__version__}, one thread; CPU flags: {flags}."
    text = "\n\n".join([*(markdown(rows) for rows in report.values() if rows), note])
    print(text)
    write_whole(args.output_dir / "results.json", json.dumps({**report, "note": note}, indent=2) + "\n")
    write_whole(args.output_dir / "results.md", text + "\n")


if __name__ == "__main__":
    main()
