"""Tiny random models for tests; nothing here needs a network."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import peft_ncgeo  # noqa: F401  registers the PEFT types

from . import profiles  # noqa: F401  registers and loads hypothesis's
from .deprecations import deprecations_among_user_warnings, deprecations_in_logs_and_processes  # noqa: F401
from .small_demo import small_demo  # noqa: F401

IMAGE_SIZE, VOCABULARY, BOS, EOT, PAD = 16, 50, 1, 3, 0
# Of the training argument, `CHECKPOINTING`_kwargs and the models' `CHECKPOINTING`_enable; Transformers renamed them.
RENAMED = hasattr(PreTrainedModel, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if RENAMED else "gradient_checkpointing"


TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 24,
    "bos_token_id": BOS,
    "eos_token_id": EOT,
    "pad_token_id": PAD,
}
VISION = {
    "hidden_size": 40,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "projection_dim": 24,
}
VIT = {**VISION, "hidden_size": 32, "num_hidden_layers": 3, "num_labels": 5}


def tiny(cls, config, **overrides):
    """A random model, the same one for every call with the same arguments."""
    torch.manual_seed(0)
    return cls._from_config(config, **overrides).eval()


def tiny_clip(eos_token_id: int = EOT, **overrides) -> CLIPModel:
    text = {**TEXT, "eos_token_id": eos_token_id}
    return tiny(CLIPModel, CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24), **overrides)


def tiny_vit(**overrides) -> ViTModel:
    return tiny(ViTModel, ViTConfig(**VIT), **overrides)


def tiny_vit_classifier(**overrides) -> ViTForImageClassification:
    return tiny(ViTForImageClassification, ViTConfig(**VIT), **overrides)


def checkpoint(model: torch.nn.Module, reentrant: bool = False) -> None:
    """Let its layers be computed again in the backward pass."""
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})


def pixels(batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def texts(slots: int = 4, classes: int = 3) -> dict[str, torch.Tensor]:
    """Token ids `[BOS] slots.. name.. [EOT] pad`, the names one to three tokens long."""
    rows = []
    for k in range(classes):
        name = [20 + k + i for i in range(1 + k % 3)]
        row = [BOS, *range(5, 5 + slots), *name, EOT]
        rows.append(row + [PAD] * (slots + 6 - len(row)))
    input_ids = torch.tensor(rows)
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


WORDS = [
    "x",
    "a",
    "photo",
    "of",
    "the",
    "in",
    "red",
    "green",
    "blue",
    "black",
    "white",
    "cat",
    "dog",
    "panda",
    "leopard",
    "bird",
    "fish",
    ".",
    ",",
    "tree",
]


def tiny_processor() -> CLIPProcessor:
    """One token a word; ids fit the tiny models."""
    words = {word: 5 + i for i, word in enumerate(WORDS)}
    vocabulary = {"<pad>": PAD, "<bos>": BOS, "<unk>": 2, "<eos>": EOT, **words}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOT)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=16,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), fast)


NAMES = ["red cat", "blue dog", "green bird", "black fish", "white panda"]


def tiny_images(count: int = 16, names: list[str] | None = None, seed: int = 0) -> Dataset:
    """Random images whose colour depends on the label."""
    names = NAMES if names is None else names
    rng = np.random.default_rng(seed)
    labels = [i % len(names) for i in range(count)]
    arrays = [rng.integers(0, 120, (20, 20, 3)) + 135 * (np.arange(3) == label % 3) for label in labels]
    return Dataset.from_dict(
        {"image": [PILImage.fromarray(array.astype(np.uint8)) for array in arrays], "label": labels},
        features=Features({"image": Image(), "label": ClassLabel(names=names)}),
    )


@pytest.fixture
def clip() -> CLIPModel:
    return tiny_clip()


@pytest.fixture
def processor() -> CLIPProcessor:
    return tiny_processor()


def pytest_configure():
    """Collect garbage seldom: at Python's own thresholds that took a fifth of the time of PEFT's tests."""
    gc.set_threshold(100_000, 20, 20)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of one file together, and those of the Hub, whose users and adapters are made once a process."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneHub(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/hub" if nodeid.startswith("tests/hub/") else super()._split_scope(nodeid)

    return OneHub(config, log)


def pytest_collection_finish():
    """Let garbage collection skip what was imported: accelerate collects in every training, which took 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def frozen():
    gc.collect()
    gc.freeze()


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="how often each training of test_interruptions.py is killed")


@pytest.fixture
def kills(request) -> int:
    return request.config.getoption("--kills")
