"""Texts in pieces: the same features and gradients, and activations of one piece at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_ncgeo.models.text_encoder import encode_texts

from ..conftest import tiny_clip
from .packed_texts import CONFIGS, OTHERS, adapted, class_texts, prompted
from .survey.tries import specs
from .test_text_reading import own_texts

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CLASSES = 40
SIZES = [1, 7, 16, 39, 40, 1000]


def passes(model, texts, batch_size=None):
    model.zero_grad()
    features = encode_texts(model, **texts, batch_size=batch_size)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    return features.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prompts_get_the_features_and_gradients_of_one_piece(attention, pack, size):
    texts = class_texts(classes=CLASSES)
    for name in ("ivlp", "maple", "later"):
        model = prompted(CONFIGS[name], pack, attention, torch.float64)
        expected, found = passes(model, texts), passes(model, texts, size)
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("kind", ["lora", "dora", "layer norms", "whole layers"])
def test_adapters_of_peft_do_too(kind):
    assert kind in OTHERS
    texts, model = class_texts(classes=CLASSES), adapted(kind)
    torch.testing.assert_close(passes(model, texts, 7), passes(model, texts), atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize(
    "name", ["SiglipModel", "AltCLIPModel", "ChineseCLIPModel", "VisionTextDualEncoder (ViT+BERT)"]
)
def test_towers_that_are_not_packed_do_too(name):
    spec = next(spec for spec in specs() if spec.name == name)
    model, texts = spec.build().double().eval(), own_texts(spec)
    torch.testing.assert_close(passes(model, texts, 2), passes(model, texts), atol=1e-11, rtol=1e-9)


def test_pieces_without_gradient():
    texts, model = class_texts(classes=CLASSES), prompted(CONFIGS["ivlp"], True, dtype=torch.float64)
    with torch.no_grad():
        expected = encode_texts(model, **texts)
        assert not encode_texts(model, **texts, batch_size=9).requires_grad
        torch.testing.assert_close(encode_texts(model, **texts, batch_size=9), expected, atol=1e-12, rtol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(encode_texts(model, **texts, batch_size=9), expected, atol=1e-12, rtol=1e-12)
    expected, found = passes(model, texts), passes(model, texts, 9)  # rows that were remembered in inference mode
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)


def test_the_backward_pass_draws_the_same_dropout():
    """The slope of a pass with a fixed seed, by differences and by the gradient."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "fc1"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(tiny_clip().double(), config).double().train()
    texts = class_texts(classes=CLASSES)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "text_model" in n]
    way = [torch.randn_like(p) for p in trained]

    def value(step: float) -> torch.Tensor:
        torch.manual_seed(3)
        with torch.no_grad():
            for p, v in zip(trained, way, strict=True):
                p += step * v
        features = encode_texts(model, **texts, batch_size=7)
        with torch.no_grad():
            for p, v in zip(trained, way, strict=True):
                p -= step * v
        return features.square().sum()

    torch.manual_seed(3)
    gradients = torch.autograd.grad(encode_texts(model, **texts, batch_size=7).square().sum(), trained)
    slope = sum((g * v).sum() for g, v in zip(gradients, way, strict=True))
    with torch.no_grad():
        numeric = (value(1e-5) - value(-1e-5)) / 2e-5
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-8)


def saved_bytes(model, texts, batch_size) -> int:
    """Bytes of different tensors that are kept from forward to backward, parameters aside."""
    own, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = encode_texts(model, **texts, batch_size=batch_size)
    assert features.requires_grad
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "padded"])
def test_what_is_kept_does_not_grow_with_the_classes_but_for_ids_and_features(pack):
    model = prompted(CONFIGS["ivlp"], pack)
    few, many = class_texts(classes=40), class_texts(classes=400)
    width = model.get_base_model().config.projection_dim
    whole = saved_bytes(model, many, 400) - saved_bytes(model, few, 40)
    pieces = saved_bytes(model, many, 10) - saved_bytes(model, few, 10)
    assert pieces < whole / 20
    assert pieces < 360 * (14 * 8 * 4 + 4 * width + 96 * 14)


def test_many_texts_are_cut_by_their_tokens():
    model = prompted(CONFIGS["ivlp"], True)
    few, many = class_texts(classes=40), class_texts(classes=1500)
    assert saved_bytes(model, few, None) == saved_bytes(model, few, 40), "one piece"
    assert saved_bytes(model, many, None) < saved_bytes(model, many, 1500) / 20


def test_pieces_are_laid_out_once():
    model, texts = prompted(CONFIGS["ivlp"], True, dtype=torch.float64), class_texts(classes=CLASSES)
    expected = copy.deepcopy(passes(model, texts))
    for size in (7, 16, 7, None):
        torch.testing.assert_close(passes(model, texts, size), expected, atol=1e-11, rtol=1e-9)
