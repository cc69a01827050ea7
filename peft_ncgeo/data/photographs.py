"""Built-in transfer task without download: Fashion-MNIST with image backbones that have never seen it.

The included ViT and ResNet were pre-trained only on labels of emoji drawings. Their transfer to photographs is modest:
with all 3,000 training photographs, linear probes on frozen features reach 73 (ViT) and 80.5 per cent (ResNet), and
83 on raw pixels. This is a small-scale demonstration, not a benchmark.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from datasets import DatasetDict
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedModel,
    ResNetForImageClassification,
    ResNetModel,
    ViTForImageClassification,
    ViTModel,
)

from .demo import ASSETS, FASHION_NAMES, load_photographs

TRAIN_PER_CLASS = 250  # of the 300 included photographs per class; the rest are for validation

# Classifier, bare backbone, and the backbone's loading arguments.
_ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel], dict[str, Any]]] = {
    "vit": (ViTForImageClassification, ViTModel, {"add_pooling_layer": False}),
    "resnet": (ResNetForImageClassification, ResNetModel, {}),
}


class ImageDemo(NamedTuple):
    """Result of [`load_image_demo`]: `splits` (a `DatasetDict`), `processor`, `model` (float32, eval mode)."""

    splits: DatasetDict
    processor: BaseImageProcessor
    model: PreTrainedModel


def load_image_demo(backbone: str = "vit") -> ImageDemo:
    """Load ten classes of photographs together with a small pre-trained image classifier, without network.

    The head is new and drawn from torch's global generator: call `torch.manual_seed` before to get the same head in
    each call. All other weights are pre-trained and the same in every call.

    Args:
        backbone: `"vit"` (four layers of width 128) or `"resnet"` (three stages, up to 128 channels).

    Returns:
        An [`ImageDemo`]. Its `splits`, all with the columns `image` (RGB, 28 x 28) and `label` (a `ClassLabel`):
        `train` (250 photographs per class), `validation` (50 others) and `test` (200 per class, from Fashion-MNIST's
        own test set).

    Raises:
        ValueError: `backbone` is unknown.

    Example:
        >>> from peft_ncgeo.data import load_image_demo
        >>> splits, processor, model = load_image_demo("vit")
        >>> len(splits["train"]), len(splits["validation"]), len(splits["test"])
        (2500, 500, 2000)
        >>> inputs = processor(images=splits["test"]["image"][:8], return_tensors="pt")
        >>> model(**inputs).logits.shape
        torch.Size([8, 10])
    """
    if backbone not in _ARCHITECTURES:
        raise ValueError(f"backbone must be one of {sorted(_ARCHITECTURES)}, got {backbone!r}.")
    folder = ASSETS / f"mini_{backbone}"
    splits = load_photograph_splits().with_format(None)  # copies that share the images, see `load_demo`
    return ImageDemo(splits, AutoImageProcessor.from_pretrained(folder), _create_classifier(backbone))


@functools.lru_cache(maxsize=1)
def load_photograph_splits() -> DatasetDict:
    """Return the splits of [`load_image_demo`], which are cached: copy them before changing a format."""
    photographs = load_photographs("train")
    labels = np.asarray(photographs[:]["label"])
    rows = [np.flatnonzero(labels == label) for label in range(len(FASHION_NAMES))]
    return DatasetDict(
        train=photographs.select(np.sort(np.concatenate([of_class[:TRAIN_PER_CLASS] for of_class in rows]))),
        validation=photographs.select(np.sort(np.concatenate([of_class[TRAIN_PER_CLASS:] for of_class in rows]))),
        test=load_photographs("test"),
    )


def _create_classifier(backbone: str) -> PreTrainedModel:
    classifier, bare, arguments = _ARCHITECTURES[backbone]
    folder = ASSETS / f"mini_{backbone}"
    names = dict(enumerate(FASHION_NAMES))
    config = AutoConfig.from_pretrained(folder, id2label=names, label2id={name: i for i, name in names.items()})
    model = classifier(config)
    # Not `classifier.from_pretrained`: it would warn about the new head, which is wanted here.
    model.base_model.load_state_dict(bare.from_pretrained(folder, **arguments).state_dict())
    return model.eval()
