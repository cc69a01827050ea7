"""Built-in demo without download: real artwork, real names and a pre-trained CLIP.

Every concept (an emoji) is drawn by several vendors. The included mini-CLIP was pre-trained on the drawings of three
of them and on loosely captioned Fashion-MNIST photographs; [`load_demo`] returns drawings of two other vendors,
whose styles the model has never seen. This is a small-scale demonstration that runs on a laptop, not a benchmark.

Licences (full texts in ``demo_assets/NOTICE``): Twemoji and EmojiOne drawings are CC-BY-4.0, names and keywords
(emojibase, from Unicode CLDR) and Fashion-MNIST are MIT; the mini-CLIP comes with this package (Apache-2.0).
"""

import functools
import io
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from transformers import CLIPModel, CLIPProcessor

ASSETS = Path(__file__).parent / "demo_assets"
VENDORS = ("twemoji", "emojione")
FASHION_NAMES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
VIEW_SIZE = 32  # the mini-CLIP's input size: a view needs no further resizing
VIEW_PARAMETERS = 20  # number of uniform numbers that determine one view
TEST_VIEWS = 24  # per drawing; with 8 the sampling error is 2.3 points

_drawing = Lock()
# The first number of a view's seed, so that seeds for different purposes are never equal.
_TEST, _TRAIN, _VALIDATION = 0, 1, 2


class Demo(NamedTuple):
    """Result of [`load_demo`]: `splits` (a `DatasetDict`), `processor` and `model` (float32, eval mode)."""

    splits: DatasetDict
    processor: CLIPProcessor
    model: CLIPModel


def load_demo(split: str = "report", shots: int = 16, seed: int = 1, train_artist: str | None = None) -> Demo:
    """Load the demo's base-to-new task together with its mini-CLIP, without network.

    An image is a drawing seen through a random background, rotation, scale, shift, flip and colour change. Train,
    validation and test views come from disjoint random streams.

    Every concept was drawn once by each of two artists, the vendors `"twemoji"` and `"emojione"`. By default training
    and test show both, so `base` tests other views of the same drawings that were trained on, and a model that
    memorises drawings does well. With a `train_artist`, training shows only the drawings of that artist. Then `base`
    still tests trained drawings (same artist), while `base_other_artist` shows the trained classes in drawings that
    were never seen. Drawings of a new class are never trained on; those in `new_other_artist` also have an untrained
    style.

    Args:
        split: `"report"`, or `"development"`: 60 other concepts, on which to choose hyper-parameters.
        shots: training images per base class, half of them from each artist (for an odd number, the artists take
            turns). A larger number includes the images of a smaller one.
        seed: seed of the training views, 0 or more. The test images do not depend on it.
        train_artist: `"twemoji"` or `"emojione"`: the artist of all training, validation, `base` and `new` images.
            None: both.

    Returns:
        A [`Demo`]. Its `splits` all have the columns `image` (RGB) and `label` (a `ClassLabel` with only the
        classes of that split, so base and new are both 30-way tasks):

        | split           | images        | size    | classes                                           |
        |-----------------|---------------|---------|---------------------------------------------------|
        | `train`         | 30 * shots    | 32 x 32 | the 30 base concepts                              |
        | `validation`    | 30 * 48       | 32 x 32 | the same, other views, to choose hyper-parameters on |
        | `base`          | 30 * 48       | 32 x 32 | the same, other views: 24 of each artist's drawing |
        | `new`           | 30 * 48       | 32 x 32 | 30 concepts that are not in `train`               |
        | `fashion_mnist` | 2,000         | 28 x 28 | 10; shows how tuning on emoji changes other tasks |

        With a `train_artist`, `validation`, `base` and `new` hold that artist's 30 * 24 images of these, and
        `base_other_artist` and `new_other_artist` the other artist's.

    Raises:
        ValueError: `split` or `train_artist` is unknown, or `shots` or `seed` is out of range.

    Example:
        >>> from peft_ncgeo.data import load_demo
        >>> demo = load_demo(shots=4)
        >>> len(demo.splits["train"]), len(demo.splits["new"])
        (120, 1440)
        >>> names = demo.splits["base"].features["label"].names
        >>> inputs = demo.processor(
        ...     text=[f"a photo of a {name}." for name in names],
        ...     images=demo.splits["base"]["image"][:8],
        ...     padding=True,
        ...     return_tensors="pt",
        ... )
        >>> demo.model(**inputs).logits_per_image.shape
        torch.Size([8, 30])
    """
    known = load_concepts()["splits"]
    if split not in known:
        raise ValueError(f"split must be one of {sorted(known)}, got {split!r}.")
    if isinstance(shots, bool) or not isinstance(shots, Integral) or shots < 1:
        raise ValueError(f"shots must be a whole number of at least 1, got {shots!r}.")
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, got {seed!r}.")
    if train_artist is not None and train_artist not in VENDORS:
        raise ValueError(f"train_artist must be one of {sorted(VENDORS)} or None, got {train_artist!r}.")
    views = {
        "validation": load_test_views(split, "base", _VALIDATION),
        "base": load_test_views(split, "base"),
        "new": load_test_views(split, "new"),
    }
    if train_artist is not None:
        (other,) = set(VENDORS) - {train_artist}
        others = {f"{part}_other_artist": _of_artist(views[part], other) for part in ("base", "new")}
        views = {part: _of_artist(images, train_artist) for part, images in views.items()} | others
    splits = DatasetDict(
        train=_train_views(split, int(shots), int(seed), train_artist),
        **views,
        fashion_mnist=load_photographs("test"),
    ).with_format(None)  # copies that share images: `set_transform` must not change the cached ones
    model = CLIPModel.from_pretrained(ASSETS / "mini_clip").eval()
    return Demo(splits, CLIPProcessor.from_pretrained(ASSETS / "mini_clip"), model)


@functools.lru_cache(maxsize=1)
def load_concepts() -> dict[str, Any]:
    """Load the concept table: `concepts` (a list of `name, keywords, group, subgroup, hexcode`) and `splits`.

    `splits[split]["base" | "new"]` are lists of 30 class names, each the name of one concept.
    """
    return json.loads((ASSETS / "concepts.json").read_text(encoding="utf-8"))


@functools.lru_cache(maxsize=1)
def load_drawings() -> dict[str, dict[int, np.ndarray]]:
    """Load all drawings: vendor -> concept (its row in the concept table) -> `(48, 48, 4)` RGBA bytes."""
    with np.load(ASSETS / "emoji.npz", allow_pickle=False) as data:
        return {v: dict(zip(data[f"{v}_concept"].tolist(), data[v], strict=True)) for v in VENDORS}


def load_fashion_mnist(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Load the included part of Fashion-MNIST as `(n, 28, 28)` bytes and `(n,)` labels (rows of `FASHION_NAMES`).

    Args:
        part: `"train"` (3,000 photographs, 300 per class, not used in pre-training) or `"test"` (2,000).
    """
    with np.load(ASSETS / "fashion_mnist.npz", allow_pickle=False) as data:
        return data[f"{part}_images"], data[f"{part}_labels"]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch in one thread: on a busy machine, waiting for threads can take 20 times as long as drawing."""
    with _drawing:  # two calls at once would restore the wrong number
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@_one_thread()
def draw_views(drawings: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """Draw one view of each drawing: background, rotation, scale, shift, flip and colours.

    The result depends only on the arguments; all views are drawn in one batch.

    Args:
        drawings: `(n, height, width, 4)` RGBA bytes.
        parameters: `(n, VIEW_PARAMETERS)` numbers in [0, 1) that determine the views.

    Returns:
        `(n, VIEW_SIZE, VIEW_SIZE, 3)` RGB bytes.
    """
    u = torch.from_numpy(np.asarray(parameters, dtype=np.float32))
    rgba = torch.from_numpy(drawings).permute(0, 3, 1, 2).float() / 255
    colour, alpha = rgba[:, :3], rgba[:, 3:]

    def spread(column: int, low: float, high: float) -> torch.Tensor:
        return (low + (high - low) * u[:, column]).view(-1, 1, 1, 1)

    # Colours of the artwork: saturation, contrast, brightness and a gain per channel.
    grey = colour.mean(dim=1, keepdim=True)
    colour = grey + (colour - grey) * spread(0, 0.5, 1.3)
    colour = (colour - 0.5) * spread(1, 0.75, 1.25) + 0.5 + spread(2, -0.15, 0.15)
    colour = (colour * (0.88 + 0.24 * u[:, 3:6]).view(-1, 3, 1, 1)).clamp(0, 1)

    # Position of each pixel of the view in the drawing, at twice the size: the average below avoids aliasing.
    angle, scale = (u[:, 6] - 0.5) * math.radians(50), 0.65 + 0.45 * u[:, 7]
    flip = torch.where(u[:, 8] < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    shift_x, shift_y = (u[:, 9] - 0.5) * 0.3, (u[:, 10] - 0.5) * 0.3
    theta = torch.stack([torch.stack([flip * cos, -sin, shift_x], 1), torch.stack([flip * sin, cos, shift_y], 1)], 1)
    grid = _affine_grid(theta, 2 * VIEW_SIZE)
    premultiplied = torch.cat([colour * alpha, alpha], dim=1)  # without this, transparent pixels darken the edges
    artwork = torch.nn.functional.grid_sample(premultiplied, grid, align_corners=False)
    artwork = torch.nn.functional.avg_pool2d(artwork, 2)

    # A background with a gradient from one colour to another.
    axis = torch.linspace(-1, 1, VIEW_SIZE)
    direction = (u[:, 11] * 2 * math.pi).view(-1, 1, 1, 1)
    ramp = torch.cos(direction) * axis.view(1, 1, 1, -1) + torch.sin(direction) * axis.view(1, 1, -1, 1)
    ramp = (ramp / math.sqrt(2) + 1) / 2
    start, end = u[:, 12:15].view(-1, 3, 1, 1), u[:, 15:18].view(-1, 3, 1, 1)
    end = start + (end - start) * spread(18, 0, 0.6)
    # Half of the backgrounds are pale, as most pages and walls are.
    pale = torch.where(u[:, 19] < 0.5, 0.3, 1.0).view(-1, 1, 1, 1)
    background = 1 - pale * (1 - (start + (end - start) * ramp))

    view = artwork[:, :3] + background * (1 - artwork[:, 3:])
    return (view.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def _affine_grid(theta: torch.Tensor, size: int) -> torch.Tensor:
    """Return `torch.nn.functional.affine_grid` for square views, `(n, 2, 3)` to `(n, size, size, 2)`.

    That function calls a matrix product, whose last bits differ between processors of different makers. A few pixels
    would follow, and with them the fingerprint of every cached run.
    """
    centres = torch.linspace(-1, 1, size) * (size - 1) / size
    x, y = centres.view(1, 1, -1, 1), centres.view(1, -1, 1, 1)
    of_x, of_y, shift = theta.view(-1, 1, 1, 2, 3).unbind(-1)
    return of_x * x + of_y * y + shift


def _concept_views(name: str, counts: tuple[int, int], stream: int, seed: int) -> list[np.ndarray]:
    """Draw views of one concept, `counts[i]` from vendor i. A larger count includes the views of a smaller one."""
    concept = _concept_rows()[name]
    views: list[np.ndarray] = []
    for vendor, count in enumerate(counts):
        if count == 0:
            continue
        drawing = load_drawings()[VENDORS[vendor]][concept]
        parameters = np.random.default_rng([stream, seed, concept, vendor]).random((count, VIEW_PARAMETERS))
        views.extend(draw_views(np.repeat(drawing[None], count, axis=0), parameters))
    return views


@functools.lru_cache(maxsize=1)
def _concept_rows() -> dict[str, int]:
    return {concept["name"]: row for row, concept in enumerate(load_concepts()["concepts"])}


@functools.lru_cache(maxsize=8)
def _train_views(split: str, shots: int, seed: int, artist: str | None) -> Dataset:
    images, labels, names = [], [], load_concepts()["splits"][split]["base"]
    for label, name in enumerate(names):
        first = (shots + (label + 1) % 2) // 2 if artist is None else shots * (artist == VENDORS[0])
        images += _concept_views(name, (first, shots - first), _TRAIN, seed)
        labels += [label] * shots
    return image_dataset(images, labels, names)


@functools.lru_cache(maxsize=6)
def load_test_views(split: str, part: str, stream: int = _TEST) -> Dataset:
    """Draw the test images of a part (`"base"`, `"new"`) of a split: 24 views of each vendor's drawing."""
    names = load_concepts()["splits"][split][part]
    images = [view for name in names for view in _concept_views(name, (TEST_VIEWS, TEST_VIEWS), stream, 0)]
    return image_dataset(images, np.repeat(np.arange(len(names)), 2 * TEST_VIEWS).tolist(), names)


def _of_artist(views: Dataset, artist: str) -> Dataset:
    """Return one artist's images of :func:`load_test_views`."""
    own = VENDORS.index(artist)
    return views.select([row for row in range(len(views)) if row // TEST_VIEWS % len(VENDORS) == own])


@functools.lru_cache(maxsize=2)
def load_photographs(part: str) -> Dataset:
    """Load the images of [`load_fashion_mnist`] in RGB."""
    images, labels = load_fashion_mnist(part)
    return image_dataset(np.repeat(images[..., None], 3, axis=-1), labels.tolist(), FASHION_NAMES)


def image_dataset(images: Iterable[np.ndarray], labels: list[int], names: Iterable[str]) -> Dataset:
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        PILImage.fromarray(image).save(buffer, format="PNG", compress_level=1)
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    features = Features({"image": Image(mode="RGB"), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": encoded, "label": labels}, features=features)
