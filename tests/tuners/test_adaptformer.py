"""AdaptFormer beside the MLP of every block: what comes out in each family, and where it is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import CLIPModel, Dinov2Model, ViTForImageClassification

from peft_ncgeo import AdaptFormerConfig, CoPAConfig, ImageClassifier
from peft_ncgeo.models.blocks import find_mlp_norms
from peft_ncgeo.models.families import FAMILIES, family_name
from peft_ncgeo.models.towers import find_towers
from peft_ncgeo.tuners.adaptformer import AdaptFormerLayer

from ..cases import DINO, MODELS
from ..conftest import NAMES, checkpoint, pixels, tiny, tiny_clip, tiny_vit, tiny_vit_classifier
from ..errors import message
from ..models.survey.inputs import image_inputs, image_out
from ..models.survey.table import read_results
from ..models.survey.tries import specs

pytestmark = pytest.mark.filterwarnings("ignore:.*is going to be deprecated")


def family_of(model, vision):
    return FAMILIES.get(family_name(model.get_submodule(vision.layers[0])) or "", FAMILIES["resnet"])


SPECS = {spec.name: spec for spec in specs() if not spec.cls.startswith("Timm") and not spec.video}
KNOWN = [name for name in SPECS if read_results()[name]["tries"].get("b_adaptformer") == "works"]


def adapted(base, seed: int = 1, **fields):
    """A model with an adapter far from its start."""
    torch.manual_seed(seed)
    model = get_peft_model(base, AdaptFormerConfig(**{"bottleneck_dim": 4, **fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ncgeo_adaptformer" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def term(layer: AdaptFormerLayer, x: torch.Tensor) -> torch.Tensor:
    """s (W2 ReLU(W1 LN_a(x) + b1) + b2), written out."""
    held = {
        name.split("adaptformer_")[1].replace(".default", ""): p
        for name, p in layer.named_parameters()
        if "ncgeo_adaptformer" in name
    }
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    normal = normal * held["norm.weight"] + held["norm.bias"]
    hidden = (normal @ held["down.weight"].T + held["down.bias"]).clamp(min=0)
    return held["scale"] * (hidden @ held["up.weight"].T + held["up.bias"])


def add_beside_blocks(base, blocks, norm: str, layers) -> None:
    """Add the terms to what whole blocks give, by hooks: x is what enters the norm before the MLP."""
    for path, layer in zip(blocks, layers, strict=True):
        block, entered = base.get_submodule(path), []
        block.get_submodule(norm).register_forward_pre_hook(lambda _, args, e=entered: e.append(args[0].clone()))

        def add(_, args, output, e=entered, layer=layer):
            added = term(layer, e.pop())
            return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

        block.register_forward_hook(add, prepend=True)  # before Transformers' own, which keeps hidden states


def layers_of(model) -> list[AdaptFormerLayer]:
    return [module for module in model.modules() if isinstance(module, AdaptFormerLayer)]


@torch.no_grad()
@pytest.mark.parametrize("name", KNOWN)
def test_the_residual_gets_the_term_outside_of_the_block(name):
    """In every family: also where the MLP's output has a layer scale, which multiplies it alone."""
    spec = SPECS[name]
    base, model, inputs = spec.build(), adapted(spec.build()), image_inputs(spec)
    plain, tuned = image_out(spec, base, inputs), image_out(spec, model, inputs)
    vision = find_towers(base)["vision"]
    add_beside_blocks(base, vision.layers, family_of(base, vision).mlp_norm, layers_of(model))
    expected = image_out(spec, base, inputs)
    assert max(float((a - b).abs().max()) for a, b in zip(expected, plain, strict=True)) > 1e-2
    torch.testing.assert_close(tuned, expected, atol=1e-4, rtol=1e-4)


def test_the_families_of_the_issue_are_among_them():
    kinds = {family_of(SPECS[name].build(), find_towers(SPECS[name].build())["vision"]).name for name in KNOWN}
    assert kinds >= {"CLIP", "SigLIP", "SigLIP 2", "ViT", "DeiT", "DINOv2", "DINOv3", "BEiT"}


@torch.no_grad()
def test_hidden_states_hold_the_term():
    base, model = tiny_clip(), adapted(tiny_clip())
    vision = find_towers(base)["vision"]
    add_beside_blocks(base, vision.layers, "layer_norm2", layers_of(model))
    found, expected = (
        m.vision_model(pixel_values=pixels(), output_hidden_states=True).hidden_states
        for m in (model.get_base_model(), base)
    )
    assert len(found) == 5
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def drop_path():
    return tiny(Dinov2Model, type(DINO)(**{**DINO.to_dict(), "drop_path_rate": 0.9}))


def test_drop_path_leaves_the_term_alone():
    """With the MLP's output dropped for most images, those get x and the term."""
    model = adapted(drop_path())
    layer = layers_of(model)[0]
    block = model.get_base_model().encoder.layer[0].train()
    x, seen = torch.randn(64, 5, 32, generator=torch.Generator().manual_seed(3)), []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        out = block(x)
        only = seen[0] + term(layer, seen[0])
    dropped = (out - only).abs().amax((1, 2)) < 1e-5
    assert 0 < dropped.sum() < 64


@torch.no_grad()
def test_an_untrained_adapter_is_the_base_model():
    for build in (tiny_vit, MODELS["dinov2"], MODELS["siglip_vision"]):
        base = build().requires_grad_(False)
        expected = base(pixel_values=pixels()).last_hidden_state
        model = get_peft_model(base, AdaptFormerConfig(num_classes=30))
        assert torch.equal(model(pixel_values=pixels()).last_hidden_state, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("build", [tiny_vit, drop_path], ids=["vit", "drop path"])
def test_gradient_checkpointing(build, reentrant):
    """Both kinds; a pass inside has no gradient in the one, and is done twice in both."""

    def gradients(checkpointed: bool):
        model = adapted(build()).train()
        if checkpointed:
            checkpoint(model.get_base_model(), reentrant)
        torch.manual_seed(4)
        images = pixels().requires_grad_()  # reentrant checkpoints need an input that asks for gradients
        model(pixel_values=images).last_hidden_state.square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(False)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    torch.testing.assert_close(gradients(True), expected)


def test_it_compiles_without_breaks():
    model = adapted(tiny_vit_classifier())
    base = model.get_base_model()
    expected = base(pixel_values=pixels()).logits
    expected.square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    found = torch.compile(base, backend="aot_eager", fullgraph=True)(pixel_values=pixels()).logits
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, plain)


def test_no_gradient_is_lost_against_differences():
    model = adapted(tiny_vit_classifier()).double()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def value():
        return model(pixel_values=pixels().double()).logits.square().sum()

    value().backward()
    for name, parameter in parameters.items():
        entry = parameter.detach().view(-1)
        i = int(parameter.grad.abs().argmax())
        values = []
        for step in (1e-6, -2e-6):
            entry[i] += step
            with torch.no_grad():
                values.append(value())
        entry[i] += 1e-6
        assert float(parameter.grad.view(-1)[i]) == pytest.approx(float(values[0] - values[1]) / 2e-6, rel=1e-4), name


@torch.no_grad()
def test_an_image_classifier_of_clip():
    torch.manual_seed(0)
    made = ImageClassifier.from_backbone(tiny_clip(), NAMES, head="cosine", projected=False)
    model = get_peft_model(made, AdaptFormerConfig(modules_to_save=["classifier"]))
    assert model.peft_config["default"].bottleneck_dim == 1  # of 5 classes and 4 blocks
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len([name for name in trained if "ncgeo_adaptformer" in name]) == 4 * 7
    assert len(trained) == 4 * 7 + 1


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@torch.no_grad()
def test_beside_lora():
    lora = LoraConfig(target_modules=["fc1"], r=2, init_lora_weights=False)
    torch.manual_seed(2)
    base = inject_adapter_in_model(lora, tiny_vit(), adapter_name="lora")
    plain = base(pixel_values=pixels()).last_hidden_state
    model = adapted(base)
    tuned = model(pixel_values=pixels()).last_hidden_state
    assert not torch.allclose(tuned, plain, atol=1e-3)
    for layer in layers_of(model):
        layer.ncgeo_adaptformer_scale["default"].zero_()
    torch.testing.assert_close(model(pixel_values=pixels()).last_hidden_state, plain)


class WithBlocksOfItsOwn(CLIPModel):
    """A model whose first block computes something else."""

    def __init__(self, config):
        super().__init__(config)
        block = self.vision_model.encoder.layers[0]
        block.__class__ = type("Block", (type(block),), {"forward": lambda self, x, *args, **kwargs: x})


@pytest.mark.parametrize(
    ("build", "fields", "words"),
    [
        (tiny_clip, {}, "num_classes or bottleneck_dim"),
        (MODELS["resnet_classifier"], {}, "The blocks of ResNetForImageClassification are not known.*CLIP, SigLIP"),
        (MODELS["clip_text"], {"bottleneck_dim": 2}, "The blocks of CLIPTextModel are not known"),
        (SPECS["SwinForImageClassification"].build, {}, "The blocks of SwinForImageClassification are not known"),
        (lambda: tiny(WithBlocksOfItsOwn, tiny_clip().config), {"bottleneck_dim": 2}, "not known"),
        (lambda: get_peft_model(tiny_vit(), CoPAConfig()).get_base_model(), {"bottleneck_dim": 2}, "another method"),
    ],
)
def test_a_refused_model_stays_as_it_is(build, fields, words):
    model = build()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=words) as error:
        get_peft_model(model, AdaptFormerConfig(**fields))
    assert "\n" not in str(error.value)
    assert [name for name, _ in model.named_modules()] == before


@pytest.mark.parametrize(
    "fields",
    [
        {"bottleneck_dim": 0},
        {"bottleneck_dim": 2.5},
        {"num_classes": 0},
        {"num_classes": True},
        {"modules_to_save": 3},
    ],
    ids=str,
)
def test_values_out_of_range(fields):
    assert next(iter(fields)) in message(lambda: AdaptFormerConfig(**fields), (TypeError, ValueError))


def test_the_width_is_kept_in_the_config(tmp_path):
    model = get_peft_model(tiny_vit_classifier(), AdaptFormerConfig(num_classes=100))
    assert model.peft_config["default"].bottleneck_dim == 16  # 100 / 6
    model.save_pretrained(tmp_path)
    assert AdaptFormerConfig.from_pretrained(tmp_path).bottleneck_dim == 16


def test_where_it_stands():
    paths = [f"vit.layers.{i}.layernorm_after" for i in range(3)]
    base = tiny_vit_classifier()
    assert find_mlp_norms(base) == paths
    assert isinstance(base, ViTForImageClassification)
    model = adapted(base).get_base_model()
    assert [path for path, module in model.named_modules() if isinstance(module, AdaptFormerLayer)] == paths
    assert find_mlp_norms(model) == paths
