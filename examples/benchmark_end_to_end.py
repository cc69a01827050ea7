"""Time of a whole training and of its parts: decoding, image processor, towers, losses, optimiser, saving.

    python examples/benchmark_end_to_end.py            ViT-B/16 with random weights, 100 classes x 16 photographs
    python examples/benchmark_end_to_end.py --quick    the demo's mini-CLIP, 10 classes x 4

It measures one epoch of LoRA on all layers with transport to the frozen model, batch 32, then an evaluation and a
save. One thread and no worker processes are used, so that everything is counted. The photographs are random pictures,
stored as JPEG files of 500 x 375 pixels. The seconds of a part do not include those of the parts inside it.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Image
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    PrinterCallback,
)

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments
from peft_ncgeo.data import load_demo
from peft_ncgeo.data.images import ImageCollator, LabelledImages
from peft_ncgeo.files import write_whole
from peft_ncgeo.losses import OTPreservation

PASSES = ("towers, forward", "towers and losses, backward", "frozen towers", "losses", "evaluation passes")


class Clock:
    """Seconds of each part of a program, without the parts inside it; time outside all parts is "the rest"."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside, self._since = ["the rest"], time.perf_counter()

    def _note(self) -> None:
        now = time.perf_counter()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._note()
        self._inside.append(name)
        try:
            yield
        finally:
            self._note()
            self._inside.pop()

    def watch(self, owner: Any, method: str, name: str, within: str | None = None) -> None:
        """Count calls of a method as this part; with `within`, count only calls made inside that part."""
        called = getattr(owner, method)

        @wraps(called)
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts = within in (None, self._inside[-1])
            with self.part(name) if counts else nullcontext():
                return called(*args, **kwargs)

        setattr(owner, method, counted)


def photographs(classes: int, shots: int, seed: int) -> Dataset:
    """Return smooth random pictures as JPEG files in memory."""
    rng, files = np.random.default_rng(seed), []
    for _ in range(classes * shots):
        coarse = PILImage.fromarray(rng.integers(0, 256, (25, 33, 3), dtype=np.uint8))
        with io.BytesIO() as file:
            coarse.resize((500, 375), PILImage.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            files.append({"bytes": file.getvalue()})
    columns = Features({"image": Image(), "label": ClassLabel(names=[f"thing {k}" for k in range(classes)])})
    return Dataset.from_dict({"image": files, "label": [i % classes for i in range(len(files))]}, features=columns)


def vit_b16(demo: CLIPModel) -> CLIPModel:
    """Return ViT-B/16 shapes with random weights, for the demo's tokenizer."""
    torch.manual_seed(0)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    text = CLIPTextConfig(**{name: getattr(demo.config.text_config, name) for name in special}).to_dict()
    return CLIPModel._from_config(
        CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(patch_size=16).to_dict())
    )


def run(quick: bool, steps: int, output_dir: Path) -> tuple[Clock, dict[str, Any]]:
    """Train, evaluate and save; return the clock and the sizes. Fewer steps also mean fewer test images."""
    classes, shots, tests = (10, 4, 20) if quick else (100, 16, 400)
    if steps > 0:
        tests = max(1, tests * 32 * steps // (classes * shots))
    demo = load_demo(shots=1)
    base, processor = demo.model, demo.processor
    if not quick:
        base, processor = vit_b16(demo.model), CLIPProcessor(CLIPImageProcessor(), demo.processor.tokenizer)
    test = photographs(classes, -(-tests // classes), 1).select(range(tests))
    trainer = GeometryTrainer(
        model=get_peft_model(base, LoraConfig(r=2, lora_dropout=0.25, target_modules=["q_proj", "k_proj", "v_proj"])),
        args=GeometryTrainingArguments(
            output_dir=str(output_dir / "training"),
            num_train_epochs=1,
            max_steps=steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=100,
            augmentation="crop_flip",
            save_strategy="epoch",
            logging_steps=10,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=photographs(classes, shots, 0),
        eval_dataset=test,
        processing_class=processor,
        losses=[OTPreservation(weight=10.0)],
    )
    trainer.remove_callback(PrinterCallback)
    clock = Clock()
    with watched_classes(clock):
        for owner, method, name in (
            (trainer, "compute_loss", "losses"),
            (trainer.frozen, "image_features", "frozen towers"),
            (trainer.frozen, "text_features", "frozen towers"),
            (trainer.accelerator, "backward", "towers and losses, backward"),
            (trainer, "prediction_step", "evaluation passes"),
            (trainer, "_save_checkpoint", "saving"),
            (trainer, "save_model", "saving"),
        ):
            clock.watch(owner, method, name)
        clock.watch(trainer.extractor, "forward", "towers, forward", within="losses")  # of training
        with clock.part("the rest"):
            trainer.train()
            trainer.evaluate()
            trainer.save_model()
    sizes = {"classes": classes, "images": classes * shots, "test images": tests, "steps": trainer.state.global_step}
    return clock, sizes


@contextmanager
def watched_classes(clock: Clock) -> Iterator[None]:
    """Count decoding with augmentation, and the image processor, on their classes: the trainer makes the objects."""
    before = LabelledImages.__getitem__, ImageCollator.__call__
    clock.watch(LabelledImages, "__getitem__", "decoding and crops")
    clock.watch(ImageCollator, "__call__", "image processor")
    clock.seconds.clear()
    try:
        yield
    finally:
        LabelledImages.__getitem__, ImageCollator.__call__ = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the demo's mini-CLIP instead of ViT-B/16 shapes")
    parser.add_argument(
        "--steps", type=int, default=-1, help="stop after so many steps, and use the same share of the test images"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark_end_to_end"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)  # random weights have no processor of their own
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    clock, sizes = run(args.quick, args.steps, args.output_dir)
    whole = sum(clock.seconds.values())
    lines = ["| part | seconds | share |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {took:,.1f} | {took / whole:.1%} |" for name, took in clock.seconds.most_common()]
    passes = sum(clock.seconds[name] for name in PASSES) / whole
    lines += [f"| all | {whole:,.1f} | of which towers and losses {passes:.1%} |"]
    counts = ", ".join(f"{count:,} {name}" for name, count in sizes.items())
    model = "mini-CLIP" if args.quick else "ViT-B/16, random weights"
    note = f"{counts}; {model}; torch {torch.__version__}, one thread."
    table = "\n".join([*lines, "", note])
    print(table)
    report = {"seconds": dict(clock.seconds), "towers and losses": passes, "sizes": sizes, "note": note}
    write_whole(args.output_dir / "results.json", json.dumps(report, indent=2) + "\n")
    write_whole(args.output_dir / "results.md", table + "\n")


if __name__ == "__main__":
    main()
