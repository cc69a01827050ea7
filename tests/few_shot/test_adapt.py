"""A model adapted to a few images: the classifier that comes back, and the model that is left."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_ncgeo import CoPAConfig, NPTConfig
from peft_ncgeo.classifiers.few_shot import FewShotClassifier
from peft_ncgeo.few_shot.adapt import adapt
from peft_ncgeo.few_shot.episodes import fit_heads
from peft_ncgeo.models.adapters import unwrap
from peft_ncgeo.tuners.copa import CoPALayer

from ..conftest import pixels, tiny_vit
from ..contracts.copa_backbones import BACKBONES, adapted, first_token
from ..losses.batches import unit_rows
from .support import (
    LABELS,
    NINE,
    TEMPERATURE,
    URL,
    assert_as_before,
    cross_entropy,
    full_contrast,
    loop,
    means,
    snapshot,
    tsa,
)


def count_passes(model) -> list[int]:
    """Images in each pass through the backbone, seen at its first convolution."""
    sizes: list[int] = []
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    first.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    return sizes


MODELS = ["vit", "dinov2", "resnet", "resnet_classifier", "clip", "clip_vision", "siglip_vision"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "peft"])
@pytest.mark.parametrize("name", MODELS)
def test_heads_are_those_of_the_features(name, wrapped):
    """By hand on the model's own output; the backbone stays as it is and sees every image once."""
    backbone, images, labels = BACKBONES[name], pixels(9, seed=4), torch.tensor(LABELS)
    model = backbone.build().train()
    features = backbone.feature(backbone.build(), images).detach()
    if wrapped:
        model = adapted(model, CoPAConfig()).train()  # far from its start, which must not matter
    next(model.parameters()).requires_grad_(wrapped)  # other than the rest
    model.training = False
    sizes = count_passes(model)
    before = snapshot(model)
    classifier = adapt(model, images, LABELS, steps=20, batch_size=4)
    assert sizes == [4, 4, 1]
    assert_as_before(model, before, but="ncgeo_copa" if wrapped else "\n")

    expected = fit_heads(features, labels, 20)
    torch.testing.assert_close(tuple(classifier.heads), tuple(expected), atol=2e-5, rtol=0)
    assert (expected.image - torch.eye(backbone.width)).abs().max() > 5e-3
    torch.testing.assert_close(classifier.prototypes, means(features, labels), atol=1e-5, rtol=1e-5)
    assert classifier.classes == [0, 1, 2]
    heads = [head.double() for head in classifier.heads]
    instances, prototypes = features.double() @ heads[0], means(features, labels).double() @ heads[1]
    loss = full_contrast(instances, prototypes, labels, TEMPERATURE)
    assert classifier.metrics["loss"] == pytest.approx(float(loss), abs=1e-4)
    for key, pair in (("gap_before", (features, means(features, labels))), ("gap_after", (instances, prototypes))):
        centres = [unit_rows(value.double()).mean(0) for value in pair]
        assert classifier.metrics[key] == pytest.approx(float((centres[0] - centres[1]).norm()), abs=1e-5)

    others = pixels(20, seed=7)
    found = classifier.predict_proba(others)
    expected = backbone.feature(backbone.build(), others).double() @ heads[0]
    cosines = unit_rows(expected.detach()) @ unit_rows(prototypes).T
    torch.testing.assert_close(found.double(), (cosines / TEMPERATURE).softmax(1), atol=1e-4, rtol=0)
    if wrapped:
        layer = next(module for module in model.modules() if isinstance(module, CoPALayer))
        for mine, given in zip(layer.heads, classifier.heads, strict=True):
            assert torch.equal(mine, given)
        out = backbone.feature(model.eval(), others)  # with the adapter on the model gives x Theta_I
        torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_url_on_a_model(name):
    backbone, images, labels = BACKBONES[name], pixels(9, seed=4), torch.tensor(LABELS)
    model = get_peft_model(backbone.build(), CoPAConfig(shared=True))
    classifier = adapt(model, images, LABELS, **URL)
    features = backbone.feature(backbone.build(), images).detach()
    expected = loop(
        features.double(), labels, cross_entropy, lambda p: torch.optim.Adadelta(p, lr=0.1), 40, True, temperature=0.1
    )
    torch.testing.assert_close([head.double() for head in classifier.heads], list(expected), atol=1e-4, rtol=0)
    assert torch.equal(*classifier.heads)
    assert classifier.temperature == 0.1
    loss = cross_entropy(features.double() @ expected[0], means(features, labels).double() @ expected[0], labels, 0.1)
    assert classifier.metrics["loss"] == pytest.approx(float(loss), abs=1e-4)


def test_the_configs_temperature_counts():
    images = pixels(9, seed=4)
    features = first_token(tiny_vit(), images).detach().double()
    model = get_peft_model(tiny_vit(), CoPAConfig(temperature=0.5))
    classifier = adapt(model, images, LABELS, steps=5, lr=0.01, weight_decay=0.0)
    torch.testing.assert_close(
        [head.double() for head in classifier.heads],
        list(
            loop(
                features,
                torch.tensor(LABELS),
                full_contrast,
                lambda p: torch.optim.Adam(p, lr=0.01),
                5,
                temperature=0.5,
            )
        ),
        atol=1e-4,
        rtol=0,
    )
    assert classifier.temperature == 0.5


def test_other_adapters_belong_to_the_backbone():
    images, labels = pixels(9, seed=4), torch.tensor(LABELS)
    torch.manual_seed(2)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    for config in (lora, NPTConfig.vpt(vision_depth=2)):
        model = get_peft_model(tiny_vit(), config)
        features = first_token(model.get_base_model().eval(), images).detach()
        assert not torch.allclose(features, first_token(tiny_vit(), images), atol=1e-3)
        before = snapshot(model)
        classifier = adapt(model, images, LABELS, steps=5)
        torch.testing.assert_close(classifier.prototypes, means(features, labels), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tuple(classifier.heads), tuple(fit_heads(features, labels, 5)), atol=1e-5, rtol=0)
        assert_as_before(model, before)


@pytest.mark.parametrize("where", ["forward", "recomputed", "after", "first"])
def test_a_stop_by_hand_leaves_the_adapter_as_it_was(where):
    """Ctrl-C in a pass through the backbone: at first, amid training, in a backward pass, after the last step."""
    steps, batches = 4, 3  # of 4, 4 and 1 images; each is computed twice a step, and the set once before and after
    stop = {
        "first": 2,
        "forward": batches + 2 * batches + 2,
        "recomputed": batches + 2 * batches + batches + 2,
        "after": batches + steps * 2 * batches + 2,
    }[where]
    model = adapted(tiny_vit(), CoPAConfig(residual_adapters=True)).train()
    before, passes = snapshot(model), []

    def interrupt(module, args, output):
        passes.append(torch.is_grad_enabled())
        if len(passes) == stop:
            raise KeyboardInterrupt

    handle = model.get_base_model().embeddings.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        adapt(model, NINE, LABELS, steps, batch_size=4)
    handle.remove()
    assert len(passes) == stop
    assert passes[-1] == (where in ("forward", "recomputed"))
    assert_as_before(model, before)
    found = adapt(model, NINE, LABELS, 2)  # and it can be adapted all the same
    assert torch.equal(found.heads.image, adapt(tsa(), NINE, LABELS, 2).heads.image)


@pytest.mark.parametrize("residual", [False, True])
def test_passes_through_the_backbone(residual):
    """Frozen: each image once, whatever the steps. Residual adapters: before, after, and twice a step in batches."""
    for steps in (0, 4):
        for batch_size, batches in ((9, 1), (4, 3)):
            model = tsa() if residual else tiny_vit()
            sizes = count_passes(model)
            adapt(model, NINE, LABELS, steps, batch_size=batch_size)
            again = (1 if batches == 1 else 2) * steps * batches
            assert len(sizes) == (2 * batches + again if residual else batches)
            assert max(sizes) == min(batch_size, 9)


def test_a_classifier_is_what_comes_back():
    classifier = adapt(tiny_vit(), NINE, LABELS, steps=2)
    assert isinstance(classifier, FewShotClassifier)
    shares = {"leave_one_out_accuracy_before", "leave_one_out_accuracy"}
    assert set(classifier.metrics) == {"loss", "gap_before", "gap_after", *shares}
    assert not any(tensor.requires_grad for tensor in (*classifier.heads, classifier.prototypes))
    assert unwrap(classifier.model) is classifier.model
