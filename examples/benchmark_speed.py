"""One training step of this library against the step that published code runs, interleaved in one process.

    python examples/benchmark_speed.py            ViT-B/16 shapes with random weights
    python examples/benchmark_speed.py --quick    the demo's mini-CLIP

Both steps train the same prompts with the same loss on the same batch. The reference pads every text to the tower's
full length, uses eager attention and switches the adapter off through PEFT for the teacher.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from peft_ncgeo.adapters import adapters_off
from peft_ncgeo.data import load_demo
from peft_ncgeo.geometry.sphere import cosine_logits
from peft_ncgeo.losses import CrossEntropy, GeometryBatch
from peft_ncgeo.towers import image_features, text_features, text_positions
from peft_ncgeo.training import Recipe

RECIPE = Path(__file__).parent / "recipes" / "prompt_ot.yaml"


def vit_b16(attention: str) -> CLIPModel:
    torch.manual_seed(0)
    text, vision = CLIPTextConfig(eos_token_id=49407), CLIPVisionConfig(patch_size=16)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    return CLIPModel._from_config(config, attn_implementation=attention)


def mini_clip(attention: str) -> CLIPModel:
    model = load_demo(shots=1).model
    model.set_attn_implementation(attention)
    return model


def class_texts(model: CLIPModel, classes: int, slots: int = 4) -> Tensor:
    """Random names of 1 to 8 tokens behind the slots, padded to the tower's full length."""
    config = model.config.text_config
    rng = torch.Generator().manual_seed(0)
    rows = torch.full((classes, text_positions(model)), config.pad_token_id)
    for row in rows:
        name = torch.randint(10, 1000, (int(torch.randint(1, 9, (), generator=rng)),), generator=rng)
        text = torch.cat([torch.tensor([config.bos_token_id, *range(10, 10 + slots)]), name])
        row[: len(text)], row[len(text)] = text, config.eos_token_id
    return rows


def make_step(
    base: CLIPModel, recipe: Recipe, ids: Tensor, pixels: Tensor, labels: Tensor, published: bool
) -> Callable[[], float]:
    torch.manual_seed(1)
    model = get_peft_model(base, recipe.config()).train()
    classification, terms = CrossEntropy(), recipe.losses()
    longest = int((ids == base.config.text_config.eos_token_id).int().argmax(1).max()) + 1
    texts = ids if published else ids[:, :longest]
    with torch.no_grad(), adapters_off(model):
        frozen_text = text_features(model, texts)

    def step() -> float:
        model.zero_grad()
        with torch.no_grad(), model.disable_adapter() if published else adapters_off(model):
            frozen_image = image_features(model, pixels)
        image, text = image_features(model, pixels), text_features(model, texts)
        logits = cosine_logits(image, text, base.logit_scale)
        batch = GeometryBatch(
            image_features=image,
            text_features=text,
            labels=labels,
            logits=logits,
            frozen_image_features=frozen_image,
            frozen_text_features=frozen_text,
        )
        loss = classification(batch) + sum(term.factor() * term(batch) for term in terms)
        loss.backward()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the demo's mini-CLIP instead of ViT-B/16 shapes")
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="prompts and losses of the step")
    args = parser.parse_args()
    recipe = Recipe.read(args.recipe)
    warnings.filterwarnings("ignore")  # random weights have no tokenizer to read text_init with
    torch.set_num_threads(1)
    build = mini_clip if args.quick else vit_b16
    steps = {}
    for name, attention in (("published", "eager"), ("ours", "sdpa")):
        base = build(attention)
        size = base.config.vision_config.image_size
        pixels = torch.randn(args.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(args.batch_size) % args.classes
        texts = class_texts(base, args.classes)
        steps[name] = make_step(base, recipe, texts, pixels, labels, name == "published")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses = {name: step() for name, step in steps.items()}  # warm-up
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:10s} {median:8.3f} CPU s a step (median of {args.rounds}), loss {losses[name]:.6f}")
    print(f"published / ours: {medians['published'] / medians['ours']:.2f}x")


if __name__ == "__main__":
    main()
