"""Recipes and data set files that hold anything: read as they are written, or refused in one line that names them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Image
from hypothesis import event, example, given
from hypothesis import strategies as st
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import HfArgumentParser

from peft_ncgeo import GeometryTrainingArguments
from peft_ncgeo.data import DatasetSource
from peft_ncgeo.hub import import_prompts, load_adapter
from peft_ncgeo.losses import Regularizer
from peft_ncgeo.training import Recipe, parse_with_recipe

from ..conftest import tiny_clip, tiny_images
from ..profiles import cases
from .outcomes import said_well

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = [path.read_text() for path in sorted((EXAMPLES / "recipes").glob("*.yaml"))]
SOURCES = [path.read_text() for path in sorted((EXAMPLES / "datasets").glob("*.yaml")) if path.stat().st_size < 900]

words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=6)
scalars = st.none() | st.booleans() | st.integers(-3, 10**9) | st.floats() | words | st.dates()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(scalars, inner, max_size=2), max_leaves=4
)
BROKEN = ["{", "a: b: c", "- x\n y", "\t", "&a [*a]", "!!timestamp x", "!!int ''", "2001-99-99", "? [a]\n: b", "="]


@st.composite
def contents(draw, written: list[str], keys: list[str]):
    """A file of the examples with one value changed, or with its bytes damaged; or something else."""
    text = draw(st.sampled_from(written))
    how = draw(st.sampled_from(["whole", "value", "value", "inner", "inner", "cut", "anything", "broken"]))
    if how == "whole":
        return text
    if how == "cut":
        place = draw(st.integers(0, len(text)))
        return text[:place] + draw(words) + text[place + draw(st.integers(0, 3)) :]
    if how in ("anything", "broken"):
        return draw(st.sampled_from(BROKEN) if how == "broken" else values.map(yaml.safe_dump))
    content: Any = yaml.safe_load(text)
    inner = content
    while how == "inner" and isinstance(inner, dict | list) and inner:
        key = draw(st.sampled_from(sorted(inner, key=str) if isinstance(inner, dict) else list(range(len(inner)))))
        if not isinstance(inner[key], dict | list) or not inner[key] or draw(st.booleans()):
            break
        inner = inner[key]
    key = key if how == "inner" else draw(st.sampled_from(keys) | scalars)
    inner[key] = draw(values)
    return yaml.safe_dump(content, allow_unicode=True)


def write(tmp_path_factory, text: str) -> Path:
    path = tmp_path_factory.getbasetemp() / "made_up.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


@dataclass
class Script:
    recipe: str | None = None
    batch_size: int = 7


@cases(2)
@given(text=contents(RECIPES, ["peft", "losses", "classification_loss", "callbacks", "args"]))
@example(text="peft: LoraConfig.best")
@example(text="peft: PrototypeConfig.best")
@example(text="args: {per_device_train_batch_size: 2.5}")
@example(text="args: {learning_rate: true}")
@example(text="losses: [{OTPreservation: [weight]}]")
@example(text="[" * 2000)
def test_recipes(tmp_path_factory, text):
    path = write(tmp_path_factory, text)
    recipe = said_well(lambda: Recipe.read(path), ValueError)
    event(f"taken: {recipe is not None}")
    if recipe is None:
        return
    assert all(isinstance(term, Regularizer) for term in recipe.losses())
    assert recipe.config is None or isinstance(recipe.config(), PeftConfig)
    parser = HfArgumentParser((Script, GeometryTrainingArguments))
    if said_well(lambda: recipe.set_defaults(parser) is None, ValueError):
        known = {action.dest: action for action in parser._actions}
        kinds = {name: known[name].type for name in recipe.args if name in known}
        for name, value in recipe.args.items():
            if kinds.get(name) is float and isinstance(value, int | float):
                assert float(parser.get_default(name)) == value or value != value


def test_an_option_without_a_recipe(tmp_path):
    parser = HfArgumentParser((Script,))
    assert said_well(lambda: parse_with_recipe(parser, ["--recipe"]), ValueError) is None


@cases(2)
@given(text=contents(SOURCES, [*DatasetSource.__dataclass_fields__]))
def test_data_set_files(tmp_path_factory, text):
    path = write(tmp_path_factory, text)
    source = said_well(lambda: DatasetSource.read(path), ValueError)
    event(f"taken: {source is not None}")
    if source is not None:
        content = yaml.safe_load(text)
        if str(content.get("class_names")).endswith(".txt"):  # beside the description
            content["class_names"] = str(path.parent / content["class_names"])
        assert {name: value for name, value in asdict(source).items() if name in content} == content
        assert source.template.format("x")


columns = {
    "images": lambda: tiny_images(6, ["a", "b", "c"])["image"][:],
    "paths": lambda: ["x.png"] * 6,
    "numbers": lambda: [0, 1, 2, 0, 1, 2],
    "words": lambda: ["a", "b", "c", "a", "b", None],
    "shares": lambda: [0.5, 1.0, 2.0] * 2,
    "lists": lambda: [[1], [2]] * 3,
    "classes": lambda: [0, 1, 2, 0, 1, 2],
    "outside": lambda: [0, 1, 2, -1, 7, None],
}
KINDS = {"images": Image(), "classes": ClassLabel(names=["a", "b", "c"])}


@cases(2)
@given(
    image=st.sampled_from(["images", *columns]),
    label=st.sampled_from(["classes", "classes", *columns]),
    places=st.permutations(["image", "label", "other"]),
    fixes=st.none() | st.dictionaries(st.sampled_from("abcd"), st.sampled_from([None, "a", "x", ""]), max_size=2),
    classes=st.just(3) | st.integers(1, 4),
)
def test_columns_of_any_kind(image, label, places, fixes, classes):
    made = {places[0]: columns[image](), places[1]: columns[label]()}
    dataset = Dataset.from_dict(made)
    for place, kind in ((places[0], image), (places[1], label)):
        if kind in KINDS:
            dataset = dataset.cast_column(place, KINDS[kind])
        elif kind == "outside":
            rest = dataset.remove_columns(place)
            dataset = rest.add_column(place, made[place], feature=ClassLabel(names=["a", "b", "c"]))
    source = DatasetSource("x", classes, image_column=places[0], label_column=places[1], class_names=fixes)
    found = said_well(lambda: source.prepare(dataset))
    event(f"taken: {found is not None}")
    if found is None:
        return
    assert found.column_names == ["image", "label"]
    assert isinstance(found.features["image"], Image)
    names = found.features["label"].names
    assert len(names) == len(set(names)) == classes
    if label == "classes":
        before = [(fixes or {}).get(name, name) for name in "abc" * 2]
        assert [names[i] for i in found["label"][:]] == [name for name in before if name is not None]


CONTEXT = {"ctx": torch.ones(3, 32), "token_prefix": torch.zeros(3, 1, 32)}
LAYERS = {f"{e}.transformer.resblocks.{i}.VPT_shallow": torch.ones(n, w) for e, n, w in (
    ("text_encoder", 3, 32), ("image_encoder", 2, 40)) for i in (1, 2)}  # fmt: skip
MAPS = {"proj.weight": torch.ones(40, 32), "proj.bias": torch.ones(40), "compound_prompts_text.0": torch.ones(3, 32)}
MAPS |= {f"compound_prompt_projections.0.{name}": MAPS[f"proj.{name}"] for name in ("weight", "bias")}
CHECKPOINTS = {
    "coop": CONTEXT,
    "ivlp": {**CONTEXT, "image_encoder.VPT": torch.ones(2, 40), **LAYERS},
    "maple": {**CONTEXT, **MAPS},
}
odd_tensors = st.sampled_from(
    [None, 5, "x", [1.0], torch.ones(()), torch.ones(3), torch.ones(3, 4, 32), torch.ones(3, 31), torch.ones(0, 32)]
    + [torch.ones(3, 32, dtype=kind) for kind in (torch.int64, torch.bool, torch.complex64, torch.bfloat16)]
    + [torch.full((3, 32), float("nan"))]
)


@cases(2.4)
@given(data=st.data(), format=st.sampled_from(sorted(CHECKPOINTS)), read_as=st.sampled_from(["same"] * 3 + ["coop"]))
def test_published_checkpoints(tmp_path_factory, data, format, read_as):
    """Imported weights load as they are in the checkpoint, or are refused at once."""
    state: dict[Any, Any] = dict(CHECKPOINTS[format])
    change = data.draw(st.sampled_from(["none", "value", "missing", "key", "cut", "other"]))
    name = data.draw(st.sampled_from(sorted(state)))
    if change == "value":
        state[name] = data.draw(odd_tensors)
    elif change in ("missing", "key"):
        tensor = state.pop(name)
        state |= {data.draw(st.integers() | words): tensor} if change == "key" else {}
    folder = tmp_path_factory.getbasetemp()
    whole = data.draw(st.sampled_from([None, [], {"state_dict": 5}])) if change == "other" else {"state_dict": state}
    torch.save(whole, folder / "model.pth.tar")
    if change == "cut":
        content = (folder / "model.pth.tar").read_bytes()
        (folder / "model.pth.tar").write_bytes(content[: int(data.draw(st.floats(0, 0.99)) * len(content))])
    read_as = format if read_as == "same" else read_as
    found = said_well(lambda: import_prompts(folder / "model.pth.tar", read_as), ValueError)
    event(f"taken: {found is not None}")
    assert found is not None or change != "none" or read_as != format
    if found is None:
        return
    found.save_pretrained(folder / "adapter")
    assert load_file(folder / "adapter" / "adapter_model.safetensors").keys() == found.state_dict.keys()
    model = said_well(lambda: load_adapter(folder / "adapter", tiny_clip()), ValueError)
    assert model is not None or change != "none"
    assert all(tensor.isfinite().all() for tensor in found.state_dict.values())


def test_what_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "missing", "\0"):
        assert said_well(lambda path=path: Recipe.read(path), ValueError) is None
        assert said_well(lambda path=path: DatasetSource.read(path), ValueError) is None
        assert said_well(lambda path=path: import_prompts(path, "coop"), ValueError) is None
