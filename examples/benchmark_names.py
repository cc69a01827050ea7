"""Time and memory of `ZeroShotClassifier` with many class names.

    python examples/benchmark_names.py                 5,000 names, less than a minute
    python examples/benchmark_names.py --names 100000  the full number, ten minutes or more on one core

Names are random words of two to six tokens; the text tower has the size of ViT-B/16 and random weights; there are four
images. The benchmark runs in its own process, on one thread, and seconds are CPU time. The peak of memory is measured
above the process with the loaded model, and includes the stored text features.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from peft_ncgeo import ZeroShotClassifier
from peft_ncgeo.data.demo import ASSETS


def peak() -> float:
    """Return the largest memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def made_up_names(tokenizer: AutoTokenizer, count: int) -> list[str]:
    """Return different names of random words of the tokenizer's vocabulary."""
    words = sorted(word.removesuffix("</w>") for word in tokenizer.get_vocab() if word.endswith("</w>"))
    words = [word for word in words if word.isalpha() and word.isascii() and len(word) > 2]
    rng, names = np.random.default_rng(0), {}
    while len(names) < count:
        names[" ".join(rng.choice(words, rng.integers(2, 5), replace=False))] = None
    return list(names)


def classifier(layers: int) -> ZeroShotClassifier:
    """Return a classifier with random weights whose text tower is ViT-B/16's, with a small image tower."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "mini_clip")
    text = {
        "num_hidden_layers": layers,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text | {"eos_token_id": tokenizer.eos_token_id}, vision_config=vision)
    torch.manual_seed(0)
    size = {"height": 32, "width": 32}
    processor = CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), tokenizer)
    return ZeroShotClassifier(CLIPModel._from_config(config), processor)


def measure(count: int, layers: int) -> None:
    """Print a row of the table."""
    zero_shot = classifier(layers)
    names = made_up_names(zero_shot.processor.tokenizer, count)
    images = [Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)) for i in range(4)]
    before, start = peak(), time.process_time()
    zero_shot.text_features(names)
    encoded = time.process_time() - start
    zero_shot.top_k(images, names)
    ranked = time.process_time() - start - encoded
    cells = f"{count:,}", f"{1000 * encoded / count:.2f}", f"{ranked:.2f}", f"{peak() - before:,.0f}", f"{before:,.0f}"
    print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", type=int, default=5000)
    parser.add_argument("--layers", type=int, default=12, help="number of layers of the text tower")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the row, in this process
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.names, arguments.layers)
        return
    print("| names | s a thousand names | s, 4 images | peak MiB above the model | MiB with the model |")
    print("|---|---|---|---|---|", flush=True)
    given = ["--names", str(arguments.names), "--layers", str(arguments.layers)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, "--one", *given], check=True, env=one_thread)


if __name__ == "__main__":
    main()
