"""The promises that PEFT makes for any adapter, kept by every method and preset on every model it fits."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from peft import (
    AutoPeftModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from peft_ncgeo import CoPAConfig, NPTConfig, PrototypeConfig
from peft_ncgeo.geometry import simplex_etf
from peft_ncgeo.models.adapters import unwrap
from peft_ncgeo.models.image_encoder import encode_images
from peft_ncgeo.models.text_encoder import text_features
from peft_ncgeo.models.towers import find_towers
from peft_ncgeo.tuners.copa import CoPALayer

from ..conftest import TEXT, VISION, VIT, checkpoint, pixels, texts, tiny, tiny_clip, tiny_vit, tiny_vit_classifier

PHRASE = [6, 7, 8, 9]  # token ids: tiny models have no tokenizer


@dataclass
class Case:
    build: Callable
    config: Callable[[], NPTConfig | PrototypeConfig | CoPAConfig]
    parameters: int
    slots: int = 0  # text slots the adapter owns
    constants: int = 0  # numbers in the adapter's file that are not trained
    transformer: bool = True  # attention and gradient checkpointing

    @property
    def prefix(self) -> str:
        return f"{self.config().peft_type.value.lower()}_"


def clip_part(cls, config):
    return partial(tiny, cls, config)


def coop(**fields):
    return NPTConfig.coop(num_text_tokens=6, **fields)  # 16 do not fit into the tiny model's 16 positions


def ivlp(**fields):
    return NPTConfig.ivlp(**{"text_init": PHRASE, "text_depth": 2, "vision_depth": 3, **fields})


def prompt_ot(**fields):
    return NPTConfig.prompt_ot(text_init=PHRASE, **fields)


def maple(**fields):
    return NPTConfig.maple(**{"text_init": PHRASE[:2], "text_depth": 3, "vision_depth": 2, **fields})


def vpt(**fields):
    return NPTConfig.vpt(**{"vision_depth": 2, **fields})


def text_only(**fields):
    return ivlp(num_vision_tokens=0, **fields)


def prototypes(**fields):
    return PrototypeConfig(**{"projection_dim": 8, "temperature": 0.5, **fields})


def uneven(**fields):
    return prototypes(geometry="minority_margin", class_counts=[40, 20, 10, 5, 2], **fields)


def given(**fields):
    turned = simplex_etf(5, 6, seed=3) + 0.2  # neither unit rows nor an ETF
    return prototypes(geometry=turned, projection_dim=None, **fields)


def projector(width: int, dim: int) -> int:
    """Parameters of the two layers between backbone and prototypes."""
    return width * width + width + width * dim + dim


def copa_tsa(**fields):
    return CoPAConfig(residual_adapters=True, **fields)


def url(**fields):
    return CoPAConfig(shared=True, **fields)


CLIP = CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24, num_labels=5)
SIGLIP_VISION = {name: value for name, value in VISION.items() if name != "projection_dim"}
SIGLIP = SiglipConfig(
    text_config={**{k: v for k, v in TEXT.items() if k != "projection_dim"}, "hidden_size": 40, "projection_size": 40},
    vision_config=SIGLIP_VISION,
)
DINO = Dinov2Config(**{k: v for k, v in VIT.items() if k != "intermediate_size"}, mlp_ratio=2)
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
PROMPTS = {"num_vision_tokens": 8, "vision_depth": 2}
IVLP, MAPLE = 2 * 4 * 32 + 3 * 4 * 40, 3 * 2 * 32 + 2 * (32 * 40 + 40)
CASES = {
    "clip-coop": Case(tiny_clip, coop, 6 * 32, slots=6),
    "clip-ivlp": Case(tiny_clip, ivlp, IVLP, slots=4),
    "clip-ivlp-first_layer": Case(tiny_clip, partial(ivlp, first_layer=1, vision_depth=2), IVLP - 4 * 40, slots=4),
    "clip-prompt_ot": Case(tiny_clip, prompt_ot, 3 * 4 * 32 + 4 * 4 * 40, slots=4),
    "clip-vpt": Case(tiny_clip, vpt, 2 * 8 * 40),
    "clip-maple": Case(tiny_clip, maple, MAPLE, slots=2),
    "clip-maple-first_layer": Case(tiny_clip, partial(maple, first_layer=1, text_depth=2), MAPLE - 2 * 32, slots=2),
    "clip_text": Case(clip_part(CLIPTextModel, CLIP.text_config), text_only, 2 * 4 * 32, slots=4),
    "clip_text_projection": Case(
        clip_part(CLIPTextModelWithProjection, CLIP.text_config), text_only, 2 * 4 * 32, slots=4
    ),
    "clip_vision": Case(clip_part(CLIPVisionModel, CLIP.vision_config), vpt, 2 * 8 * 40),
    "clip_vision_projection": Case(clip_part(CLIPVisionModelWithProjection, CLIP.vision_config), vpt, 2 * 8 * 40),
    "clip_classifier": Case(clip_part(CLIPForImageClassification, CLIP), vpt, 2 * 8 * 40),
    "siglip-vpt": Case(clip_part(SiglipModel, SIGLIP), vpt, 2 * 8 * 40),
    "siglip_vision": Case(clip_part(SiglipVisionModel, SiglipVisionConfig(**SIGLIP_VISION)), vpt, 2 * 8 * 40),
    "vit-vpt": Case(tiny_vit, vpt, 2 * 8 * 32),
    "vit-vpt-first_layer": Case(tiny_vit, partial(vpt, first_layer=1), 2 * 8 * 32),
    "vit_classifier-vpt": Case(tiny_vit_classifier, vpt, 2 * 8 * 32),
    "deit": Case(clip_part(DeiTModel, DeiTConfig(**VIT)), vpt, 2 * 8 * 32),
    "deit_classifier": Case(clip_part(DeiTForImageClassification, DeiTConfig(**VIT)), vpt, 2 * 8 * 32),
    "dinov2": Case(clip_part(Dinov2Model, DINO), vpt, 2 * 8 * 32),
    "dinov2_classifier": Case(clip_part(Dinov2ForImageClassification, DINO), vpt, 2 * 8 * 32),
    "vit_classifier-prototypes": Case(tiny_vit_classifier, prototypes, projector(32, 8), constants=5 * 8),
    "vit_classifier-prototypes-prompts": Case(
        tiny_vit_classifier, partial(prototypes, **PROMPTS), projector(32, 8) + 2 * 8 * 32, constants=5 * 8
    ),
    "vit_classifier-prototypes-given": Case(
        tiny_vit_classifier,
        partial(given, **PROMPTS, first_layer=1),
        projector(32, 6) + 2 * 8 * 32,
        constants=5 * 6,
    ),
    "vit_classifier-prototypes-trained": Case(
        tiny_vit_classifier, partial(prototypes, **PROMPTS, trainable=True), projector(32, 8) + 2 * 8 * 32 + 5 * 8
    ),
    "dinov2_classifier-prototypes": Case(  # [CLS] beside the mean of the patches
        clip_part(Dinov2ForImageClassification, DINO),
        partial(uneven, **PROMPTS),
        projector(64, 8) + 2 * 8 * 32,
        constants=5 * 8,
    ),
    "deit_classifier-prototypes": Case(
        clip_part(DeiTForImageClassification, DeiTConfig(**VIT)),
        partial(given, **PROMPTS, trainable=True),
        projector(32, 6) + 2 * 8 * 32 + 5 * 6,
    ),
    "clip_classifier-prototypes": Case(
        clip_part(CLIPForImageClassification, CLIP),
        partial(prototypes, **PROMPTS),
        projector(40, 8) + 2 * 8 * 40,
        constants=5 * 8,
    ),
    "clip_classifier-prototypes-trained": Case(
        clip_part(CLIPForImageClassification, CLIP), partial(uneven, trainable=True), projector(40, 8) + 5 * 8
    ),
    "resnet_classifier-prototypes": Case(
        clip_part(ResNetForImageClassification, RESNET), given, projector(16, 6), constants=5 * 6, transformer=False
    ),
    "resnet_classifier-prototypes-trained": Case(
        clip_part(ResNetForImageClassification, RESNET),
        partial(uneven, trainable=True),
        projector(16, 8) + 5 * 8,
        transformer=False,
    ),
    "clip-copa": Case(tiny_clip, CoPAConfig, 2 * 24 * 24),
    "clip_vision-copa-adapters": Case(
        clip_part(CLIPVisionModel, CLIP.vision_config), copa_tsa, 2 * 40 * 40 + 4 * 2 * 40 * 40
    ),
    "clip_vision_projection-url": Case(clip_part(CLIPVisionModelWithProjection, CLIP.vision_config), url, 24 * 24),
    "siglip_vision-copa-adapters": Case(
        clip_part(SiglipVisionModel, SiglipVisionConfig(**SIGLIP_VISION)), copa_tsa, 2 * 40 * 40 + 4 * 2 * 40 * 40
    ),
    "vit-copa": Case(tiny_vit, CoPAConfig, 2 * 32 * 32),
    "vit_classifier-copa-adapters": Case(tiny_vit_classifier, copa_tsa, 2 * 32 * 32 + 3 * 2 * 32 * 32),
    "deit-url-adapters": Case(
        clip_part(DeiTModel, DeiTConfig(**VIT)), partial(copa_tsa, shared=True), 32 * 32 + 3 * 2 * 32 * 32
    ),
    "dinov2-copa": Case(clip_part(Dinov2Model, DINO), CoPAConfig, 2 * 32 * 32),
    "dinov2_classifier-copa-adapters": Case(
        clip_part(Dinov2ForImageClassification, DINO), copa_tsa, 2 * 32 * 32 + 3 * 2 * 32 * 32
    ),
    "resnet-copa": Case(clip_part(ResNetModel, RESNET), CoPAConfig, 2 * 16 * 16, transformer=False),
    "resnet_classifier-copa-adapters": Case(
        clip_part(ResNetForImageClassification, RESNET),
        copa_tsa,
        2 * 16 * 16 + 8 * 8 + 8 * 8 + 8 * 16 + 16 * 16,
        transformer=False,
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*all of them get prompts")


@pytest.fixture(params=CASES, scope="module")
def case(request) -> Case:
    return CASES[request.param]


def outputs(model, slots: int = 4) -> torch.Tensor:
    """Everything the model computes from images and texts, as one row, and what an adapter does to prototypes."""
    moved = torch.zeros(1)
    for heads in [layer.heads for layer in model.modules() if isinstance(layer, CoPALayer)]:
        if heads:
            moved = (heads[1] - torch.eye(len(heads[1]))).sum()[None]
    out = model_outputs(model, slots)
    return torch.cat([out, moved.to(out.dtype)])


def model_outputs(model, slots: int) -> torch.Tensor:
    inputs = texts(max(slots, 4))
    towers = find_towers(unwrap(model))
    if hasattr(unwrap(model), "get_image_features"):
        image = encode_images(model, pixels()).flatten()
        if isinstance(unwrap(model), SiglipModel):
            return image
        return torch.cat([image, text_features(model, **inputs).flatten()])
    images = pixels().to(unwrap(model).dtype)  # ResNet does not cast them itself
    out = model(**inputs) if "text" in towers else model(pixel_values=images)
    names = ("logits", "text_embeds", "image_embeds", "pooler_output", "last_hidden_state")
    found = [out[name].flatten() for name in names if out.get(name) is not None]
    return torch.cat(found[:1] if "logits" in out else found)


def adapted(case: Case, seed: int = 1, build=None, name: str = "default"):
    torch.manual_seed(seed)
    model = get_peft_model((build or case.build)(), case.config(), adapter_name=name)
    far = 0.05 if case.prefix == "ncgeo_copa_" else 0.3  # so that equality means something; d x d maps act d times
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * far)
    return model.eval()


def assert_same(got: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    """Bit-equal; coupled prompts pass through a matrix product whose last bit depends on where the weights lie."""
    if getattr(case.config(), "coupling", None) == "coupled":
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    else:
        assert torch.equal(got, expected)


def saved(case: Case, tmp_path, with_base: bool = False):
    """An adapter on disk; `with_base` saves the base beside it, as a hub would have it."""
    model = adapted(case)
    if with_base:
        case.build().save_pretrained(tmp_path / "base")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_only_its_own_parameters_are_trained(case):
    model = adapted(case)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == case.parameters
    assert all(f".{case.prefix}" in name and p.dtype == torch.float32 for name, p in trainable.items())


def test_every_parameter_matters_and_gets_gradient(case):
    model = adapted(case)
    outputs(model, case.slots).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@torch.no_grad()
def test_disabled_adapter_is_the_base_model(case):
    model, base = adapted(case), outputs(case.build().requires_grad_(False), case.slots)
    assert not torch.allclose(outputs(model, case.slots), base, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case.slots), base)
    assert not torch.allclose(outputs(model, case.slots), base, atol=1e-3)


@torch.no_grad()
def test_outputs_keep_their_shape(case):
    """Prompts leave no tokens behind: heads that average patches see patches only."""
    base, model = case.build(), adapted(case).get_base_model()
    if hasattr(base, "get_image_features") or hasattr(base, "vision_model"):
        base, model = base.vision_model, model.vision_model
    inputs = texts(max(case.slots, 4)) if "text" in find_towers(base) else {"pixel_values": pixels()}
    for name, value in base(**inputs).items():
        assert model(**inputs)[name].shape == value.shape, name


@torch.no_grad()
def test_save_and_load(case, tmp_path):
    model, path = saved(case, tmp_path)
    assert sorted(p.name for p in path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(case.build(), path)
    assert_same(outputs(loaded, case.slots), outputs(model, case.slots), case)
    assert not any(p.requires_grad for p in loaded.parameters())


@torch.no_grad()
def test_load_with_low_cpu_memory(case, tmp_path):
    model, path = saved(case, tmp_path)
    loaded = PeftModel.from_pretrained(case.build(), path, low_cpu_mem_usage=True)
    assert_same(outputs(loaded, case.slots), outputs(model, case.slots), case)


@torch.no_grad()
def test_load_with_auto_peft_model(case, tmp_path):
    model, path = saved(case, tmp_path, with_base=True)
    loaded = AutoPeftModel.from_pretrained(path)
    assert type(loaded.get_base_model()) is type(case.build())
    assert_same(outputs(loaded, case.slots), outputs(model, case.slots), case)


@torch.no_grad()
def test_native_from_pretrained(case, tmp_path):
    model, path = saved(case, tmp_path, with_base=True)
    loaded = type(case.build()).from_pretrained(path)
    assert_same(outputs(loaded, case.slots), outputs(model, case.slots), case)


@torch.no_grad()
def test_native_load_adapter(case, tmp_path):
    model, path = saved(case, tmp_path)
    loaded = case.build().requires_grad_(False)
    base = outputs(loaded, case.slots)
    info = loaded.load_adapter(path, adapter_name="mine")
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert_same(outputs(loaded, case.slots), outputs(model, case.slots), case)
    loaded.disable_adapters()
    assert torch.equal(outputs(loaded, case.slots), base)


@torch.no_grad()
def test_injection_by_a_state_dict_is_injection_by_the_config(case, recwarn):
    """PEFT offers both; layers that an adapter needs without a parameter in them are in no state dict."""
    torch.manual_seed(3)
    given = inject_adapter_in_model(case.config(), case.build())
    tensors = get_peft_model_state_dict(given)
    recwarn.clear()
    injected = inject_adapter_in_model(case.config(), case.build(), state_dict=tensors)
    assert not [w for w in recwarn if "inconsistency" in str(w.message)]
    assert not set_peft_model_state_dict(injected, tensors).unexpected_keys
    assert_same(outputs(injected.eval(), case.slots), outputs(given.eval(), case.slots), case)


@torch.no_grad()
def test_two_adapters(case):
    model = adapted(case, name="first")
    first = outputs(model, case.slots)
    torch.manual_seed(5)
    model.add_adapter("second", case.config())
    assert torch.equal(outputs(model, case.slots), first)
    model.set_adapter("second")
    second = outputs(model, case.slots)
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("first")
    assert torch.equal(outputs(model, case.slots), first)
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="active which is now deleted"):
        model.delete_adapter("second")
    assert model.active_adapters == ["first"]
    assert torch.equal(outputs(model, case.slots), first)
    assert not any("second" in name for name, _ in model.named_parameters())


@torch.no_grad()
def test_deleting_an_inactive_adapter_changes_nothing(case):
    model = adapted(case, name="first")
    first = outputs(model, case.slots)
    model.add_adapter("second", case.config())
    model.delete_adapter("second")
    assert torch.equal(outputs(model, case.slots), first)


def test_two_active_adapters_are_refused(case):
    model = adapted(case)
    model.add_adapter("second", case.config())
    with pytest.raises(ValueError, match="One adapter of this kind can be active"):
        model.base_model.set_adapter(["default", "second"])


def test_merging_is_refused(case):
    with pytest.raises(ValueError, match="cannot be merged"):
        adapted(case).merge_and_unload()


@torch.no_grad()
def test_unload_gives_the_base_back(case):
    base = case.build().requires_grad_(False)  # SigLIP's pooling takes another path where weights need gradients
    unloaded = adapted(case).unload()
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in base.named_modules()]
    assert torch.equal(outputs(unloaded, case.slots), outputs(base, case.slots))


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(case, clone):
    model = adapted(case)
    before = outputs(model, case.slots)
    twin = clone(model)
    assert torch.equal(outputs(twin, case.slots), before)
    for name, parameter in twin.named_parameters():
        if case.prefix in name:
            parameter.zero_()
    assert torch.equal(outputs(model, case.slots), before)
    assert not torch.allclose(outputs(twin, case.slots), before, atol=1e-3)


def gradients(model, slots: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    outputs(model, slots).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_changes_nothing(case):
    if not case.transformer:
        assert not case.build().supports_gradient_checkpointing
        return
    model = adapted(case).train()
    expected = gradients(model, case.slots)
    checkpoint(model)
    torch.testing.assert_close(gradients(model, case.slots), expected)


def test_eager_equals_sdpa(case):
    if not case.transformer:
        assert not case.build()._supports_sdpa
        return
    eager, sdpa = (
        gradients(adapted(case, build=lambda i=i: case.build(attn_implementation=i)), case.slots)
        for i in ("eager", "sdpa")
    )
    torch.testing.assert_close(eager, sdpa, atol=5e-5, rtol=1e-4)


def test_bf16_base_keeps_float32_parameters(case):
    full = adapted(case)
    half = adapted(case, build=lambda: case.build().to(torch.bfloat16))
    assert all(p.dtype == torch.float32 for p in half.parameters() if p.requires_grad)
    out = outputs(half, case.slots)
    assert out.dtype == (torch.float32 if case.prefix == "ncgeo_prototype_" else torch.bfloat16)
    torch.testing.assert_close(out.float(), outputs(full, case.slots), atol=0.1, rtol=0.1)
    assert all(torch.isfinite(g).all() for g in gradients(half, case.slots).values())


def test_autocast(case):
    model = adapted(case)
    expected = outputs(model, case.slots)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = outputs(model, case.slots)
    torch.testing.assert_close(out.float(), expected, atol=0.1, rtol=0.1)


def test_missing_and_unexpected_keys_are_refused(case, tmp_path):
    _, path = saved(case, tmp_path)
    file = path / "adapter_model.safetensors"
    whole = {key: value.clone() for key, value in load_file(file).items()}  # not the file, which is written over
    for key in whole:
        save_file({k: v for k, v in whole.items() if k != key}, file)
        with pytest.raises(ValueError, match=rf"missing .*{case.prefix}"):
            PeftModel.from_pretrained(case.build(), path)
    extra = re.sub(rf"{case.prefix}[a-z]+", f"{case.prefix}other", key)
    save_file({**whole, extra: whole[key].clone()}, file)
    with pytest.raises(ValueError, match=rf"unexpected .*{case.prefix}other"):
        PeftModel.from_pretrained(case.build(), path)


def test_adapter_file_holds_its_own_tensors_only(case, tmp_path):
    _, path = saved(case, tmp_path)
    tensors = load_peft_weights(str(path), device="cpu")
    assert all(f".{case.prefix}" in name for name in tensors)
    assert sum(v.numel() for v in tensors.values()) == case.parameters + case.constants
