"""One training step of full-size models with random weights: seconds, memory, and operations for texts.

python examples/benchmark_models.py               # each model in its own process; writes results/models.json
python examples/benchmark_models.py siglip2       # one model
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from peft_ncgeo import ImageClassifier
from peft_ncgeo.files import write_whole
from peft_ncgeo.geometry.sphere import cosine_logits
from peft_ncgeo.losses import CrossEntropy, GeometryBatch, OTPreservation
from peft_ncgeo.models import encode_texts
from peft_ncgeo.models.adapters import adapters_off, unwrap
from peft_ncgeo.models.feature_extractor import FeatureExtractor
from peft_ncgeo.models.towers import logit_bias, logit_scale, text_tower

RESULTS = Path(__file__).parent / "results" / "models.json"
IMAGES, CLASSES, STEPS = 8, 100, 3
# Tokens of each name with the full stop, without the four words of the template and the special tokens.
NAME_LENGTHS = (3, 2, 4, 1, 5, 2, 3, 4, 2, 6, 3, 1, 4, 2, 3, 5, 1, 4, 2, 3)


def clip() -> Any:
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 49407}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text |= {"projection_dim": 768}
    vision |= {"patch_size": 14, "projection_dim": 768}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    ), 224


def siglip2() -> Any:
    """Return SigLIP 2 base of a fixed size, which has the architecture of SigLIP and a larger vocabulary."""
    text = {"vocab_size": 256000, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 1}
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text | {"pad_token_id": 0})), 224


def dinov3() -> Any:
    backbone = transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            num_register_tokens=4,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
        )
    )
    return ImageClassifier.from_backbone(backbone, num_labels=CLASSES, head="cosine"), 224


def timm_vit() -> Any:
    config = transformers.TimmWrapperConfig(architecture="vit_base_patch16_224", num_labels=CLASSES)
    return transformers.TimmWrapperForImageClassification(config), 224


MODELS: dict[str, Callable[[], Any]] = {
    "CLIP ViT-L/14": clip,
    "SigLIP 2 base": siglip2,
    "DINOv3 ViT-B": dinov3,
    "timm ViT-B": timm_vit,
}


def class_texts(model: Any) -> torch.Tensor:
    """Token ids (K, L) of a template with names of several lengths, padded as the model reads them."""
    tower = text_tower(model)
    config, reading = unwrap(model).config.text_config, tower.reading
    front = [config.bos_token_id] * reading.front
    rows = []
    for k in range(CLASSES):
        name = torch.randint(1000, 40000, (NAME_LENGTHS[k % len(NAME_LENGTHS)],)).tolist()
        rows.append([*front, 320, 1125, 539, 320, *name, config.eos_token_id])
    length = tower.max_length if reading.full_length else max(map(len, rows))
    return torch.tensor([row + [config.pad_token_id] * (length - len(row)) for row in rows])


def measure(name: str) -> dict[str, Any]:
    """Return time and memory of a step of LoRA on all linear layers, with cross-entropy and transport."""
    torch.manual_seed(0)
    base, size = MODELS[name]()
    head = None if hasattr(base, "get_text_features") else ["classifier"]
    config = LoraConfig(r=8, target_modules="all-linear", exclude_modules=head, modules_to_save=head)
    if name.startswith("timm"):
        config = LoraConfig(r=8, target_modules=r".*blocks.*\.(qkv|proj|fc1|fc2)")
    model = get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    extractor, optimizer = FeatureExtractor(model), torch.optim.AdamW(trained, lr=1e-4)
    pixels, labels = torch.randn(IMAGES, 3, size, size), torch.randint(0, CLASSES, (IMAGES,))
    inputs: dict[str, Any] = {"pixel_values": pixels}
    losses: list[Any] = [CrossEntropy(), OTPreservation(weight=1.0, modality="image")]
    if head is None:
        inputs["input_ids"] = class_texts(model)
        losses = [CrossEntropy(), OTPreservation(weight=1.0)]
    with torch.no_grad(), adapters_off(model):
        frozen = {f"frozen_{key}": value for key, value in extractor(**inputs).items() if key != "logits"}
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(STEPS):
        start = time.perf_counter()
        found = extractor(**inputs)
        if head is None:
            image, text = found["image_features"], found["text_features"]
            found |= {"logit_scale": logit_scale(model)}
            found["logits"] = cosine_logits(image, text, logit_scale(model), logit_bias(model))
        batch = GeometryBatch(labels=labels, **found, **frozen)
        sum(loss(batch) for loss in losses).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    result = {
        "parameters": sum(p.numel() for p in base.parameters()),
        "trained": sum(p.numel() for p in trained),
        "seconds": round(min(seconds), 2),
        "MiB above the model": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
    }
    if head is None:
        result["texts' operations, of padded ones"] = round(text_share(model, inputs["input_ids"]), 2)
    return result


@torch.no_grad()
def text_share(model: Any, input_ids: torch.Tensor) -> float:
    """Return the operations of our text encoder, divided by those with one padded text in each row."""
    counted = []
    for run in (lambda: encode_texts(model, input_ids), lambda: unwrap(model).get_text_features(input_ids=input_ids)):
        with FlopCounterMode(display=False) as counter:
            run()
        counted.append(counter.get_total_flops())
    return counted[0] / counted[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="part of a model's name; default: all of them")
    parser.add_argument("--inside", action="store_true", help="measure in this process, and print the numbers as JSON")
    args = parser.parse_args()
    part = (args.model or "").lower().replace(" ", "")
    names = [name for name in MODELS if part in name.lower().replace(" ", "")]
    if not names:
        parser.error(f"no model is called {args.model!r}; there are {', '.join(MODELS)}")
    if args.inside:
        print(json.dumps(measure(args.model)))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names:
        command = [sys.executable, __file__, name, "--inside"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}")
            continue
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, results[name], flush=True)
        write_whole(RESULTS, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
