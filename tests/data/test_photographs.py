"""The photographs with their two backbones: what the loader promises, and that pre-training is worth having."""

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ResNetForImageClassification,
    ViTForImageClassification,
)

from peft_ncgeo.data import load_image_demo
from peft_ncgeo.data.demo import ASSETS, FASHION_NAMES, load_fashion_mnist
from peft_ncgeo.data.photographs import ImageDemo

pytestmark = pytest.mark.slow

CLASSIFIERS = {"vit": ViTForImageClassification, "resnet": ResNetForImageClassification}
LARGEST_FILE = {"vit": 1.7e6, "resnet": 0.9e6}


@pytest.fixture(scope="module", params=CLASSIFIERS)
def backbone(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def demo(backbone) -> ImageDemo:
    return load_image_demo(backbone)


@torch.no_grad()
def features(model, pixels: torch.Tensor) -> torch.Tensor:
    """Return the input of the classification head."""
    seen = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    model(pixel_values=pixels)
    hook.remove()
    return seen[0]


def first_of_each_class(dataset, count: int) -> tuple[list, torch.Tensor]:
    labels = np.asarray(dataset[:]["label"])
    rows = np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)])
    return dataset[rows]["image"], torch.from_numpy(labels[rows])


def class_mean_accuracy(train: torch.Tensor, train_labels, test: torch.Tensor, test_labels) -> float:
    """Of the nearest class mean, after standardising by the training features."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    means = torch.stack([train[train_labels == label].mean(dim=0) for label in range(10)])
    return (torch.cdist(test, means).argmin(dim=1) == test_labels).float().mean().item()


def test_sizes_and_labels(demo):
    assert {part: len(data) for part, data in demo.splits.items()} == {"train": 2500, "validation": 500, "test": 2000}
    for part, data in demo.splits.items():
        assert set(data.column_names) == {"image", "label"}
        assert data.features["label"].names == list(FASHION_NAMES)
        assert np.bincount(data[:]["label"]).tolist() == [len(data) // 10] * 10, part
        assert data[0]["image"].mode == "RGB"
        assert data[0]["image"].size == (28, 28)


def test_splits_are_disjoint_and_the_first_ones_train():
    splits = load_image_demo().splits
    photographs = {part: [np.asarray(image).tobytes() for image in data[:]["image"]] for part, data in splits.items()}
    assert len({image for part in photographs.values() for image in part}) == 5000
    images, labels = load_fashion_mnist("train")
    for label in range(10):
        carried = np.repeat(images[labels == label][..., None], 3, axis=-1)
        of_class = {
            part: [
                image for image, its in zip(photographs[part], splits[part][:]["label"], strict=True) if its == label
            ]
            for part in ("train", "validation")
        }
        assert of_class["train"] == [image.tobytes() for image in carried[:250]]
        assert of_class["validation"] == [image.tobytes() for image in carried[250:]]


def test_model_is_a_float32_classifier_of_the_ten_names(demo, backbone):
    model = demo.model
    assert type(model) is CLASSIFIERS[backbone]
    assert not model.training
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.id2label == dict(enumerate(FASHION_NAMES))
    assert model.config.label2id == {name: label for label, name in enumerate(FASHION_NAMES)}
    with torch.no_grad():
        inputs = demo.processor(images=demo.splits["test"][:4]["image"], return_tensors="pt")
        assert model(**inputs).logits.shape == (4, 10)


def test_processor_resizes_and_normalises(backbone):
    processor = AutoImageProcessor.from_pretrained(ASSETS / f"mini_{backbone}", local_files_only=True)
    images = [np.zeros((28, 28, 3), np.uint8), np.full((50, 40, 3), 255, np.uint8)]
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32)
    torch.testing.assert_close(pixels.mean(dim=(1, 2, 3)), torch.tensor([-1.0, 1.0]))


def test_backbone_is_the_saved_one(demo, backbone):
    carried = AutoModel.from_pretrained(ASSETS / f"mini_{backbone}", local_files_only=True)
    ours, theirs = demo.model.base_model.state_dict(), carried.state_dict()
    assert ours
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    for classifier in (AutoModelForImageClassification, CLASSIFIERS[backbone]):
        native = classifier.from_pretrained(ASSETS / f"mini_{backbone}", local_files_only=True, num_labels=10)
        assert {parameter.dtype for parameter in native.parameters()} == {torch.float32}
        images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
        assert torch.equal(features(native, images), features(demo.model, images))


def test_seed_decides_the_head_alone(backbone):
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(load_image_demo(backbone).model.state_dict())
    first, again, other = models
    for name in first:
        assert torch.equal(first[name], again[name])
        new = name.startswith("classifier") and name.endswith("weight")
        assert torch.equal(first[name], other[name]) != new or name.endswith("bias"), name


def test_loading_is_silent(backbone, caplog, capfd):
    library = logging.getLogger("transformers")
    propagate, library.propagate = library.propagate, True
    try:
        load_image_demo(backbone)
    finally:
        library.propagate = propagate
    assert not caplog.records
    assert "newly initialized" not in "".join(capfd.readouterr())


def test_calls_do_not_share_what_can_be_changed(backbone):
    first = load_image_demo(backbone)
    for parameter in first.model.parameters():
        parameter.data.zero_()
    first.model.config.id2label[0] = "changed"
    first.processor.image_mean = [0.0, 0.0, 0.0]
    first.splits["test"].set_transform(lambda rows: {"label": rows["label"]})
    first.splits.pop("train")
    second = load_image_demo(backbone)
    assert all(parameter.any() for name, parameter in second.model.named_parameters() if name.endswith("weight"))
    assert second.model.config.id2label[0] == FASHION_NAMES[0]
    assert list(second.processor.image_mean) == [0.5, 0.5, 0.5]
    assert set(second.splits) == {"train", "validation", "test"}
    assert set(second.splits["test"][0]) == {"image", "label"}


def few_shot_accuracy(demo: ImageDemo, extract) -> float:
    """Of the nearest of ten class means, from 50 training and 50 test photographs a class."""
    parts = {}
    for part in ("train", "test"):
        images, labels = first_of_each_class(demo.splits[part], 50)
        parts[part] = extract(demo.processor(images=images, return_tensors="pt")["pixel_values"]), labels
    return class_mean_accuracy(*parts["train"], *parts["test"])


def test_pretraining_beats_random_weights(demo):
    torch.manual_seed(0)
    untrained = type(demo.model)(demo.model.config).eval()
    pretrained = few_shot_accuracy(demo, lambda pixels: features(demo.model, pixels))
    assert pretrained > few_shot_accuracy(demo, lambda pixels: features(untrained, pixels))


def test_resnet_beats_raw_pixels():
    """The ViT does not (61 per cent against 68): 1,500 steps leave it weak, as its docstring says."""
    demo = load_image_demo("resnet")
    pretrained = few_shot_accuracy(demo, lambda pixels: features(demo.model, pixels))
    assert pretrained > few_shot_accuracy(demo, lambda pixels: pixels.flatten(1))


def test_file_is_small_and_half(backbone):
    path = ASSETS / f"mini_{backbone}" / "model.safetensors"
    assert path.stat().st_size < LARGEST_FILE[backbone]
    for name, tensor in load_file(path).items():
        counts = name.endswith("num_batches_tracked")
        assert tensor.dtype == (torch.int64 if counts else torch.float16), name
        assert tensor.isfinite().all(), name


def test_batch_norm_statistics_survive_half_precision():
    norms = [m for m in load_image_demo("resnet").model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert norm.running_mean.isfinite().all()
        assert norm.running_mean.any()
        # Below the smallest normal number of half precision, most digits would be lost.
        assert norm.running_var.min() > torch.finfo(torch.float16).tiny
        assert norm.running_var.max() < torch.finfo(torch.float16).max
        assert norm.num_batches_tracked > 0


@pytest.mark.parametrize("backbone", ["clip", "", None])
def test_unknown_backbone_gets_one_line(backbone):
    with pytest.raises(ValueError, match=r"backbone must be one of \['resnet', 'vit'\], got ") as caught:
        load_image_demo(backbone)
    assert "\n" not in str(caught.value)
