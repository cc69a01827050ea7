"""Packed texts have the features and gradients of padded ones, and where texts are padded."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.flop_counter import FlopCounterMode

from peft_ncgeo import NPTConfig
from peft_ncgeo.models.adapters import unwrap
from peft_ncgeo.models.text_encoder import encode_texts, text_features

from ..conftest import EOT, checkpoint, tiny_clip
from .packed_texts import CONFIGS, OTHERS, adapted, class_texts, passes, prompted

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def rows_of(model, texts, layer=None) -> tuple[int, int]:
    """Rows and tokens that the tower's first layer sees."""
    seen = []
    handle = (layer or unwrap(model).text_model.encoder.layers[0]).register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape[:2]))
    )
    encode_texts(model, **texts)
    handle.remove()
    return seen[0]


def is_packed(model, texts, layer=None) -> bool:
    return rows_of(model, texts, layer) != tuple(texts["input_ids"].shape)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equal_to_padded(name, attention, masked, dtype, close):
    texts = class_texts()
    if not masked:
        del texts["attention_mask"]
    packed, padded = (prompted(CONFIGS[name], pack, attention, dtype) for pack in (True, False))
    assert is_packed(packed, texts)
    assert not is_packed(padded, texts)
    close = max(close, 1e-6) if attention == "eager" else close  # its softmax is float32
    (features, gradients), (expected, exact) = passes(packed, texts), passes(padded, texts)
    torch.testing.assert_close(features, expected, atol=close, rtol=close)
    assert gradients.keys() == exact.keys() != set()
    for key in exact:
        torch.testing.assert_close(gradients[key], exact[key], atol=10 * close, rtol=close)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    texts, results = class_texts(), []
    for pack in (True, False):
        model = prompted(CONFIGS["ivlp"], pack, dtype=torch.float64).train()
        checkpoint(model, reentrant)
        results.append(passes(model, texts))
    torch.testing.assert_close(results[0], results[1], atol=1e-11, rtol=1e-11)


def test_checkpointed_layers_keep_their_mask_when_another_pass_comes_between():
    model = prompted(CONFIGS["ivlp"], True, dtype=torch.float64).train()
    expected = passes(model, class_texts())[1]
    checkpoint(model)
    model.zero_grad()
    features = encode_texts(model, **class_texts())
    with torch.no_grad():
        encode_texts(model, **class_texts(classes=7))
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_under_autocast(attention):
    texts, features = class_texts(), []
    for pack in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            features.append(passes(prompted(CONFIGS["ivlp"], pack, attention), texts)[0])
    torch.testing.assert_close(features[0], features[1], atol=0.03, rtol=0.03)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision_weights(attention):
    texts = class_texts()
    expected = passes(prompted(CONFIGS["ivlp"], False, attention), texts)[0]
    model = prompted(CONFIGS["ivlp"], True, attention)
    model.base_model.model.to(torch.bfloat16)
    torch.testing.assert_close(encode_texts(model, **texts).float(), expected, atol=0.1, rtol=0.1)


def test_over_lora():
    results = []
    for pack in (True, False):
        torch.manual_seed(0)
        base = inject_adapter_in_model(
            LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False), tiny_clip(), "lora"
        )
        torch.manual_seed(0)
        results.append(passes(get_peft_model(base, NPTConfig(num_text_tokens=4, pack_text=pack)), class_texts()))
    torch.testing.assert_close(results[0], results[1], atol=5e-5, rtol=1e-4)


def test_models_saved_with_end_token_2():
    texts = class_texts()
    texts["input_ids"][texts["input_ids"] == EOT] = 49  # the largest id ends a text there
    results = []
    for pack in (True, False):
        torch.manual_seed(0)
        model = get_peft_model(tiny_clip(eos_token_id=2), NPTConfig(num_text_tokens=4, pack_text=pack))
        results.append(passes(model, texts))
    torch.testing.assert_close(results[0], results[1], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_asked_for_what_layers_give_it_pads(option):
    packed, padded = (prompted(CONFIGS["ivlp"], pack, "eager") for pack in (True, False))
    asked = [m.base_model.model.text_model(**class_texts(), **{option: True}) for m in (packed, padded)]
    ours, theirs = (out[option.removeprefix("output_")] for out in asked)
    assert len(ours) == len(theirs) > 0
    assert all(map(torch.equal, ours, theirs))


def test_the_models_own_pass_pads():
    texts = class_texts()
    packed, padded = (prompted(CONFIGS["ivlp"], pack, dtype=torch.float64) for pack in (True, False))
    positions = torch.arange(14).expand(1, -1)
    for options in ({}, {"position_ids": positions}):
        own = packed.get_text_features(**texts, **options).pooler_output
        torch.testing.assert_close(own, encode_texts(padded, **texts), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(own, encode_texts(packed, **texts), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["plain", "prompts off", *OTHERS])
def test_texts_of_plain_models_and_other_adapters_are_packed(kind, attention):
    texts, model = class_texts(), adapted(kind, attention)
    first = unwrap(model).text_model.encoder.layers[0]
    assert is_packed(model, texts, first)
    close = 1e-6 if attention == "eager" else 1e-12
    features, gradients = passes(model, texts)
    model.zero_grad()
    expected = text_features(model, **texts)
    torch.testing.assert_close(features, expected, atol=close, rtol=close)
    (expected * torch.linspace(-1, 1, expected.numel()).view_as(expected)).sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients.pop(name), parameter.grad, atol=10 * close, rtol=close)
    assert not gradients


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, while it starts its compiler
@pytest.mark.parametrize("kind", ["prompts", "plain", "lora"])
@torch.no_grad()
def test_flex_attention_packs_too(kind):
    """Without its kernels, which take long to compile, and without gradients, which it does not have on a CPU."""
    texts = class_texts()
    make = partial(prompted, CONFIGS["ivlp"], True) if kind == "prompts" else partial(adapted, kind)
    expected = text_features(make(dtype=torch.float64), **texts)
    model = make(attention="flex_attention", dtype=torch.float64)
    with torch.compiler.set_stance("force_eager"):
        assert is_packed(model, texts, None if kind == "prompts" else unwrap(model).text_model.encoder.layers[0])
        for size in (None, 5):
            features = encode_texts(model, **texts, batch_size=size)
            torch.testing.assert_close(features, expected, atol=1e-12, rtol=1e-12)


def test_reasons_to_pad():
    texts = class_texts()
    assert not is_packed(prompted(CONFIGS["ivlp"], True), {key: value[:1] for key, value in texts.items()})
    assert not is_packed(prompted(CONFIGS["ivlp"], False), {key: value[[0, 0]] for key, value in texts.items()})
    model = prompted(CONFIGS["ivlp"], False)
    with model.disable_adapter():
        assert not is_packed(model, texts)  # what was asked for holds for the frozen model too


def test_an_adapter_around_a_whole_layer_is_not_packed():
    class Mixing(nn.Module, BaseTunerLayer):
        """Adds the mean over all tokens of a row."""

        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, hidden_states, *args, **kwargs):
            return self.base_layer(hidden_states, *args, **kwargs) + hidden_states.mean(1, keepdim=True)

    texts, model = class_texts(), adapted("plain")
    model.text_model.encoder.layers[1] = Mixing(model.text_model.encoder.layers[1])
    torch.testing.assert_close(encode_texts(model, **texts), text_features(model, **texts))


def test_words_that_differ_in_the_slots_count_where_no_prompt_replaces_them():
    texts = class_texts(slots=2)
    texts["input_ids"][::2, 1] = 9
    for name, packs in (("later", False), ("deep_text", True)):
        config = copy.deepcopy(CONFIGS[name])
        config.num_text_tokens = 2
        packed, padded = (prompted(config, pack, dtype=torch.float64) for pack in (True, False))
        assert is_packed(packed, texts) == packs
        torch.testing.assert_close(passes(packed, texts), passes(padded, texts), atol=1e-12, rtol=1e-12)


def test_a_text_alike_to_its_end_with_others():
    """One text is the beginning of another up to its [EOT]; two are the same."""
    texts = class_texts(classes=4)
    texts["input_ids"][1] = texts["input_ids"][0]
    packed, padded = (prompted(CONFIGS["coop"], pack, dtype=torch.float64) for pack in (True, False))
    torch.testing.assert_close(passes(packed, texts), passes(padded, texts), atol=1e-12, rtol=1e-12)
    texts["input_ids"][:] = texts["input_ids"][0]
    torch.testing.assert_close(passes(packed, texts), passes(padded, texts), atol=1e-12, rtol=1e-12)


def compiled_features(model, texts):
    return torch.compile(lambda **inputs: encode_texts(model, **inputs), backend="aot_eager")(**texts)


def compiled(kind: str, pack: bool = True):
    return prompted(CONFIGS["deep_text"], pack) if kind == "prompts" else adapted(kind, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["prompts", "plain", "lora", "layer norms"])
def test_compiled_it_packs_too(kind):
    """The same features and gradients, of as many operations."""
    texts, model = class_texts(), compiled(kind)
    model.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            compiled_features(tiny_clip(), texts)
        except (TypeError, TorchDynamoException) as error:
            pytest.skip(
                f"torch {torch.__version__} does not compile CLIP without prompts either: {type(error).__name__}"
            )
        found, operations = [], []
        for encode in (encode_texts, lambda model, **texts: compiled_features(model, texts)):
            encode(model, **texts)  # compiles
            model.zero_grad()
            with FlopCounterMode(display=False) as counter:
                features = encode(model, **texts)
                features.square().sum().backward()
            operations.append(counter.get_total_flops())
            found.append((features.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    assert operations[1] == operations[0]
    with FlopCounterMode(display=False) as counter:
        text_features(model, **texts)
    assert operations[0] < 3 * counter.get_total_flops(), "packed"
