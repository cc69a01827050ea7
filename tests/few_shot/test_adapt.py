"""Adapting to a few labelled images, against plain torch in float64 and loops of the test's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from PIL import Image as PILImage
from torch.nn import functional as F
from transformers import BertConfig, BertModel, ViTModel

from peft_ncgeo import CoPAConfig, NPTConfig
from peft_ncgeo.classifiers.few_shot import FewShotClassifier
from peft_ncgeo.data import EpisodeSampler
from peft_ncgeo.few_shot.adapt import adapt
from peft_ncgeo.few_shot.episodes import fit_episodes, fit_heads
from peft_ncgeo.geometry.contrast import prototype_cross_entropy
from peft_ncgeo.models.adapters import unwrap
from peft_ncgeo.tuners.copa import CoPALayer, Residual

from ..conftest import pixels, tiny, tiny_images, tiny_processor, tiny_vit
from ..contracts.test_copa_contract import BACKBONES, adapted, first_token
from ..losses.batches import unit_rows

URL = {"steps": 40, "lr": 0.1, "weight_decay": 0.0, "optimizer": torch.optim.Adadelta}
TEMPERATURE = math.exp(-2)
LABELS = [2, 0, 1, 1, 0, 2, 2, 2, 0]  # unsorted, 3, 2 and 4 shots


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def support(labels=LABELS, classes: int = 3, dim: int = 8, seed: int = 0, dtype=torch.float64):
    """Features around a centre a class, with a gap to the origin, and int64 labels."""
    labels = torch.as_tensor(labels)
    features = draw(len(labels), dim, seed=seed) + 1.5 * draw(classes, dim, seed=seed + 1)[labels] + 0.5
    return features.to(dtype), labels


def means(features: torch.Tensor, labels) -> torch.Tensor:
    labels = torch.as_tensor(labels)
    return torch.stack([features[labels == c].mean(0) for c in range(int(labels.max()) + 1)])


def full_contrast(instances, prototypes, labels, temperature) -> torch.Tensor:
    """CLIP's loss with the N x N matrix: every sample against the prototype of every sample."""
    own = unit_rows(prototypes)[labels]
    s = unit_rows(instances) @ own.T / temperature
    targets = torch.arange(len(labels))
    return (F.cross_entropy(s, targets) + F.cross_entropy(s.T, targets)) / 2


def cross_entropy(instances, prototypes, labels, temperature) -> torch.Tensor:
    return F.cross_entropy(unit_rows(instances) @ unit_rows(prototypes).T / temperature, labels)


def loop(features, labels, loss, optimizer, steps, shared=False, temperature=TEMPERATURE):
    """Heads trained by hand on features that stay."""
    prototypes = means(features, labels)
    image = torch.eye(features.shape[1], dtype=features.dtype, requires_grad=True)
    prototype = image if shared else image.detach().clone().requires_grad_()
    optimise = optimizer([image] if shared else [image, prototype])
    for _ in range(steps):
        optimise.zero_grad()
        loss(features @ image, prototypes @ prototype, labels, temperature).backward()
        optimise.step()
    return image.detach(), prototype.detach()


def adam(parameters, lr=1e-3):
    return torch.optim.Adam(parameters, lr=lr, weight_decay=0.1)


def nearest(features, prototypes) -> np.ndarray:
    """Classes by cosine in numpy."""
    features, prototypes = (np.asarray(value, dtype=np.float64) for value in (features, prototypes))
    return (unit_rows(features) @ unit_rows(prototypes).T).argmax(1)


def message(call, error=ValueError) -> str:
    with pytest.raises(error) as info:
        call()
    text = str(info.value)
    assert text
    assert "\n" not in text
    return text


# Heads on cached features


@pytest.mark.parametrize("shared", [False, True])
def test_before_any_step_it_is_the_nearest_prototype(shared):
    features, labels = support(seed=3)
    heads = fit_heads(features, labels, steps=0, shared=shared)
    for head in heads:
        assert torch.equal(head, torch.eye(8, dtype=torch.float64))
    others = draw(200, 8, seed=9)
    scores = heads.scores(others, means(features, labels))
    expected = nearest(others, means(features, labels))
    assert len(set(expected)) == 3
    np.testing.assert_array_equal(scores.argmax(1), expected)
    assert not any(head.requires_grad for head in heads)


@pytest.mark.parametrize(("steps", "lr"), [(1, 1e-3), (50, 1e-3), (20, 0.05)])
def test_copa_is_a_loop_with_the_full_matrix(steps, lr):
    features, labels = support()
    expected = loop(features, labels, full_contrast, lambda p: adam(p, lr), steps)
    heads = fit_heads(features, labels, steps=steps, lr=lr)
    torch.testing.assert_close(tuple(heads), expected, atol=1e-8, rtol=0)
    assert (heads.image - heads.prototype).abs().max() > lr / 2
    if steps == 50:  # the defaults are the paper's
        assert torch.equal(fit_heads(features, labels).image, heads.image)


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_url_is_a_loop_of_one_head(temperature):
    features, labels = support()
    expected = loop(
        features,
        labels,
        cross_entropy,
        lambda p: torch.optim.Adadelta(p, lr=0.1, weight_decay=0),
        40,
        shared=True,
        temperature=temperature,
    )
    heads = fit_heads(features, labels, **URL, shared=True, temperature=temperature, objective=prototype_cross_entropy)
    torch.testing.assert_close(tuple(heads), expected, atol=1e-8, rtol=0)
    assert torch.equal(heads.image, heads.prototype)
    assert (heads.image - torch.eye(8)).abs().max() > 0.01


def test_a_shared_head_may_be_trained_with_the_contrast():
    features, labels = support()
    expected = loop(features, labels, full_contrast, adam, 20, shared=True)
    torch.testing.assert_close(tuple(fit_heads(features, labels, 20, shared=True)), expected, atol=1e-8, rtol=0)


def test_training_on_features_changes_nothing_but_the_heads():
    features, labels = support()
    features.requires_grad_()
    before, state = features.detach().clone(), torch.get_rng_state()
    with torch.no_grad():  # as a caller may have it
        heads = fit_heads(features, labels, 5)
    assert torch.equal(heads.image, fit_heads(features, labels, 5).image)
    assert torch.equal(features, before)
    assert features.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def episodes(count: int = 7):
    """Sets of 2 to 5 ways with 1 to 6 shots a class, of unlike sizes and in no order, over 90 features."""
    rng = np.random.default_rng(5)
    found = []
    for i in range(count):
        shots = rng.integers(1, 7, size=2 + i * 3 % 4)
        labels = rng.permutation(np.repeat(np.arange(len(shots)), shots)).astype(np.int64)
        found.append((rng.choice(90, len(labels), replace=False), labels))
    assert len({len(rows) for rows, _ in found}) > 3
    return found


SETTINGS = {
    "copa": {},
    "url": {**URL, "shared": True, "temperature": 0.1, "objective": prototype_cross_entropy},
}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"])
@pytest.mark.parametrize("method", SETTINGS)
def test_many_episodes_at_once_equal_one_by_one(method, dtype, atol, batch_size):
    features, supports = draw(90, 8, dtype=dtype) + 0.3, episodes()
    settings = {**SETTINGS[method], "steps": 20}
    found = fit_episodes(features, supports, batch_size, progress=False, **settings)
    assert len(found) == len(supports)
    alone = [fit_heads(features[rows], torch.as_tensor(labels), **settings) for rows, labels in supports]
    for got, expected in zip(found, alone, strict=True):
        assert got.image.shape == (8, 8)
        assert got.image.dtype == dtype
        torch.testing.assert_close(tuple(got), tuple(expected), atol=atol, rtol=0)
    apart = [(a.image - b.image).abs().max() for i, a in enumerate(alone) for b in alone[:i]]
    assert min(apart) > 1e-3  # so that their order matters


def test_episodes_of_a_sampler_and_rows_that_no_episode_uses():
    names = ["a", "b", "c", "d"]
    rows = {"label": [i % 4 for i in range(40)]}
    sampler = EpisodeSampler(
        Dataset.from_dict(rows, features=Features({"label": ClassLabel(names=names)})), min_ways=2
    )
    drawn = [sampler[i] for i in range(3)]
    supports = [(episode.support, episode.support_labels) for episode in drawn]
    features = draw(40, 8)
    features[0] = math.nan  # padding repeats row 0; an episode that uses it would be refused
    supports = [(rows[rows != 0], labels[rows != 0]) for rows, labels in supports]
    found = fit_episodes(features, supports, progress=False, steps=5)
    for heads, (rows, labels) in zip(found, supports, strict=True):
        expected = loop(features[rows], torch.as_tensor(labels), full_contrast, adam, 5)
        torch.testing.assert_close(tuple(heads), expected, atol=1e-8, rtol=0)
    assert fit_episodes(features, []) == []


@pytest.mark.parametrize(
    ("features", "labels", "steps", "expected"),
    [
        (draw(4), torch.tensor([0, 1, 0, 1]), 1, r"features must be \(N, d\) or \(E, N, d\).*got \(4,\)"),
        (draw(4, 3), torch.tensor([0, 1, 0]), 1, r"got \(4, 3\) and labels \(3,\)"),
        (draw(2, 4, 3), torch.tensor([0, 1, 0, 1]), 1, r"got \(2, 4, 3\) and labels \(4,\)"),
        (draw(4, 3), torch.tensor([0, 1, 0, 1]), -1, "steps=-1 must be a whole number of at least 0"),
        (draw(4, 3).log(), torch.tensor([0, 1, 0, 1]), 1, "support image 0 are not finite"),
    ],
)
def test_features_that_do_not_fit(features, labels, steps, expected):
    with pytest.raises(ValueError, match=expected):
        fit_heads(features, labels, steps)


# A model


def snapshot(model) -> dict:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


def assert_as_before(model, before: dict, but: str = "\n") -> None:
    """Bit-equal state, modes and flags, and no gradient; `but`: a part of names whose values may differ."""
    now = snapshot(model)
    assert now["values"].keys() == before["values"].keys()
    for name, value in before["values"].items():
        assert but in name or torch.equal(now["values"][name], value), name
    for part in ("training", "requires_grad", "hooks"):
        assert now[part] == before[part], part
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == []


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


# Residual adapters


def tsa(name: str = "vit", **fields) -> PeftModel:
    return get_peft_model(BACKBONES[name].build(), CoPAConfig(residual_adapters=True, **fields))


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
    with pytest.raises(ValueError, match="The loss or the features are not finite after 5 steps"):
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


# Labels and images


WORDS = ["two", "nil", "one", "one", "nil", "two", "two", "two", "nil"]  # as LABELS, in another order of classes


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (LABELS, [0, 1, 2]),
        ([17 if c == 2 else 3 - c for c in LABELS], [2, 3, 17]),
        ([-c for c in LABELS], [-2, -1, 0]),
        (np.array(LABELS), [0, 1, 2]),
        (list(np.array(LABELS, dtype=np.int16)), [0, 1, 2]),
        (torch.tensor(LABELS), [0, 1, 2]),
        (torch.tensor(LABELS, dtype=torch.uint8), [0, 1, 2]),
        (list(torch.tensor(LABELS)), [0, 1, 2]),
        (WORDS, ["nil", "one", "two"]),
        (tuple(WORDS), ["nil", "one", "two"]),
        (np.array(WORDS), ["nil", "one", "two"]),
        ([c == 2 for c in LABELS], [False, True]),
    ],
    ids=[
        "ints",
        "sparse",
        "negative",
        "array",
        "numpy",
        "tensor",
        "uint8",
        "tensors",
        "words",
        "tuple",
        "numpy_words",
        "bools",
    ],
)
def test_labels_of_every_kind(labels, classes):
    """The classifier answers with them, as plain Python numbers and words."""
    images, others = pixels(9, seed=4), pixels(40, seed=5)
    classifier = adapt(tiny_vit(), images, labels, steps=5)
    assert classifier.classes == classes
    assert {type(name) for name in classifier.classes} == {type(classes[0])}
    plain = [label.item() if hasattr(label, "item") else label for label in labels]
    places = torch.tensor([classes.index(label) for label in plain])
    features = first_token(tiny_vit(), images).detach()
    torch.testing.assert_close(classifier.prototypes, means(features, places), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(classifier.heads.image, fit_heads(features, places, 5).image, atol=1e-5, rtol=0)
    predicted = classifier.predict(others)
    assert [type(name) for name in predicted] == [type(classes[0])] * 40
    found = classifier.heads.scores(first_token(tiny_vit(), others), classifier.prototypes).argmax(1)
    assert predicted == [classes[i] for i in found.tolist()]
    assert len(set(predicted)) == len(classes)


def picture(mode: str, seed: int) -> PILImage.Image:
    """Random; sixteen bits with all of their range."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return PILImage.fromarray(rng.integers(0, 65536, (20, 24)).astype(np.uint16))
    return PILImage.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).convert(mode)


def as_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode == "I;16":
        image = PILImage.fromarray((np.asarray(image).astype(np.float64) // 257).astype(np.uint8))
    return image.convert("RGB")


def test_images_of_every_mode():
    modes = ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "YCbCr"]
    images = [picture(mode, i) for i, mode in enumerate(modes)]
    assert [image.mode for image in images] == modes
    processor = tiny_processor()
    values = processor.image_processor(images=[as_rgb(image) for image in images], return_tensors="pt")["pixel_values"]
    assert len({value.flatten()[:50].sum().item() for value in values}) == len(modes)
    expected = adapt(tiny_vit(), values, LABELS, steps=5)
    for given in (images, tuple(images), iter(images)):
        for kind in (processor, processor.image_processor):
            if given is not images and kind is processor:
                continue
            found = adapt(tiny_vit(), given, LABELS, steps=5, processor=kind)
            assert torch.equal(found.heads.image, expected.heads.image)
            assert torch.equal(found.predict_proba(images), expected.predict_proba(values))
    assert found.predict(images[3]) == [expected.predict(values[3:4])[0]]


def test_columns_of_a_data_set():
    images = tiny_images(9)
    labels = images["label"]
    found = adapt(tiny_vit(), images["image"], labels, steps=5, processor=tiny_processor())
    expected = adapt(tiny_vit(), list(images["image"]), list(labels), steps=5, processor=tiny_processor())
    assert found.classes == [0, 1, 2, 3, 4]
    assert torch.equal(found.heads.image, expected.heads.image)
    assert found.predict(images["image"]) == expected.predict(list(images["image"]))
    words = images.cast_column("label", Value("string"))
    named = adapt(tiny_vit(), words["image"], words["label"], steps=5, processor=tiny_processor())
    assert named.classes == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("residual", [False, True])
def test_the_processor_that_lies_where_the_model_came_from(residual, tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    processor = tiny_processor().image_processor
    processor.save_pretrained(tmp_path)
    model = get_peft_model(ViTModel.from_pretrained(tmp_path), CoPAConfig(residual_adapters=residual))
    images = list(tiny_images(9)["image"])
    found = adapt(model, images, LABELS, steps=3)
    expected = adapt(model, images, LABELS, steps=3, processor=processor)
    assert torch.equal(found.heads.image, expected.heads.image)
    assert found.predict(images) == expected.predict(images)


# What is refused, and what is left


def with_nan(place: int) -> torch.Tensor:
    images = pixels(9, seed=4)
    images[place, 1, 3, 3] = math.nan
    return images


def tiny_bert():
    return tiny(BertModel, BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))


NINE = pixels(9, seed=4)
BAD = {
    "one_class": (ValueError, NINE, [1] * 9, {}, "at least two classes, got [1]"),
    "fewer_labels": (ValueError, NINE, LABELS[:8], {}, "There are 9 support images and 8 labels"),
    "more_labels": (ValueError, NINE[:8], LABELS, {}, "There are 8 support images and 9 labels"),
    "no_list": (ValueError, [], LABELS, {}, "There are no images"),
    "no_tensor": (ValueError, NINE[:0], LABELS, {}, "There are no images"),
    "no_labels": (ValueError, NINE, [], {}, "at least two classes, got []"),
    "paths": (TypeError, ["a.png"] * 9, LABELS, {}, "images must be PIL images or pixels (N, C, H, W), got str;"),
    "arrays": (TypeError, NINE.numpy(), LABELS, {}, "got ndarray."),
    "tensors": (TypeError, list(NINE), LABELS, {}, "got Tensor."),
    "rows": (TypeError, tiny_images(9), LABELS, {}, "got dict."),
    "none": (TypeError, None, LABELS, {}, "images must be PIL images or pixels (N, C, H, W), got NoneType."),
    "three_dims": (ValueError, NINE[:, 0], LABELS, {}, "Pixels must be floating-point numbers (N, C, H, W)"),
    "mixed": (TypeError, NINE, [*LABELS[:8], "nil"], {}, "all whole numbers or all words, got int, str."),
    "mixed_bool": (TypeError, NINE, [*LABELS[:8], True], {}, "all whole numbers or all words, got bool, int."),
    "floats": (TypeError, NINE, torch.tensor(LABELS).float(), {}, "all whole numbers or all words, got float."),
    "missing": (TypeError, NINE, [*LABELS[:8], None], {}, "all whole numbers or all words, got NoneType, int."),
    "tuples": (TypeError, NINE, [(c,) for c in LABELS], {}, "all whole numbers or all words, got tuple."),
    "steps": (ValueError, NINE, LABELS, {"steps": -1}, "steps=-1 must be a whole number of at least 0."),
    "half_a_step": (TypeError, NINE, LABELS, {"steps": 1.5}, "steps=1.5 must be a whole number of at least 0."),
    "no_batch": (ValueError, NINE, LABELS, {"batch_size": 0}, "batch_size=0 must be a whole number of at least 1."),
    "bytes": (ValueError, NINE.to(torch.uint8), LABELS, {}, "Pixels must be floating-point numbers"),
    "label_rows": (ValueError, NINE, torch.zeros(9, 2), {}, "support_labels must be a list of labels"),
    "lr": (ValueError, NINE, LABELS, {"lr": -1.0}, "lr=-1.0 must be a finite number of at least 0."),
    "nan": (ValueError, with_nan(6), LABELS, {}, "The features of support image 6 are not finite"),
    "nan_batches": (ValueError, with_nan(6), LABELS, {"batch_size": 4}, "support image 6 are not finite"),
    "no_processor": (
        ValueError,
        [picture("RGB", i) for i in range(9)],
        LABELS,
        {},
        "No image processor",
    ),
    "float_picture": (
        ValueError,
        [picture("F", i) for i in range(9)],
        LABELS,
        {"processor": tiny_processor()},
        "An image holds floating-point numbers",
    ),
    "diverging": (
        ValueError,
        NINE,
        LABELS,
        {"lr": 1e20, "steps": 5},
        "The loss or the features are not finite after 5 steps; lower lr=1e+20",
    ),
}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, residual):
    """And leaves the adapter, far from its start, and the model's modes as they were."""
    error, images, labels, settings, expected = BAD[case]
    model = adapted(tiny_vit(), CoPAConfig(residual_adapters=residual)).train()
    before = snapshot(model)
    assert expected in message(lambda: adapt(model, images, labels, **settings), error)
    assert_as_before(model, before)


def test_an_unknown_backbone():
    text = message(lambda: adapt(tiny_bert(), NINE, LABELS))
    assert text.startswith("The pooled feature of BertModel is not known")


def test_heads_that_turn_infinite_on_a_bare_backbone():
    model = tiny_vit()
    before = snapshot(model)
    with pytest.raises(ValueError, match="The loss or the features are not finite after 9 steps"):
        adapt(model, NINE, LABELS, lr=1e20, steps=9)
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
    assert set(classifier.metrics) == {"loss", "gap_before", "gap_after"}
    assert not any(tensor.requires_grad for tensor in (*classifier.heads, classifier.prototypes))
    assert unwrap(classifier.model) is classifier.model
