"""Adapter files that are damaged, mixed up or changed by hand: refused, or loaded as exactly what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_ncgeo import AdaptFormerConfig, CoPAConfig, FewShotClassifier, NPTConfig, PrototypeConfig, adapt
from peft_ncgeo.hub import hypothesis_template, load_adapter

from ..conftest import pixels, texts, tiny_clip, tiny_vit, tiny_vit_classifier
from ..profiles import cases
from .outcomes import said_well

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
CONFIG, WEIGHTS, PROTOTYPES = "adapter_config.json", "adapter_model.safetensors", "prototypes.safetensors"
PROMPTS = {"num_text_tokens": 3, "num_vision_tokens": 2, "text_init": [6, 7, 8], "template": "the {}."}
KINDS: dict[str, tuple[Any, Any]] = {
    "prompts": (tiny_clip, lambda: NPTConfig(**PROMPTS, text_depth=2, vision_depth=2)),
    "deeper": (tiny_clip, lambda: NPTConfig(**PROMPTS, text_depth=3, vision_depth=2)),
    "coupled": (tiny_clip, lambda: NPTConfig.maple(text_init=[6, 7], text_depth=2, vision_depth=2)),
    "head": (tiny_vit_classifier, lambda: NPTConfig.vpt(vision_depth=2, modules_to_save=["classifier"])),
    "prototypes": (tiny_vit_classifier, lambda: PrototypeConfig(geometry=torch.eye(5, 7), num_vision_tokens=1)),
    "heads": (tiny_vit, lambda: CoPAConfig(residual_adapters=True)),
    "bottlenecks": (tiny_vit_classifier, lambda: AdaptFormerConfig(bottleneck_dim=2)),
    "lora": (tiny_clip, lambda: LoraConfig(r=2, target_modules=["q_proj", "visual_projection"])),
}
BASES = {base.__name__: base for base, _ in KINDS.values()}
kinds = st.sampled_from(sorted(KINDS))


class Held:
    """Anything by name; what hypothesis prints of it is short."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Held:
    """An adapter of each kind far from its start: its files, tensors and what it makes of images and texts."""
    found: dict[str, Any] = {}
    for kind, (base, config) in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(1)
        model = get_peft_model(base(), config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(folder)
        files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
        found[kind] = Held(files=files, tensors=load_file(folder / WEIGHTS), said=answers(model))
    return Held(**found, folder=tmp_path_factory.mktemp("adapter"))


def answers(model: Any) -> list[torch.Tensor]:
    inner = model.get_base_model()
    with torch.no_grad():
        if not hasattr(inner, "get_text_features"):
            return [inner.eval()(pixel_values=pixels())[0]]
        inputs = (
            (inner.eval().get_text_features, texts(slots=3)),
            (inner.get_image_features, {"pixel_values": pixels()}),
        )
        return [encode(**given).pooler_output for encode, given in inputs]


def write(saved, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (saved.folder / name).write_bytes(content)
    return saved.folder


def check(saved, kind: str, files: dict[str, bytes], base: Any = None) -> Any:
    """Load what was made of a kind's files: the model, which must be the one that was saved, or None if refused."""
    before = base or KINDS[kind][0]()
    modules = dict(before.named_modules())
    model = said_well(lambda: load_adapter(write(saved, files), before), ValueError)
    if model is None:
        assert dict(before.named_modules()) == modules  # no random prompts are left in it
        return None
    assert not model.training
    assert_saved(model, getattr(saved, kind))
    return model


def assert_saved(model: Any, kind: Held) -> None:
    tensors = get_peft_model_state_dict(model)
    assert tensors.keys() == kind.tensors.keys()
    assert all(torch.equal(tensors[name], value) for name, value in kind.tensors.items())
    torch.testing.assert_close(answers(model), kind.said, atol=1e-6, rtol=1e-5)


@st.composite
def damages(draw, limit: int | None = None):
    """Draw a kind of damage to bytes: cut off, torn out, repeated, or a few of the first ones changed."""
    place, other = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    changes = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3))
    how = draw(st.sampled_from(["cut", "torn", "repeated", "changed"]))

    def damage(content: bytes) -> bytes:
        first, last = sorted((int(place * len(content)), int(other * len(content))))
        if how == "cut":
            return content[:last]
        if how == "torn":
            return content[:first] + content[last:]
        if how == "repeated":
            return content[:last] + content[first:]
        changed, reach = bytearray(content), limit or 8 + int.from_bytes(content[:8], "little")
        for at, by in changes:
            changed[int(at * (min(reach, len(content)) - 1))] ^= by
        return bytes(changed)

    return damage


@cases(1.8)
@given(kind=kinds, damage=damages())
def test_damaged_weights(saved, kind, damage):
    """Numbers that changed to others cannot be told; the header can."""
    files = getattr(saved, kind).files
    check(saved, kind, {**files, WEIGHTS: damage(files[WEIGHTS])})


@cases(0.8)
@given(damage=damages(limit=10**6))
def test_damaged_config(saved, damage):
    files = saved.prompts.files
    model = check(saved, "prompts", {**files, CONFIG: damage(files[CONFIG])})
    if model is not None:
        assert model.peft_config["default"].template == PROMPTS["template"]


@cases(0.8)
@given(config=kinds, weights=kinds, base=st.sampled_from(sorted(BASES)))
def test_files_of_different_adapters(saved, config, weights, base):
    files = {CONFIG: getattr(saved, config).files[CONFIG], WEIGHTS: getattr(saved, weights).files[WEIGHTS]}
    fits = config == weights and base == KINDS[config][0].__name__
    assert (check(saved, config, files, BASES[base]()) is not None) == fits


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> bytes:
    save_file(tensors, folder / "other")
    return (folder / "other").read_bytes()


def edited(tensor: torch.Tensor, how: str, place: int) -> torch.Tensor:
    """A tensor that is none of what training leaves behind, or the same in another precision."""
    if how in ("nan", "inf", "-inf"):
        tensor = tensor.clone()
        tensor.view(-1)[place % tensor.numel()] = float(how)
        return tensor
    shapes = {"flat": tensor.flatten(), "longer": torch.cat([tensor, tensor]), "empty": tensor[:0]}
    return shapes[how] if how in shapes else tensor.to(getattr(torch, how))


EDITS = ["nan", "inf", "-inf", "flat", "longer", "empty", "int32", "int64", "bool", "uint8", "float64", "bfloat16"]
EDITS += ["float8_e4m3fn", "float8_e5m2"]


@cases(1.4)
@given(kind=kinds, edit=st.sampled_from([*EDITS, "missing", "unexpected", "renamed"]), place=st.integers(0, 10**6))
@pytest.mark.parametrize("plain", [False, True], ids=["load_adapter", "PeftModel"])
def test_edited_tensors(saved, plain, kind, edit, place):
    """By PEFT itself this package's adapters are refused or loaded as well, if in other words."""
    assume(not plain or kind != "lora")
    here = getattr(saved, kind)
    tensors, names = dict(here.tensors), sorted(here.tensors)
    name = names[place % len(names)]
    assume(edit != "flat" or tensors[name].dim() > 1)
    if edit in EDITS:
        tensors[name] = edited(tensors[name], edit, place)
    elif edit == "unexpected":
        tensors[f"{name}.more"] = torch.ones(2)
    else:
        tensor = tensors.pop(name)
        tensors |= {name.replace("e", "a"): tensor} if edit == "renamed" else {}
    folder = write(saved, {CONFIG: here.files[CONFIG], WEIGHTS: stored(saved.folder, tensors)})
    right = edit in ("float64", "bfloat16")
    if plain:
        model = by_peft(KINDS[kind][0](), folder)
        # of modules_to_save, which are the base model's, PEFT takes what it finds
        assert model is None or right or "ncgeo" not in name
    else:
        model = said_well(lambda: load_adapter(folder, KINDS[kind][0]()), ValueError)
        assert (model is not None) == right
    if model is not None:
        for name, tensor in get_peft_model_state_dict(model).items():
            torch.testing.assert_close(tensors[name].to(tensor.dtype), tensor, atol=0, rtol=0, equal_nan=True)


def by_peft(base: Any, folder: Path) -> Any:
    try:
        return PeftModel.from_pretrained(base, folder)
    except Exception:
        return None


words = st.text(max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | words | st.sampled_from(["LORA", "IA3", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
# numbers and texts that take memory or time where they are believed
huge = st.sampled_from(
    [10**5, 2 * 10**7, 10**12, 10**90, -(10**90), "x" * 5000, "x" * 5000 + "{}", [7] * 20_000, ["x"] * 20_000]
)
FIELDS = {kind: [*json.loads(json.dumps(config().to_dict()))] for kind, (_, config) in KINDS.items() if kind != "lora"}
FREE = {"temperature"}  # any number is as good as another


@cases(1.8)
@given(data=st.data(), kind=st.sampled_from(sorted(FIELDS)), value=json_values | huge)
def test_a_field_of_the_config_that_holds_something_else(saved, data, kind, value):
    config = json.loads(getattr(saved, kind).files[CONFIG])
    field = data.draw(st.sampled_from([name for name in FIELDS[kind] if name not in FREE]))
    template = config.get("template")
    if data.draw(st.booleans()):
        config[field] = value
    else:
        del config[field]
    model = check(saved, kind, {**getattr(saved, kind).files, CONFIG: json.dumps(config).encode()})
    if model is not None and config.get("num_text_tokens"):
        assert model.peft_config["default"].template == template


@cases(0.8)
@given(content=json_values.map(json.dumps).map(str.encode) | st.binary(max_size=20))
@example(content=b"[" * 10**5)
def test_a_config_that_is_something_else(saved, content):
    folder = write(saved, {**saved.prompts.files, CONFIG: content})
    for loader in (load_adapter, FewShotClassifier.from_pretrained):
        assert said_well(lambda loader=loader: loader(folder, tiny_clip()), ValueError) is None
    assert isinstance(said_well(lambda: hypothesis_template(folder)), str | None)


@pytest.fixture(scope="module")
def birds(tmp_path_factory) -> Held:
    folder = tmp_path_factory.mktemp("birds")
    classifier = adapt(get_peft_model(tiny_vit(), CoPAConfig()), pixels(6), ["owl", "wren"] * 3, steps=2)
    classifier.save_pretrained(folder)
    return Held(folder=folder, content=(folder / PROTOTYPES).read_bytes(), found=classifier)


@cases(0.8)
@given(damage=damages())
def test_damaged_prototypes(birds, damage):
    (birds.folder / PROTOTYPES).write_bytes(damage(birds.content))
    loaded = said_well(lambda: FewShotClassifier.from_pretrained(birds.folder, tiny_vit()), ValueError)
    if loaded is not None:
        assert torch.equal(loaded.prototypes, birds.found.prototypes)
        assert len(loaded.classes) == 2
        assert torch.equal(loaded.predict_proba(pixels()), birds.found.predict_proba(pixels()))


@cases(0.8)
@given(edit=st.sampled_from(EDITS), place=st.integers(0, 10**3), classes=json_values | st.just(["owl", "wren"]))
def test_edited_prototypes(birds, edit, place, classes):
    prototypes = edited(birds.found.prototypes, edit, place)
    save_file({"prototypes": prototypes.contiguous()}, birds.folder / PROTOTYPES, {"classes": json.dumps(classes)})
    loaded = said_well(lambda: FewShotClassifier.from_pretrained(birds.folder, tiny_vit()), ValueError)
    assert loaded is None or edit in ("float64", "bfloat16")
    if loaded is not None:
        assert loaded.classes == classes
        assert len(loaded.predict(pixels())) == 3


@cases(1)
@given(names=json_values | st.lists(words, min_size=5, max_size=5))
def test_names_beside_a_head(saved, names):
    """The names of the outputs are taken as a whole, or not at all."""
    (saved.folder / "class_names.json").write_text(json.dumps(names))
    try:
        folder = write(saved, saved.head.files)
        model = said_well(lambda: load_adapter(folder, tiny_vit_classifier()), ValueError)
    finally:
        (saved.folder / "class_names.json").unlink()
    if model is not None and names:
        assert list(model.get_base_model().config.id2label.values()) == names
        assert len(names) == 5
