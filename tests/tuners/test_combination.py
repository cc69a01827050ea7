"""`add_weighted_adapter` for every kind of tensor, against the formulas in plain float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from peft_ncgeo import AdaptFormerConfig, CoPAConfig, NPTConfig, PrototypeConfig
from peft_ncgeo.tuners.combination import spherical

from ..cases import TUNERS, Tuner
from ..conftest import tiny_clip, tiny_vit_classifier
from ..contracts.tuned import adapted, assert_same, outputs

pytestmark = pytest.mark.filterwarnings("ignore:.*all of them get prompts")
METHODS = [
    "clip-ivlp",
    "clip-ivlp-first_layer",
    "clip-maple",
    "vit_classifier-vpt",
    "vit_classifier-prototypes-prompts",
    "vit_classifier-prototypes-given",
    "vit_classifier-prototypes-trained",
    "clip-copa",
    "clip-adaptformer",
    "clip_vision_projection-url",
    "resnet_classifier-copa-adapters",
]
PROMPTED = [name for name in METHODS if not any(other in name for other in ("copa", "url", "adaptformer"))]
PHRASE = [6, 7]


@pytest.fixture(params=METHODS)
def case(request) -> Tuner:
    return TUNERS[request.param]


def scatter(model, adapter: str, seed: int) -> None:
    """Move what an adapter trains away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapter in name.split("."):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def pair(case: Tuner):
    """A model with adapters "one", which is active, and "two"."""
    model = adapted(case, name="one")
    model.add_adapter("two", case.config())
    scatter(model, "two", 7)
    return model


def tensors(model, adapter: str) -> dict[str, np.ndarray]:
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    return {name: value.double().numpy() for name, value in state.items()}


def turned(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Shoemake's formula, row by row."""
    rows = []
    for p, q in zip(a, b, strict=True):
        u, v = p / np.linalg.norm(p), q / np.linalg.norm(q)
        angle = np.arccos(u @ v)
        direction = (np.sin((1 - t) * angle) * u + np.sin(t * angle) * v) / np.sin(angle)
        rows.append(((1 - t) * np.linalg.norm(p) + t * np.linalg.norm(q)) * direction)
    return np.stack(rows)


def is_constant(case: Tuner, name: str) -> bool:
    return case.constants > 0 and name.endswith("prototypes")


def test_linear_is_the_weighted_sum(case):
    model = pair(case)
    model.add_adapter("three", case.config())
    scatter(model, "three", 8)
    model.add_weighted_adapter(["one", "two", "three"], [0.7, -0.4, 1.5], "mixed")
    a, b, c, mixed = (tensors(model, name) for name in ("one", "two", "three", "mixed"))
    assert mixed.keys() == a.keys()
    for name, value in mixed.items():
        expected = a[name] if is_constant(case, name) else 0.7 * a[name] - 0.4 * b[name] + 1.5 * c[name]
        np.testing.assert_array_equal(value, expected.astype(np.float32), err_msg=name)


@pytest.mark.parametrize("name", PROMPTED)
def test_slerp_turns_prompts_and_adds_the_rest(name):
    case = TUNERS[name]
    model = pair(case)
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "mixed", combination_type="slerp")
    a, b, mixed = (tensors(model, name) for name in ("one", "two", "mixed"))
    for key, value in mixed.items():
        if key.endswith("_prompt"):
            np.testing.assert_allclose(value, turned(a[key], b[key], 0.3), rtol=1e-6, atol=1e-7)
        elif is_constant(case, key):
            np.testing.assert_array_equal(value, a[key])
        else:
            np.testing.assert_allclose(value, 0.7 * a[key] + 0.3 * b[key], rtol=1e-6, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("combination_type", ["linear", "slerp"])
@pytest.mark.parametrize("name", PROMPTED)
def test_a_weight_of_one_is_that_adapter(name, combination_type):
    case = TUNERS[name]
    model = pair(case)
    for weights, adapter in (([1, 0], "one"), ([0, 1], "two")):
        model.add_weighted_adapter(["one", "two"], weights, f"like_{adapter}", combination_type)
        model.set_adapter(adapter)
        expected = outputs(model, case.slots)
        model.set_adapter(f"like_{adapter}")
        assert_same(outputs(model, case.slots), expected, case)
        for key, value in tensors(model, adapter).items():
            np.testing.assert_array_equal(tensors(model, f"like_{adapter}")[key], value)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in METHODS if name not in PROMPTED])
def test_a_weight_of_one_is_that_adapter_without_prompts(name):
    case = TUNERS[name]
    model = pair(case)
    model.add_weighted_adapter(["one", "two"], [1, 0], "like_one")
    expected = outputs(model, case.slots)
    model.set_adapter("like_one")
    assert torch.equal(outputs(model, case.slots), expected)


def test_slerp_where_no_plane_is_defined():
    """Parallel, opposite and zero vectors are interpolated linearly."""
    a = torch.tensor([[1.0, 0, 0], [2, 0, 0], [0, 0, 0], [3, 4, 0], [0, 0, 0]])
    b = torch.tensor([[3.0, 0, 0], [-4, 0, 0], [0, 5, 0], [0, 0, 0], [0, 0, 0]])
    for t in (0.0, 0.25, 1.0):
        torch.testing.assert_close(spherical([a, b], [1 - t, t]), ((1 - t) * a + t * b).double())


def test_slerp_of_lengths_and_right_angles():
    a, b = torch.tensor([[2.0, 0]]), torch.tensor([[0, 4.0]])
    third = spherical([a, b], [2 / 3, 1 / 3])
    expected = (2 * 2 / 3 + 4 / 3) * torch.tensor([[3**0.5 / 2, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(third, expected)


@torch.no_grad()
def test_it_is_an_adapter_like_oneny_other(case, tmp_path):
    model = pair(case)
    first = outputs(model, case.slots)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mixed")
    assert model.active_adapters == ["one"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert torch.equal(outputs(model, case.slots), first)

    model.set_adapter("mixed")
    mixed = outputs(model, case.slots)
    assert not torch.allclose(mixed, first, atol=1e-3)
    model.save_pretrained(tmp_path, selected_adapters=["mixed"])
    loaded = PeftModel.from_pretrained(case.build(), tmp_path / "mixed")
    assert_same(outputs(loaded, case.slots), mixed, case)
    loaded.load_adapter(tmp_path / "mixed", "again")
    loaded.add_weighted_adapter(["default", "again"], [0.5, 0.5], "both")  # configs from files
    loaded.set_adapter("both")
    assert_same(outputs(loaded, case.slots), mixed, case)

    model.set_adapter("one")
    model.delete_adapter("mixed")
    assert list(model.peft_config) == ["one", "two"]
    assert torch.equal(outputs(model, case.slots), first)


def test_it_has_a_config_of_its_own():
    model = pair(TUNERS["clip-ivlp"])
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mixed")
    configs = model.peft_config
    assert configs["mixed"] == configs["one"]
    assert configs["mixed"] is not configs["one"]


def npt(**fields):
    return NPTConfig(**{"num_text_tokens": 2, "num_vision_tokens": 2, "text_init": PHRASE, **fields})


def prototypes(**fields):
    return PrototypeConfig(**{"projection_dim": 8, **fields})


TWO = ["one", "two"]
COUNTS = [9, 7, 5, 3, 1]


@pytest.mark.parametrize(
    ("first", "second", "arguments", "message"),
    [
        (npt(), npt(), (["one", "three"], [0.5, 0.5], "new"), "no adapter 'three' to combine; the model has one, two"),
        (npt(), npt(), ([], [], "new"), "adapters=.. must be a list of at least one name"),
        (npt(), npt(), ("one", [1.0], "new"), "adapters='one' must be a list of at least one name"),
        (npt(), npt(), (TWO, [0.5, 0.5], "two"), "has an adapter 'two' already"),
        (npt(), npt(), (TWO, [0.5, 0.5], "c.d"), "adapter_name='c.d' must be a name without dots"),
        (npt(), npt(), (TWO, [1.0], "new"), "one number for each of 2 adapters, got 1"),
        (npt(), npt(), (TWO, [1.0, float("nan")], "new"), "must be finite"),
        (npt(), npt(), (TWO, [0.5, 0.5], "new", "ties"), "combination_type='ties' must be one of linear, slerp"),
        (npt(), npt(), (TWO, [0.5, 0.6], "new", "slerp"), r"slerp takes two adapters and weights \[1 - t, t\]"),
        (npt(), npt(), (TWO, [1.5, -0.5], "new", "slerp"), "slerp takes two adapters"),
        (npt(), npt(), ([*TWO, "one"], [0.5, 0.5, 0], "new", "slerp"), "slerp takes two adapters"),
        (npt(), npt(num_text_tokens=3), (TWO, [1, 1], "new"), "'one' and 'two' differ in num_text_tokens: 2 and 3"),
        (npt(), npt(num_vision_tokens=1), (TWO, [1, 1], "new"), "differ in num_vision_tokens"),
        (npt(), npt(text_depth=2), (TWO, [1, 1], "new"), "differ in text_depth"),
        (npt(), npt(vision_depth=2), (TWO, [1, 1], "new"), "differ in vision_depth"),
        (npt(), npt(first_layer=1), (TWO, [1, 1], "new"), "differ in first_layer"),
        (npt(), npt(coupling="coupled"), (TWO, [1, 1], "new"), "differ in coupling"),
        (npt(), npt(template="the {}."), (TWO, [1, 1], "new"), "differ in template"),
        (npt(modules_to_save=["visual_projection"]), npt(), (TWO, [1, 1], "new"), "'one' has modules_to_save="),
        (prototypes(), prototypes(projection_dim=9), (TWO, [1, 1], "new"), "differ in projection_dim: 8 and 9"),
        (prototypes(), prototypes(temperature=0.2), (TWO, [1, 1], "new"), "differ in temperature"),
        (
            prototypes(),
            prototypes(geometry="minority_margin", class_counts=COUNTS),
            (TWO, [1, 1], "new"),
            "have different fixed prototypes",
        ),
        (prototypes(), prototypes(), (TWO, [0.5, 0.5], "new", "slerp"), "these adapters have none"),
        (
            AdaptFormerConfig(bottleneck_dim=2),
            AdaptFormerConfig(num_classes=64),
            (TWO, [1, 1], "new"),
            "differ in bottleneck_dim: 2 and 8",
        ),
        (CoPAConfig(), CoPAConfig(shared=True), (TWO, [1, 1], "new"), "differ in shared: False and True"),
        (CoPAConfig(), CoPAConfig(residual_adapters=True), (TWO, [1, 1], "new"), "differ in residual_adapters"),
    ],
)
def test_errors_leave_the_model_as_it_was(first, second, arguments, message):
    build = tiny_vit_classifier if isinstance(first, PrototypeConfig) else tiny_clip
    model = get_peft_model(build(), first, adapter_name="one")
    model.add_adapter("two", second)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        model.add_weighted_adapter(*arguments)
    assert "\n" not in str(error.value)
    assert list(model.peft_config) == TWO
    assert model.active_adapters == ["one"]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_tokenizer_is_noticed():
    """The same template, other words under the prompts; where one is not known there is nothing to compare."""
    model = pair(TUNERS["clip-ivlp"])
    ids = model.peft_config["one"].token_ids
    model.peft_config["one"].token_ids = {**ids, "placeholders": [5, 6, 7, 8]}
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mixed")
    model.peft_config["two"].token_ids = {**ids, "placeholders": [5, 6, 7, 9]}
    with pytest.raises(ValueError, match="differ in placeholder_ids"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "again")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_adapters_of_other_methods_stay_out_of_it():
    below = get_peft_model(tiny_clip(), LoraConfig(target_modules=["q_proj"]), adapter_name="low_rank")
    model = get_peft_model(below.get_base_model(), npt(), adapter_name="one")
    model.add_adapter("two", npt())
    with pytest.raises(ValueError, match="no adapter 'low_rank'.*one"):
        model.add_weighted_adapter(["one", "low_rank"], [0.5, 0.5], "mixed")
    configs = list(model.peft_config)
    with pytest.raises(ValueError, match="adapter 'low_rank' already|adapter is named 'low_rank' too"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "low_rank")
    assert list(model.peft_config) == configs
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mixed")
