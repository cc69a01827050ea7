"""Re-make the demo's images and concept table (`emoji.npz`, `concepts.json`, `fashion_mnist.npz`).

Development only: the results are carried by the package. Needs `pip install resvg-py`, the npm packages
`@iconify-json/{noto,noto-v1,fluent-emoji-flat,twemoji,emojione}` and `emojibase-data`, and the four `idx.gz` files of
Fashion-MNIST (Debian's `dataset-fashion-mnist`).

    python examples/build_demo/render_emoji.py --npm-dir node_modules --fashion-dir fashion-mnist \
        --output peft_ncgeo/data/demo_assets
"""

import argparse
import gzip
import io
import json
import re
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from peft_ncgeo.data.demo import VENDORS

PRETRAINING_VENDORS = ("noto", "noto-v1", "fluent-emoji-flat")
DRAWING_SIZE = 48
SPLIT_SEED = 2024
SPLIT_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
CONCEPTS_PER_GROUP = 12  # a split: half of them base, half new
PRETRAINING_PHOTOGRAPHS = 30_000  # the first of Fashion-MNIST's training set; what is carried comes after them


def read_concepts(npm_dir: Path) -> list[dict]:
    """Unicode's names, keywords and groups, without skin tones, country flags and bare components."""
    meta = json.loads((npm_dir / "emojibase-data/meta/groups.json").read_text(encoding="utf-8"))
    groups, subgroups = meta["groups"], meta["subgroups"]
    concepts = []
    for entry in json.loads((npm_dir / "emojibase-data/en/data.json").read_text(encoding="utf-8")):
        group = groups.get(str(entry.get("group")))
        subgroup = subgroups.get(str(entry.get("subgroup")))
        if group in (None, "component") or subgroup in ("country-flag", "subdivision-flag"):
            continue
        name = entry["label"].lower()
        concepts.append(
            {
                "name": name,
                "keywords": [tag.lower() for tag in entry.get("tags", []) if tag.lower() != name],
                "group": group,
                "subgroup": subgroup,
                "hexcode": entry["hexcode"].lower(),
            }
        )
    return concepts


def render_vendor(npm_dir: Path, vendor: str, concepts: list[dict]) -> dict[int, np.ndarray]:
    """Concept row -> `(48, 48, 4)` RGBA bytes, for the concepts that the vendor draws."""
    folder = npm_dir / "@iconify-json" / vendor
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    by_code = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    by_code |= {code.replace("-fe0f", ""): icon for code, icon in by_code.items()}
    drawings = {}
    for row, concept in enumerate(concepts):
        code = concept["hexcode"]
        slug = re.sub("[^a-z0-9]+", "-", concept["name"].replace("\u2019", "")).strip("-")
        for key in (by_code.get(code), by_code.get(code.replace("-fe0f", "")), slug):
            if key in icons["icons"] or key in icons.get("aliases", {}):
                drawings[row] = _render(icons, key)
                break
    return drawings


def _render(icons: dict, key: str) -> np.ndarray:
    flip = False
    while key not in icons["icons"]:
        flip ^= icons["aliases"][key].get("hFlip", False)
        key = icons["aliases"][key]["parent"]
    icon = icons["icons"][key]
    box = [icon.get("left", 0), icon.get("top", 0)]
    box += [icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))]
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{DRAWING_SIZE}" height="{DRAWING_SIZE}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=DRAWING_SIZE, height=DRAWING_SIZE)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    return pixels[:, ::-1].copy() if flip else pixels


def choose_splits(concepts: list[dict], drawn: dict[str, dict[int, np.ndarray]]) -> dict:
    """Two disjoint sets of 60 plainly named concepts that every vendor draws, half base and half new."""
    rng = np.random.default_rng(SPLIT_SEED)
    splits = {split: {"base": [], "new": []} for split in ("report", "development")}
    used = {split: set() for split in splits}
    for group in SPLIT_GROUPS:
        rows = [
            row
            for row, concept in enumerate(concepts)
            if concept["group"] == group
            and re.fullmatch("[a-z]+( [a-z]+)?", concept["name"])
            and all(row in drawings for drawings in drawn.values())
        ]
        names = [concepts[row]["name"] for row in rng.permutation(rows)]
        for split, parts in splits.items():
            chosen = []
            for name in names:
                # No shared words in a split: "dog" and "dog face" would not be two classes.
                if len(chosen) < CONCEPTS_PER_GROUP and not used[split] & set(name.split()):
                    chosen.append(name)
                    used[split] |= set(name.split())
            names = [name for name in names if name not in chosen]
            parts["base"] += chosen[: CONCEPTS_PER_GROUP // 2]
            parts["new"] += chosen[CONCEPTS_PER_GROUP // 2 :]
    return {
        split: {part: rng.permutation(names).tolist() for part, names in parts.items()}
        for split, parts in splits.items()
    }


def read_fashion_mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """The original files, `part` being "train" or "t10k", as `(n, 28, 28)` and `(n,)` bytes."""
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def slice_fashion_mnist(images: np.ndarray, labels: np.ndarray, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `per_class` photographs of each class, in their original order."""
    rows = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(10)]))
    return images[rows], labels[rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm-dir", type=Path, required=True, help="the node_modules folder")
    parser.add_argument("--fashion-dir", type=Path, required=True, help="folder of Fashion-MNIST's idx.gz files")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives the three files")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    concepts = read_concepts(args.npm_dir)
    drawn = {v: render_vendor(args.npm_dir, v, concepts) for v in (*PRETRAINING_VENDORS, *VENDORS)}
    print({"concepts": len(concepts)} | {vendor: len(drawings) for vendor, drawings in drawn.items()})
    arrays = {}
    for vendor in VENDORS:
        arrays[vendor] = np.stack(list(drawn[vendor].values()))
        arrays[f"{vendor}_concept"] = np.array(list(drawn[vendor]), dtype=np.int16)
    np.savez_compressed(args.output / "emoji.npz", **arrays)

    rows = ",\n".join(json.dumps(concept, ensure_ascii=False, separators=(",", ":")) for concept in concepts)
    splits = json.dumps(choose_splits(concepts, drawn), indent=1)
    (args.output / "concepts.json").write_text(
        f'{{"splits": {splits},\n"concepts": [\n{rows}\n]}}\n', encoding="utf-8"
    )

    images, labels = read_fashion_mnist(args.fashion_dir, "train")
    train = slice_fashion_mnist(images[PRETRAINING_PHOTOGRAPHS:], labels[PRETRAINING_PHOTOGRAPHS:], per_class=300)
    test = slice_fashion_mnist(*read_fashion_mnist(args.fashion_dir, "t10k"), per_class=200)
    np.savez_compressed(
        args.output / "fashion_mnist.npz",
        train_images=train[0],
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
    )


if __name__ == "__main__":
    main()
