"""Prototypes in the place of a linear head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import Dinov2ForImageClassification, ResNetForImageClassification, pipeline

from peft_ncgeo import PrototypeConfig
from peft_ncgeo.geometry import minority_margin, simplex_etf
from peft_ncgeo.models.heads import classifier, linear_classifier, linear_parameter
from peft_ncgeo.models.image_encoder import encode_and_classify

from ..cases import DINO, PROMPTS, RESNET, prototypes, uneven
from ..conftest import pixels, tiny, tiny_images, tiny_processor, tiny_vit_classifier
from ..losses.batches import unit_rows
from .prototype_models import adapted, logits, points


def tensors(model, adapter: str = "default") -> dict[str, np.ndarray]:
    """The head's own numbers as float64: hidden.weight, hidden.bias, output.weight, output.bias, prototypes."""
    prefix = "base_model.model.classifier.ncgeo_prototype_"
    return {
        name.removeprefix(prefix).replace(f".{adapter}.", ".").replace("classifier.", ""): value.double().numpy()
        for name, value in model.state_dict().items()
        if name.startswith(prefix) and f".{adapter}." in name
    }


@torch.no_grad()
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("base", ["vit", "dinov2", "resnet"])
def test_logits_are_cosines_with_the_prototypes_over_the_temperature(base, trainable):
    model = {
        "vit": tiny_vit_classifier,
        "dinov2": lambda: tiny(Dinov2ForImageClassification, DINO),
        "resnet": lambda: tiny(ResNetForImageClassification, RESNET),
    }[base]()
    entering: list[torch.Tensor] = []
    handle = model.classifier.register_forward_pre_hook(lambda _, args: entering.append(args[0].flatten(1)))
    logits(model)  # without prompts the features are the base model's
    handle.remove()
    model = adapted(uneven(temperature=0.2, trainable=trainable), base=model)
    own, x = tensors(model), entering[0].double().numpy()
    hidden = np.maximum(x @ own["hidden.weight"].T + own["hidden.bias"], 0)
    h = unit_rows(hidden @ own["output.weight"].T + own["output.bias"])
    cosines = h @ unit_rows(own["prototypes"]).T
    out = logits(model)
    np.testing.assert_allclose(out, cosines / 0.2, atol=2e-6)
    nearest = np.linalg.norm(h[:, None] - unit_rows(own["prototypes"]), axis=-1).argmin(1)
    np.testing.assert_array_equal(out.argmax(1), nearest)
    double = model.double()(pixel_values=pixels().double()).logits
    assert double.dtype == torch.float64
    np.testing.assert_allclose(double, cosines / 0.2, atol=2e-6)  # x came in float32


@torch.no_grad()
def test_features_and_weights_that_losses_see():
    """`h` enters the prototypes, and logits are `h . w` over the temperature with w of length 1."""
    model = adapted(prototypes(trainable=True, temperature=0.2, prototypes_per_class=7))
    features, out = encode_and_classify(model, pixels())
    head = classifier(model)
    assert linear_classifier(model) is head
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(features @ head.weight.T / 0.2, out)
    assert (head.copies, head.temperature, head.bias) == (7, 0.2, None)
    with pytest.raises(ValueError, match="PrototypeClassifier, not one linear layer"):
        linear_parameter(model)
    with model.disable_adapter():
        assert classifier(model) is model.get_base_model().classifier.base_layer
        features, out = encode_and_classify(model, pixels())
        assert features.shape[1] == 32
        assert torch.equal(out, logits(tiny_vit_classifier()))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (lambda: prototypes(), lambda: simplex_etf(5, 8)),
        (lambda: PrototypeConfig(), lambda: simplex_etf(5, 128)),
        (lambda: uneven(margin_strength=0.7), lambda: minority_margin([40, 20, 10, 5, 2], 8, 0.7)),
        (
            lambda: PrototypeConfig(geometry="minority_margin", class_counts=np.array([9, 7, 5, 3, 1]), num_classes=5),
            lambda: minority_margin([9, 7, 5, 3, 1], 128, 0.5),
        ),
        (lambda: PrototypeConfig(geometry=3 * points()), lambda: torch.from_numpy(unit_rows(points().numpy()))),
        (
            lambda: PrototypeConfig(geometry=points().double().numpy()),
            lambda: torch.from_numpy(unit_rows(points().numpy())),
        ),
        (lambda: PrototypeConfig(geometry=torch.eye(5).tolist()), lambda: torch.eye(5)),
    ],
    ids=["etf", "default", "minority", "minority_numpy", "tensor", "numpy", "list"],
)
def test_geometries(config, expected):
    for seed in (0, 1):  # the same whatever the seed
        torch.manual_seed(seed)
        made = config()
        weight = classifier(get_peft_model(tiny_vit_classifier(), made)).weight
        np.testing.assert_allclose(np.linalg.norm(made.prototypes(), axis=1), 1, atol=1e-12)
        torch.testing.assert_close(weight, expected().float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("trainable", [False, True])
def test_training_moves_prototypes_only_where_told(trainable):
    model = adapted(prototypes(trainable=trainable))
    before = classifier(model).prototypes.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(pixel_values=pixels(), labels=torch.tensor([0, 3, 3])).loss.backward()
        optimizer.step()
    head = classifier(model)
    assert torch.equal(head.prototypes, before) != trainable
    assert head.prototypes.requires_grad == trainable
    assert isinstance(head.prototypes, torch.nn.Parameter) == trainable
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(5))


@torch.no_grad()
def test_prototypes_stay_float32_on_a_narrow_base(tmp_path):
    base = tiny_vit_classifier
    model = adapted(PrototypeConfig(geometry=points()), base=base().bfloat16())
    assert classifier(model).prototypes.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base().bfloat16(), tmp_path)
    assert classifier(loaded).prototypes.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(model))


@torch.no_grad()
def test_a_whole_model_in_bfloat16_works():
    """As `bf16_full_eval` makes it."""
    model = adapted()
    expected = logits(model)
    out = logits(model.bfloat16())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)


@torch.no_grad()
def test_adapters_of_different_geometries(tmp_path):
    configs = {
        "etf": prototypes(**PROMPTS),
        "wide": uneven(),
        "given": PrototypeConfig(geometry=points(), trainable=True, temperature=0.3),
    }
    torch.manual_seed(1)
    model = get_peft_model(tiny_vit_classifier(), configs["etf"], adapter_name="etf").eval()
    for name in ("wide", "given"):
        model.add_adapter(name, configs[name])
    out = {}
    for name in configs:
        model.set_adapter(name)
        out[name] = logits(model)
        own = tensors(model, name)["prototypes"]
        assert classifier(model).temperature == configs[name].temperature
        np.testing.assert_allclose(classifier(model).weight, unit_rows(own), atol=1e-6)
    assert not torch.allclose(out["etf"], out["wide"], atol=1e-3)
    model.save_pretrained(tmp_path)
    model.set_adapter("etf")
    model.delete_adapter("wide")
    assert torch.equal(logits(model), out["etf"])
    model.set_adapter("given")
    assert torch.equal(logits(model), out["given"])
    assert not [name for name in model.state_dict() if ".wide." in name]
    loaded = PeftModel.from_pretrained(tiny_vit_classifier(), tmp_path / "given", adapter_name="given")
    for name in ("etf", "wide"):
        loaded.load_adapter(tmp_path / name, adapter_name=name)
    for name in ("wide", "given", "etf"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), out[name])
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny_vit_classifier().requires_grad_(False)))


@torch.no_grad()
def test_image_classification_pipeline(tmp_path):
    tiny_vit_classifier().save_pretrained(tmp_path / "base")
    model = adapted(base=tiny_vit_classifier().from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    processor = tiny_processor().image_processor
    images = list(tiny_images(6)["image"])
    inputs = processor(images=images, return_tensors="pt")
    shares = model(**inputs).logits.softmax(1)
    names = model.get_base_model().config.id2label
    expected = [names[int(k)] for k in shares.argmax(1)]
    plain = [names[int(k)] for k in tiny_vit_classifier()(**inputs).logits.argmax(1)]
    assert expected != plain
    for source in (model.get_base_model(), str(tmp_path / "adapter")):
        classify = pipeline("image-classification", model=source, image_processor=processor)
        results = classify(images, top_k=1)
        assert [result[0]["label"] for result in results] == expected
        np.testing.assert_allclose([result[0]["score"] for result in results], shares.amax(1), atol=1e-6)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_beside_lora(tmp_path):
    """The documented way to combine the two: LoRA injected first, prototypes without prompts on top."""
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=4)
    torch.manual_seed(3)
    vit = inject_adapter_in_model(lora, tiny_vit_classifier(), adapter_name="lora")
    model = adapted(prototypes(), base=vit, seed=4)  # also moves LoRA's second factors away from 0
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len([name for name in trained if ".lora_" in name]) == 2 * 2 * 3  # two factors, two targets, three layers
    assert len([name for name in trained if ".ncgeo_prototype_" in name]) == 4
    assert len(trained) == 12 + 4
    expected = logits(model)
    expected.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert all(".ncgeo_prototype_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert all(".lora_" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))

    torch.manual_seed(5)
    vit = tiny_vit_classifier()
    without_lora = PeftModel.from_pretrained(tiny_vit_classifier(), tmp_path)
    vit.load_adapter(tmp_path / "lora", adapter_name="lora")
    without_prototypes = logits(vit)
    loaded = PeftModel.from_pretrained(vit, tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert not torch.allclose(logits(without_lora), expected, atol=1e-3)
    assert not torch.allclose(without_prototypes, expected, atol=1e-3)
    assert not torch.allclose(without_prototypes, logits(tiny_vit_classifier()), atol=1e-3)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(tiny_vit_classifier().requires_grad_(False)))


@torch.no_grad()
def test_it_is_exported_for_any_number_of_images():
    """Before its first pass, in which the head looks whether its prototypes were loaded."""
    model = adapted().get_base_model()
    batch = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(model, (pixels(3),), dynamic_shapes=batch, strict=False).module()
    for images in (1, 3, 7):
        expected = model(pixels(images)).logits
        torch.testing.assert_close(exported(pixels(images)).logits, expected, atol=1e-5, rtol=1e-5)
