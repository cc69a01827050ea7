"""The training of `GeometryTrainer` as a plain Accelerate loop, for those who have a loop of their own.

accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from peft_ncgeo import NPTConfig, ZeroShotClassifier
from peft_ncgeo.data import class_prompts, load_demo
from peft_ncgeo.data.images import ImageCollator, LabelledImages
from peft_ncgeo.geometry.sphere import cosine_logits
from peft_ncgeo.losses import CrossEntropy, GeometryBatch, OTPreservation
from peft_ncgeo.training.gathering import batch_sizes, gather_batch
from peft_ncgeo.training.teacher import FrozenTeacher
from peft_ncgeo.training.towers_module import TowersModule


def train(args: argparse.Namespace | SimpleNamespace) -> torch.nn.Module:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(args.seed)
    demo = load_demo(args.split, shots=args.shots, seed=1)
    model = get_peft_model(demo.model, NPTConfig.prompt_ot())
    names = demo.splits["train"].features["label"].names
    tokenizer, device = demo.processor.tokenizer, accelerator.device
    texts = class_prompts(names, model.peft_config["default"].template, 4, tokenizer).to(device)

    towers = TowersModule(model).to(device)  # every student pass goes through the wrapped module
    teacher = FrozenTeacher(towers, [class_prompts(names, "a photo of a {}.", 0, tokenizer)])
    cross_entropy, transport = CrossEntropy(), OTPreservation(budget=0.05).to(device)
    optimizer = torch.optim.AdamW([p for p in towers.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    images = LabelledImages(demo.splits["train"], "image", "label")
    collate = ImageCollator(demo.processor.image_processor)
    loader = DataLoader(images, args.batch_size // accelerator.num_processes, shuffle=True, collate_fn=collate)
    wrapped, optimizer, loader = accelerator.prepare(towers, optimizer, loader)
    steps = args.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, steps)

    bar = tqdm(total=steps, disable=not accelerator.is_main_process)
    for _ in range(args.epochs):
        for inputs in loader:
            pixels, sizes = inputs["pixel_values"], batch_sizes(inputs["labels"])
            out = wrapped(pixel_values=pixels, **texts)
            image, text = gather_batch(out["image_features"], sizes), out["text_features"]
            batch = GeometryBatch(
                image_features=image,
                text_features=text,
                labels=gather_batch(inputs["labels"], sizes),
                logits=cosine_logits(image, text, model.get_base_model().logit_scale),
                frozen_image_features=gather_batch(teacher.image_features(pixels), sizes),
                frozen_text_features=teacher.text_features(device),
            )
            value = transport(batch)
            accelerator.backward(cross_entropy(batch) + transport.factor() * value)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            transport.update(transport.constrained(value))
            bar.update()
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("epochs", 15), ("batch_size", 60), ("shots", 16), ("seed", 1), ("split", "report")):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    tuned = train(parser.parse_args())
    new = load_demo().splits["new"].select(range(0, 1440, 8))
    classifier = ZeroShotClassifier(tuned, load_demo().processor)
    probabilities = classifier.predict_proba(new["image"][:], new.features["label"].names)
    print(f"accuracy on new classes: {(probabilities.argmax(1) == torch.tensor(new['label'][:])).float().mean():.1%}")
