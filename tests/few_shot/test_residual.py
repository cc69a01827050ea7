"""Residual adapters: trained by images, beside other adapters, in every precision."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from peft_ncgeo import CoPAConfig
from peft_ncgeo.few_shot.adapt import adapt
from peft_ncgeo.few_shot.episodes import fit_heads
from peft_ncgeo.tuners.copa import CoPALayer, Residual

from ..conftest import pixels, tiny_vit
from ..contracts.copa_backbones import BACKBONES, adapted, first_token
from .support import (
    LABELS,
    NINE,
    TEMPERATURE,
    assert_as_before,
    cross_entropy,
    full_contrast,
    means,
    snapshot,
    support,
    tsa,
)


def maps_of(model) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.detach().clone() for name, module in model.named_modules() if isinstance(module, Residual)
    }


@pytest.mark.parametrize("batch_size", [64, 4])
@pytest.mark.parametrize(("name", "shared"), [("vit", False), ("vit", True), ("resnet", False), ("clip", False)])
def test_three_steps_by_hand(name, shared, batch_size):
    """Heads and maps trained by a loop of the test's own over another model's parameters."""
    backbone, images, labels = BACKBONES[name], pixels(9, seed=4), torch.tensor(LABELS)
    model, twin = tsa(name, shared=shared), tsa(name, shared=shared)
    lr, temperature = 0.01, 0.1 if shared else TEMPERATURE
    classifier = adapt(model, images, LABELS, 3, lr, 0.05, adapter_lr=0.3, batch_size=batch_size)

    maps = [parameter for name, parameter in twin.named_parameters() if "copa_residual" in name]
    assert len(maps) == len(backbone.places)
    image = torch.eye(backbone.width, requires_grad=True)
    prototype = image if shared else torch.eye(backbone.width, requires_grad=True)
    heads = {"params": [image] if shared else [image, prototype]}
    optimise = torch.optim.Adam([heads, {"params": maps, "lr": 0.3 * lr}], lr=lr, weight_decay=0.05)
    for _ in range(3):
        optimise.zero_grad()
        features = backbone.feature(twin, images)  # the twin's own heads are the identity
        loss = (cross_entropy if shared else full_contrast)(
            features @ image, means(features, labels) @ prototype, labels, temperature
        )
        loss.backward()
        optimise.step()
    features, image, prototype = backbone.feature(twin, images).detach(), image.detach(), prototype.detach()

    torch.testing.assert_close(tuple(classifier.heads), (image, prototype), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps_of(model), maps_of(twin), atol=1e-5, rtol=0)
    torch.testing.assert_close(classifier.prototypes, means(features, labels), atol=1e-4, rtol=1e-4)
    moved = min((value - maps_of(tsa(name))[key]).abs().max() for key, value in maps_of(model).items())
    assert moved > 0.3 * lr
    layer = next(module for module in model.modules() if isinstance(module, CoPALayer))
    assert torch.equal(layer.heads[0], classifier.heads.image)
    assert torch.equal(layer.heads[1], classifier.heads.prototype)
    out = backbone.feature(model, images)  # the adapter in the model holds the result
    torch.testing.assert_close(out, features @ image, atol=1e-4, rtol=1e-4)
    after = full_contrast if not shared else cross_entropy
    expected = after((features @ image).double(), (means(features, labels) @ prototype).double(), labels, temperature)
    assert classifier.metrics["loss"] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_batch_size_does_not_matter(name):
    results = []
    for batch_size in (64, 9, 4, 1):
        model = tsa(name)
        classifier = adapt(model, pixels(9, seed=4), LABELS, 5, batch_size=batch_size)
        results.append((tuple(classifier.heads), maps_of(model)))
    assert torch.equal(results[1][0][0], results[0][0][0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("residual", [False, True])
def test_an_adapter_starts_afresh_and_earlier_classifiers_stay(residual):
    model = get_peft_model(tiny_vit(), CoPAConfig(residual_adapters=residual)).train()
    before = snapshot(model)
    images, others = pixels(9, seed=4), pixels(30, seed=5)
    settings = {"steps": 10, "lr": 0.02}
    first = adapt(model, images, LABELS, **settings)
    assert_as_before(model, before, but="ncgeo_copa")
    learned, found = snapshot(model)["values"], first.predict_proba(others)

    words = ["heron", "stork"] * 4
    second = adapt(model, pixels(8, seed=6), words, **settings)
    assert torch.equal(first.predict_proba(others), found)
    changed = [name for name, value in snapshot(model)["values"].items() if not torch.equal(value, learned[name])]
    assert len(changed) == (2 + 6 if residual else 2)
    assert second.classes == ["heron", "stork"]

    third = adapt(model, images, LABELS, **settings)
    assert torch.equal(third.predict_proba(others), found)
    for name, value in snapshot(model)["values"].items():
        assert torch.equal(value, learned[name]), name
    assert torch.equal(first.predict_proba(others), found)


@pytest.mark.parametrize("residual", [False, True])
def test_only_the_active_adapter_is_trained(residual):
    model = get_peft_model(tiny_vit(), CoPAConfig(residual_adapters=True), adapter_name="other")
    model.add_adapter("mine", CoPAConfig(residual_adapters=residual))
    model.set_adapter("mine")
    before = snapshot(model)
    adapt(model, pixels(9, seed=4), LABELS, steps=3)
    assert_as_before(model, before, but=".mine")
    now = snapshot(model)["values"]
    changed = [name for name, value in before["values"].items() if not torch.equal(now[name], value)]
    assert len(changed) == (2 + 6 if residual else 2)


@pytest.mark.parametrize("residual", [False, True])
def test_an_adapter_from_a_file(residual, tmp_path):
    """`PeftModel.from_pretrained` loads it not to be trained; it stays so, and holds the result all the same."""
    config = {"residual_adapters": residual}
    adapted(tiny_vit(), CoPAConfig(**config)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    before = snapshot(loaded)
    images = pixels(9, seed=4)
    classifier = adapt(loaded, images, LABELS, steps=5)
    assert_as_before(loaded, before, but="ncgeo_copa")
    fresh = get_peft_model(tiny_vit(), CoPAConfig(**config))
    expected = adapt(fresh, images, LABELS, steps=5)
    assert torch.equal(classifier.heads.image, expected.heads.image)
    assert torch.equal(classifier.predict_proba(images), expected.predict_proba(images))
    assert torch.equal(first_token(loaded.get_base_model(), images), first_token(fresh.get_base_model(), images))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_nothing_but_the_adapter_gets_gradients():
    """LoRA injected before the residual adapters is trainable, and belongs to the frozen backbone here."""
    lora = LoraConfig(target_modules=["q_proj"], r=2)
    model = get_peft_model(inject_adapter_in_model(lora, tiny_vit(), "lora"), CoPAConfig(residual_adapters=True))
    before = snapshot(model)
    adapt(model, pixels(9, seed=4), LABELS, steps=2)
    assert_as_before(model, before, but="ncgeo_copa")


@pytest.mark.parametrize("residual", [False, True])
def test_in_inference_mode_and_under_autocast(residual):
    """Neither changes a number: autocast would go on using the heads that it cast in the first step."""
    config = CoPAConfig(residual_adapters=residual)
    images = pixels(9, seed=4)
    expected = adapt(adapted(tiny_vit(), config), images, LABELS, 5, lr=0.02)
    model = adapted(tiny_vit(), config)
    with torch.inference_mode():
        found = adapt(model, pixels(9, seed=4), LABELS, 5, lr=0.02)
    assert torch.equal(found.heads.image, expected.heads.image)
    features, labels = support()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = fit_heads(features, labels, 20, 0.02)
    assert torch.equal(autocast.image, fit_heads(features, labels, 20, 0.02).image)


def test_features_that_overflow():
    """The heads are finite and so is the loss, but every image would lie at 0."""
    with pytest.raises(ValueError, match="The.*not finite.*5"):
        adapt(tiny_vit(), NINE, LABELS, 5, lr=1e19)


def test_features_of_half_precision_are_trained_on_in_float32():
    features, labels = support()
    heads = fit_heads(features.bfloat16(), labels)
    assert heads.image.dtype == torch.float32
    expected = fit_heads(features.bfloat16().float(), labels)
    assert torch.equal(heads.image, expected.image)


def test_under_no_grad_and_with_the_callers_random_numbers():
    state = torch.get_rng_state()
    images, model = pixels(9, seed=4), tsa()
    state = torch.get_rng_state()
    with torch.no_grad():
        found = adapt(model, images, LABELS, 3, batch_size=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.heads.image, adapt(tsa(), images, LABELS, 3, batch_size=4).heads.image)


@pytest.mark.parametrize("residual", [False, True])
def test_a_narrow_backbone(residual):
    """Features, heads and maps are float32 whatever the backbone is."""
    images, others = pixels(9, seed=4), pixels(30, seed=5)
    for name in ("vit", "resnet"):
        build = BACKBONES[name].build
        base = build().bfloat16()
        model = get_peft_model(base, CoPAConfig(residual_adapters=residual)) if residual else base
        classifier = adapt(model, images, LABELS, 10, batch_size=4)
        tensors = [*classifier.heads, classifier.prototypes, classifier.features(others), *maps_of(model).values()]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        assert next(model.parameters()).dtype == torch.bfloat16
        expected = adapt(get_peft_model(build(), CoPAConfig(residual_adapters=residual)), images, LABELS, 10)
        assert classifier.metrics["loss"] == pytest.approx(expected.metrics["loss"], abs=0.02)
        if not residual:  # maps trained apart reach the same loss elsewhere
            found = classifier.predict_proba(others)
            torch.testing.assert_close(found, expected.predict_proba(others), atol=0.02, rtol=0)
