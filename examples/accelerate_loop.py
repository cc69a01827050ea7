"""Training as `GeometryTrainer` does it, in a plain Accelerate loop that you can copy into your own.

accelerate launch examples/accelerate_loop.py --recipe examples/recipes/demo/ot_budget.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from peft_ncgeo import ZeroShotClassifier
from peft_ncgeo.data import class_prompts, load_demo
from peft_ncgeo.data.images import ImageCollator, LabelledImages
from peft_ncgeo.geometry.sphere import cosine_logits
from peft_ncgeo.losses import CrossEntropy, GeometryBatch
from peft_ncgeo.models.feature_extractor import FeatureExtractor
from peft_ncgeo.training import Recipe
from peft_ncgeo.training.features.teacher import FrozenTeacher
from peft_ncgeo.training.gathering import batch_sizes, gather_batch
from peft_ncgeo.training.sampling import count_samples_once

RECIPE = Path(__file__).parent / "recipes" / "demo" / "ot_budget.yaml"


def train(recipe: Recipe, epochs: int, split: str = "report", shots: int = 16, seed: int = 1) -> torch.nn.Module:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(seed)
    demo = load_demo(split, shots=shots)
    config, device, names = recipe.config(), accelerator.device, demo.splits["train"].features["label"].names
    model = get_peft_model(demo.model, config)
    texts = class_prompts(names, config.template, config.num_text_tokens, demo.processor.tokenizer).to(device)
    towers = FeatureExtractor(model).to(device)  # every pass of the tuned model goes through the wrapped module
    teacher = FrozenTeacher(towers, [class_prompts(names, config.template, 0, demo.processor.tokenizer)])
    classification, terms = CrossEntropy(), [term.to(device) for term in recipe.losses()]
    trainable = [parameter for parameter in towers.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.args["learning_rate"], weight_decay=0.0)
    images = LabelledImages(demo.splits["train"], "image", "label")
    collate, size = ImageCollator(demo.processor.image_processor), recipe.args["batch_size"]
    loader = DataLoader(images, size // accelerator.num_processes, shuffle=True, collate_fn=collate)
    wrapped, optimizer, loader = accelerator.prepare(towers, optimizer, loader)
    count_samples_once(loader)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, epochs * len(loader))

    for _ in tqdm(range(epochs), unit="epoch", disable=not accelerator.is_main_process):
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
            values = {term: term(batch) for term in terms}
            accelerator.backward(classification(batch) + sum(term.factor() * v for term, v in values.items()))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            for term, value in values.items():
                term.update(term.constrained(value))
    accelerator.end_training()
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--recipe",
        type=Path,
        default=RECIPE,
        help="YAML file; AdamW and a cosine schedule replace its own",
    )
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    tuned, new = train(Recipe.read(args.recipe), args.epochs), load_demo().splits["new"].select(range(0, 1440, 8))
    predicted = ZeroShotClassifier(tuned, load_demo().processor).predict(new["image"][:], new.features["label"].names)
    right = [new.features["label"].int2str(y) == name for y, name in zip(new["label"], predicted, strict=True)]
    print(f"accuracy on new classes: {sum(right) / len(right):.1%}")
