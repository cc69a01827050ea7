"""Packed class texts give the features and gradients of padded ones."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.flop_counter import FlopCounterMode

from peft_ncgeo import NPTConfig
from peft_ncgeo.models.adapters import unwrap
from peft_ncgeo.models.families import EndOfText
from peft_ncgeo.models.text_encoder import encode_texts, text_features
from peft_ncgeo.models.text_packing import lay_out, read_texts

from ..conftest import BOS, EOT, PAD, checkpoint, tiny_clip

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CONFIGS = {
    "coop": NPTConfig.coop(num_text_tokens=4),
    "ivlp": NPTConfig.ivlp(),
    "maple": NPTConfig.maple(),
    "deep_text": NPTConfig(num_text_tokens=3, text_depth=3),
    "later": NPTConfig(num_text_tokens=2, text_depth=2, first_layer=1),
    "coupled_later": NPTConfig(
        num_text_tokens=2, num_vision_tokens=2, text_depth=2, vision_depth=1, first_layer=1, coupling="coupled"
    ),
}


def class_texts(slots: int = 4, classes: int = 12, length: int = 14) -> dict[str, torch.Tensor]:
    """`[BOS] slots name [EOT] pad`, names of one to five tokens."""
    rows = torch.full((classes, length), PAD)
    for k in range(classes):
        row = [BOS, *range(5, 5 + slots), *[20 + (3 * k + i) % 25 for i in range(1 + k % 5)], EOT]
        rows[k, : len(row)] = torch.tensor(row)
    return {"input_ids": rows, "attention_mask": (rows != PAD).long()}


def longer_name(texts: dict[str, torch.Tensor]) -> None:
    """Change the first text in place."""
    texts["input_ids"][0, 5:12] = torch.tensor([30, 31, 32, 33, 34, 35, EOT])
    texts["attention_mask"][0, 5:12] = 1


def prompted(config: NPTConfig, pack: bool, attention: str = "sdpa", dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.pack_text = pack
    model = get_peft_model(tiny_clip(attn_implementation=attention, **options).to(dtype), config)
    return model.to(dtype)


def passes(model, texts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features, and the gradients of a fixed function of them."""
    model.zero_grad()
    features = encode_texts(model, **texts)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return features.detach(), gradients


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


# ---- where it goes back to padded rows ----------------------------------------------------------------------------


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


def adapted(kind: str, attention: str = "sdpa", dtype=torch.float64):
    """CLIP under no adapter, or one of PEFT's whose weights are not zero, or with prompts switched off."""
    torch.manual_seed(0)
    base = tiny_clip(attn_implementation=attention).to(dtype)
    if kind == "plain":
        return base
    if kind == "prompts off":
        model = get_peft_model(base, copy.deepcopy(CONFIGS["ivlp"])).to(dtype)
        model.base_model.disable_adapter_layers()
        model.get_base_model().text_projection.requires_grad_(True)
        return model
    model = get_peft_model(base, OTHERS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.to(dtype)


OTHERS = {
    "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1", "text_projection"]),
    "lora of embeddings": LoraConfig(r=2, target_modules=["token_embedding", "position_embedding"]),
    "dora": LoraConfig(r=2, target_modules=["q_proj", "fc2"], use_dora=True),
    "layer norms": LNTuningConfig(target_modules=["layer_norm1", "final_layer_norm"]),
    "ia3": IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
    "whole layers": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["text_projection"]),
}


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
    return torch.compile(lambda **inputs: encode_texts(model, **inputs), backend="eager")(**texts)


def test_compiled_it_pads():
    model = prompted(CONFIGS["deep_text"], True).eval()
    texts = class_texts()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            compiled_features(tiny_clip(), texts)
        except (TypeError, TorchDynamoException) as error:
            pytest.skip(
                f"torch {torch.__version__} does not compile CLIP without prompts either: {type(error).__name__}"
            )
        expected = encode_texts(prompted(CONFIGS["deep_text"], False).eval(), **texts)
        torch.testing.assert_close(compiled_features(model, texts), expected)


# ---- what is remembered -------------------------------------------------------------------------------------------


def test_texts_changed_in_place_are_read_again():
    texts = class_texts()
    packed, padded = (prompted(CONFIGS["coop"], pack, dtype=torch.float64) for pack in (True, False))
    passes(packed, texts)
    longer_name(texts)
    torch.testing.assert_close(passes(packed, texts), passes(padded, texts), atol=1e-12, rtol=1e-12)
    texts["input_ids"].data[1] = texts["input_ids"][4]  # which leaves no trace in the tensor's version
    texts["attention_mask"].numpy()[1] = texts["attention_mask"][4].numpy()
    torch.testing.assert_close(passes(packed, texts), passes(padded, texts), atol=1e-12, rtol=1e-12)


def test_lists_take_turns_and_each_is_laid_out_once():
    rule, lists = EndOfText(EOT), [class_texts()["input_ids"], class_texts(classes=5)["input_ids"]]
    first = [read_texts(ids, rule, packed=True) for ids in lists]
    for _ in range(3):
        assert all(read_texts(ids, rule, packed=True) is texts for ids, texts in zip(lists, first, strict=True))
    with torch.inference_mode():
        assert read_texts(lists[0].clone(), rule, packed=True) is first[0]  # the same by value
    assert read_texts(lists[0], EndOfText(None), packed=True).ends != first[0].ends  # another rule is another reading


def test_texts_changed_in_inference_mode_are_read_again():
    model = prompted(CONFIGS["coop"], True)
    with torch.inference_mode():
        inside = {key: value.clone() for key, value in class_texts().items()}
        encode_texts(model, **inside)
        longer_name(inside)
        expected = encode_texts(prompted(CONFIGS["coop"], False), **inside)
        torch.testing.assert_close(encode_texts(model, **inside), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_texts_first_read_in_inference_mode_can_be_trained_on(attention):
    packed, padded = (prompted(CONFIGS["ivlp"], pack, attention, torch.float64) for pack in (True, False))
    texts = class_texts()
    with torch.inference_mode():
        encode_texts(packed, **texts)
        inside = {key: value.clone() for key, value in texts.items()}
        encode_texts(packed, **inside)
    for seen in (texts, {key: value.clone() for key, value in inside.items()}):
        torch.testing.assert_close(passes(packed, seen), passes(padded, seen), atol=1e-5, rtol=1e-6)


def test_memory_freed_and_taken_by_other_texts():
    model, padded = prompted(CONFIGS["coop"], True), prompted(CONFIGS["coop"], False)
    for seed in range(20):
        texts = class_texts()
        texts = {key: value.roll(seed % 3, 0).clone() for key, value in texts.items()}
        with torch.no_grad():
            torch.testing.assert_close(encode_texts(model, **texts), encode_texts(padded, **texts))


# ---- what it saves ------------------------------------------------------------------------------------------------


def test_flops_fall_with_the_tokens():
    texts = class_texts(classes=16)
    counts = []
    for pack in (True, False):
        model = prompted(CONFIGS["ivlp"], pack)
        with FlopCounterMode(display=False) as counter:
            passes(model, texts)
        # of the layers' products: newer torch counts attention on CPU too, which packed rows are longer in
        flops = counter.get_flop_counts()["Global"]
        counts.append(flops[torch.ops.aten.addmm] + flops[torch.ops.aten.mm])
    assert counts[0] < 0.45 * counts[1]  # 4 tokens of 14 on average are a text's own


def test_flops_under_lora_at_100_classes():
    """Names of 1 to 5 tokens in "a photo of a {}.", through the text tower and back."""
    texts = class_texts(slots=4, classes=100)
    longest = int(texts["attention_mask"].sum(1).max())
    texts = {key: value[:, :longest] for key, value in texts.items()}
    model, counts = adapted("lora", dtype=torch.float32), []
    for encode in (encode_texts, text_features):
        with FlopCounterMode(display=False) as counter:
            encode(model, **texts).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] <= 0.55 * counts[1]


def test_what_backward_keeps_falls_too_and_grows_with_the_classes():
    def kept(classes: int, pack: bool) -> int:
        seen: dict[int, int] = {}

        def note(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model = prompted(CONFIGS["ivlp"], pack)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            features = encode_texts(model, **class_texts(classes=classes))
        del features
        return sum(size for place, size in seen.items() if place not in weights)

    assert kept(100, True) < 0.55 * kept(100, False)
    assert kept(200, True) == pytest.approx(2 * kept(100, True), rel=0.15)


def test_rows_are_balanced_and_whole():
    ends = [5 + k % 7 for k in range(300)]
    ids = torch.arange(5).repeat(300, 3)[:, :14] + 0
    ids[:, 5:] = 100 + torch.arange(300)[:, None] * 14 + torch.arange(5, 14)  # every token is another
    layout = lay_out(ids, ends, 5)
    assert layout is not None
    rows, width = layout.input_ids.shape
    own = sum(end - 4 for end in ends)
    assert rows * width < 1.1 * (own + 5 * rows)
    seen, tokens = layout.mask[:, 0], layout.input_ids
    for k, end in enumerate(ends):
        row, place = divmod(int(layout.ends[k]), width)
        visible = seen[row, place]
        assert tokens[row][visible].tolist() == ids[k, : end + 1].tolist()
        assert layout.positions[row][visible].tolist() == list(range(end + 1))
    assert lay_out(ids[:2], [13, 13], 0) is None  # nothing in common and nothing to cut
