"""Re-make the demo's mini-CLIP (`mini_clip/`) in one run of about 20 minutes on one core.

Development only: the result is carried by the package. Needs what `render_emoji.py` needs, and its outputs.

    OMP_NUM_THREADS=1 python examples/build_demo/pretrain_clip.py --npm-dir node_modules \
        --fashion-dir fashion-mnist --output peft_ncgeo/data/demo_assets/mini_clip

The model sees drawings of three vendors, never of the two that the demo hands out, and the first 30,000 Fashion-MNIST
photographs with loose captions. The development split is evaluated on the way; the report split once, at the end.
"""

import argparse
import itertools
import json
import math
import string
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from render_emoji import (
    PRETRAINING_PHOTOGRAPHS,
    PRETRAINING_VENDORS,
    read_concepts,
    read_fashion_mnist,
    render_vendor,
)
from tokenizers import trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, PreTrainedModel

from peft_ncgeo.data.demo import (
    FASHION_NAMES,
    VIEW_PARAMETERS,
    VIEW_SIZE,
    draw_views,
    load_photographs,
    load_test_views,
)

VOCABULARY = 2000
CONTEXT_LENGTH = 32
SPECIAL_TOKENS = {
    "pad_token": "<|pad|>",
    "unk_token": "<|unk|>",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",  # id 3: with 2, Transformers pools in its legacy way
}
EVALUATION_TEMPLATE = "a photo of a {}."
TEMPLATES = (
    EVALUATION_TEMPLATE,
    "{}",
    "a drawing of a {}.",
    "a picture of a {}.",
    "an emoji of a {}.",
    "an icon of a {}.",
    "this is a {}.",
    "a small {}.",
    "the {}.",
)
# Deliberately loose, as captions on the web are: a third to a half of the photographs get another word than
# their class's own name.
FASHION_SYNONYMS = (
    ("tee", "top"),
    ("pants",),
    ("sweater", "top"),
    ("gown",),
    ("jacket",),
    ("shoe",),
    ("blouse", "top"),
    ("shoe",),
    ("purse",),
    ("boot", "shoe"),
)
FASHION_CAPTIONS = tuple((name, name, *loose) for name, loose in zip(FASHION_NAMES, FASHION_SYNONYMS, strict=True))
FASHION_ANY = "clothing"
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 1e-3, 0.1, 100
PRETRAINING_STREAM = 2  # see the streams in peft_ncgeo/data/demo.py


def backend_words(tokenizer: CLIPTokenizer, text: str) -> list[str]:
    """The words that the tokenizer's BPE is given for a text, in its alphabet of bytes."""
    backend = tokenizer.backend_tokenizer
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]


def train_tokenizer(concepts: list[dict]) -> CLIPTokenizer:
    """CLIP's own pipeline (lower-casing, `</w>`) with a small vocabulary learned from the captions."""
    names = [concept["name"] for concept in concepts] + list(itertools.chain(*FASHION_CAPTIONS)) + [FASHION_ANY]
    corpus = [template.format(name) for template in TEMPLATES for name in names]
    corpus += [" ".join([concept["subgroup"], *concept["keywords"]]) for concept in concepts]
    # Every printable character also as a word of its own ("x" fills the slots of learned prompts).
    characters = [c for c in string.printable if not c.isspace() and c == c.lower()]
    corpus += characters
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(SPECIAL_TOKENS.values())}, **SPECIAL_TOKENS)
    # The trainer numbers the characters that end a word in the order of a hash table, another one each time, and
    # breaks ties by these numbers. Named beforehand, they are the same in every run.
    ends = sorted({f"{word[-1]}</w>" for text in corpus for word in backend_words(tokenizer, text)})
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS.values()) + ends,
        initial_alphabet=characters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend = tokenizer.backend_tokenizer
    backend.train_from_iterator(corpus, trainer)
    learned = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(learned["vocab"], merges, model_max_length=CONTEXT_LENGTH, **SPECIAL_TOKENS)


def create_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 3,
        "max_position_embeddings": CONTEXT_LENGTH,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"num_hidden_layers": 4, "image_size": VIEW_SIZE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=128))


def create_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": VIEW_SIZE},
        crop_size={"height": VIEW_SIZE, "width": VIEW_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


class Drawings:
    """The pre-training vendors' drawings of each concept."""

    def __init__(self, npm_dir: Path, concepts: list[dict]) -> None:
        self.by_concept = [[] for _ in concepts]
        for vendor in PRETRAINING_VENDORS:
            for row, drawing in render_vendor(npm_dir, vendor, concepts).items():
                self.by_concept[row].append(drawing)

    def sample(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`(count, 48, 48, 4)` bytes and the rows of their concepts: distinct concepts, a random vendor each."""
        rows = rng.choice(len(self.by_concept), count, replace=False)
        return np.stack([choose(rng, self.by_concept[row]) for row in rows]), rows


def choose(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


class Pairs:
    """Endless batches of images and captions, a pure function of the seed."""

    def __init__(self, npm_dir: Path, fashion_dir: Path, concepts: list[dict], seed: int) -> None:
        self.concepts = concepts
        self.rng = np.random.default_rng([PRETRAINING_STREAM, seed])
        self.drawings = Drawings(npm_dir, concepts)
        images, labels = read_fashion_mnist(fashion_dir, "train")
        self.labels = labels[:PRETRAINING_PHOTOGRAPHS]
        side = (VIEW_SIZE, VIEW_SIZE)
        resized = [Image.fromarray(image).resize(side, Image.BICUBIC) for image in images[:PRETRAINING_PHOTOGRAPHS]]
        self.photographs = np.stack([np.asarray(image) for image in resized])

    def batch(self, emoji: int, photographs: int) -> tuple[np.ndarray, list[str]]:
        """`(emoji + photographs, 32, 32, 3)` bytes and as many captions; distinct concepts, a random vendor each."""
        drawings, rows = self.drawings.sample(self.rng, emoji)
        views = draw_views(drawings, self.rng.random((emoji, VIEW_PARAMETERS)))
        chosen = self.rng.integers(len(self.photographs), size=photographs)
        pictures = self.photographs[chosen]
        mirrored = self.rng.random(photographs) < 0.5
        pictures = np.where(mirrored[:, None, None], pictures[:, :, ::-1], pictures)
        moved = [np.roll(p, self.rng.integers(-2, 3, size=2), (0, 1)) for p in pictures]
        images = np.concatenate([views, np.repeat(np.stack(moved)[..., None], 3, axis=-1)])
        captions = [self._caption(self.concepts[row]) for row in rows]
        captions += [self._loose_caption(self.labels[row]) for row in chosen]
        return images, captions

    def _caption(self, concept: dict) -> str:
        kind, keywords = self.rng.random(), concept["keywords"]
        if kind < 0.65 or not keywords:
            return choose(self.rng, TEMPLATES).format(concept["name"])
        few = " ".join(self.rng.permutation(keywords)[: self.rng.integers(1, 4)])
        if kind < 0.8:
            return f"{choose(self.rng, TEMPLATES).format(concept['name'])} {few}"
        return few if kind < 0.9 else f"{concept['subgroup']} {few}"

    def _loose_caption(self, label: int) -> str:
        name = FASHION_ANY if self.rng.random() < 0.1 else choose(self.rng, FASHION_CAPTIONS[label])
        return choose(self.rng, TEMPLATES).format(name)


def contrastive_loss(model: CLIPModel, pixels: torch.Tensor, texts: dict, caption: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE. `texts` holds each distinct caption once; `caption` says which of them an image has."""
    outputs = model(pixel_values=pixels, **texts)
    to_text = torch.nn.functional.cross_entropy(outputs.logits_per_image, caption)
    # The other way, all images with a caption are its positives.
    log_share = outputs.logits_per_text.log_softmax(dim=1).t().gather(1, caption[:, None])
    return (to_text - log_share.mean()) / 2


@torch.no_grad()
def zero_shot_accuracy(model: CLIPModel, processor: CLIPProcessor, dataset) -> float:
    model.eval()
    names = dataset.features["label"].names
    prompts = [EVALUATION_TEMPLATE.format(name) for name in names]
    correct = 0
    for start in range(0, len(dataset), 500):
        rows = dataset[start : start + 500]
        inputs = processor(text=prompts, images=rows["image"], padding=True, return_tensors="pt")
        prediction = model(**inputs).logits_per_image.argmax(dim=1)
        correct += (prediction == torch.tensor(rows["label"])).sum().item()
    model.train()
    return 100 * correct / len(dataset)


def evaluate(model: CLIPModel, processor: CLIPProcessor, split: str, photographs: str) -> dict[str, float]:
    parts = {part: load_test_views(split, part) for part in ("base", "new")}
    parts["fashion_mnist"] = load_photographs(photographs)
    return {f"{split}/{part}": round(zero_shot_accuracy(model, processor, data), 1) for part, data in parts.items()}


def create_optimizer(model: torch.nn.Module, steps: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW that decays matrices only, warmed up and then lowered along a cosine."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        return min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / steps)))

    return optimizer, LambdaLR(optimizer, rate)


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Bytes of `(n, height, width, 3)` as the processor would hand them to a model."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train(model: CLIPModel, processor: CLIPProcessor, pairs: Pairs, args: argparse.Namespace) -> None:
    optimizer, scheduler = create_optimizer(model, args.steps)
    mean_loss = 0.0
    for step in range(1, args.steps + 1):
        images, captions = pairs.batch(args.emoji_batch, args.photograph_batch)
        index = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        texts = processor.tokenizer(list(index), padding=True, truncation=True, return_tensors="pt")
        positive = torch.tensor([index[caption] for caption in captions])
        loss = contrastive_loss(model, to_pixels(images), texts, positive)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        mean_loss += loss.item()
        if step % 50 == 0:
            report = {"step": step, "loss": round(mean_loss / 50, 3), "cpu_s": round(time.process_time())}
            mean_loss = 0.0
            if step % args.evaluate_every == 0:
                report |= evaluate(model, processor, "development", "train")
            print(report | {"logit_scale": round(model.logit_scale.exp().item(), 1)}, flush=True)


def save_model(model: PreTrainedModel, output: Path) -> None:
    """Half-precision tensors under a configuration that says float32, so that every loader gives float32."""
    model.half().save_pretrained(output)
    path = output / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(config[tower] for tower in ("text_config", "vision_config") if tower in config)):
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (output / "model.safetensors").chmod(0o644)  # written for its owner alone, and a wheel would keep that


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm-dir", type=Path, required=True, help="the node_modules folder")
    parser.add_argument("--fashion-dir", type=Path, required=True, help="folder of Fashion-MNIST's idx.gz files")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives the model")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--emoji-batch", type=int, default=192)
    parser.add_argument("--photograph-batch", type=int, default=48)
    parser.add_argument("--evaluate-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # one thread gives the same sums, so the same model, everywhere
    torch.manual_seed(args.seed)
    start = time.monotonic()

    concepts = read_concepts(args.npm_dir)
    tokenizer = train_tokenizer(concepts)
    processor, model = CLIPProcessor(create_image_processor(), tokenizer), create_model(tokenizer)
    train(model, processor, Pairs(args.npm_dir, args.fashion_dir, concepts, args.seed), args)
    save_model(model, args.output)
    processor.tokenizer.backend_tokenizer.no_padding()  # the state of the last call is not part of the tokenizer
    processor.save_pretrained(args.output)
    model = CLIPModel.from_pretrained(args.output)
    print(evaluate(model, processor, "development", "test") | evaluate(model, processor, "report", "test"))
    print({"wall_s": round(time.monotonic() - start), "cpu_s": round(time.process_time())})


if __name__ == "__main__":
    main()
