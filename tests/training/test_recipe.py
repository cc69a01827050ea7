"""Recipes: names, values and arguments are checked when the file is read, and the command line has the last word."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig
from transformers import HfArgumentParser

from peft_ncgeo import GeometryTrainingArguments, NPTConfig
from peft_ncgeo.losses import CrossEntropy, OTPreservation
from peft_ncgeo.training import Recipe, parse_with_recipe
from peft_ncgeo.training.recipe_files import describe_recipe, recipe_names

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
RECIPES = sorted([*FOLDER.glob("*.yaml"), *(FOLDER / "images").glob("*.yaml")])


@dataclass
class Script:
    recipe: str | None = None
    batch_size: int = 7


@dataclass
class ImageScript(Script):
    """With the arguments of `train_image_classifier.py`."""

    head: str = "linear"
    init: str = "random"
    projected: bool = True
    imbalance_factor: float = 0


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_whole_recipe(tmp_path):
    recipe = Recipe.read(
        write(
            tmp_path,
            """
            peft: {NPTConfig: {num_text_tokens: 4, text_init: a photo of a}}
            losses: [{OTPreservation: {budget: 5e-2, modality: image}}, {OTPreservation: {weight: 1e1}}]
            classification_loss: null
            args: {learning_rate: 5e-3}
            """,
        )
    )
    assert recipe.name == "mine"
    assert recipe.config() == NPTConfig(num_text_tokens=4, text_init="a photo of a")
    assert recipe.config() is not recipe.config()
    first, second = recipe.losses()
    assert isinstance(first, OTPreservation)
    assert (first.budget, first.modality, second.weight) == (0.05, "image", 10.0)
    assert recipe.losses()[0] is not first
    assert recipe.classification_loss() is None
    assert recipe.args == {"learning_rate": 0.005}


def test_defaults_presets_and_pefts_own(tmp_path):
    recipe = Recipe.read(write(tmp_path, "peft: NPTConfig.coop"))
    assert recipe.config() == NPTConfig.coop()
    assert recipe.losses() == []
    assert isinstance(recipe.classification_loss(), CrossEntropy)
    lora = Recipe.read(write(tmp_path, "peft: {LoraConfig: {r: 4, target_modules: [q_proj]}}")).config()
    assert isinstance(lora, LoraConfig)
    assert lora.r == 4


def test_the_command_line_overrides_the_recipe(tmp_path):
    path = write(tmp_path, "args: {learning_rate: 3e-4, num_train_epochs: 9, batch_size: 5}")
    parser = HfArgumentParser((Script, GeometryTrainingArguments))
    (script, args), recipe = parse_with_recipe(parser, ["--recipe", str(path), "--num_train_epochs", "2"])
    assert (args.learning_rate, args.num_train_epochs, script.batch_size) == (3e-4, 2, 5)
    assert recipe is not None
    (script, _), none = parse_with_recipe(HfArgumentParser((Script, GeometryTrainingArguments)), [])
    assert (script.batch_size, none) == (7, None)


@pytest.mark.parametrize(
    ("words", "steps"), [([], 8), (["--num_train_epochs", "2"], -1), (["--num-train-epochs=2", "--max_steps=3"], 3)]
)
def test_epochs_of_the_command_line_replace_the_steps_of_a_recipe(tmp_path, words, steps):
    one = write(tmp_path, "args: {max_steps: 8}")
    (_, args), _ = parse_with_recipe(
        HfArgumentParser((Script, GeometryTrainingArguments)), ["--recipe", str(one), *words]
    )
    assert args.max_steps == steps
    several = write(tmp_path, "stages: [{peft: {LoraConfig: {}}, args: {max_steps: 8}}, {args: {max_steps: 8}}]")
    _, recipe = parse_with_recipe(
        HfArgumentParser((Script, GeometryTrainingArguments)), ["--recipe", str(several), *words]
    )
    of_stages = [{**recipe.args, **stage.args}.get("max_steps", -1) for stage in recipe.stages]
    assert of_stages == [steps, steps]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pefft: {}", "unknown key 'pefft'; did you mean 'peft'?"),
        ("peft: {NTPConfig: {}}", "unknown name 'NTPConfig'; did you mean 'NPTConfig'?"),
        ("peft: {EvaConfig: {}}", "unknown name 'EvaConfig'"),  # a part of LoraConfig, no method
        ("peft: {CoPAConfig: {}}", "unknown name 'CoPAConfig'"),  # for `adapt`
        ("peft: {NPTConfig: {text_dept: 2}}", "unknown field of NPTConfig 'text_dept'; did you mean 'text_depth'?"),
        ("peft: NPTConfig.prompt_to", "unknown preset of NPTConfig 'prompt_to'; did you mean 'prompt_ot'?"),
        ("losses: [{OTPreservaton: {}}]", "unknown name 'OTPreservaton'; did you mean 'OTPreservation'?"),
        (
            "losses: [{OTPreservation: {wieght: 1}}]",
            "unknown field of OTPreservation 'wieght'; did you mean 'weight'?",
        ),
        ("losses: [{OTPreservation: {}}]", "exactly one of weight and budget"),
        ("losses: [{OTPreservation: {weight: 1}, CrossEntropy: {}}]", "must be one name with its fields"),
        ("peft: {NPTConfig: {num_text_tokens: four}}", "num_text_tokens='four' must be a whole number"),
        ("losses: [{LogitAdjustment: {}}]", "unknown name 'LogitAdjustment'"),
        ("classification_loss: {OTPreservation: {weight: 1}}", "unknown name 'OTPreservation'"),
        ("callbacks: {PromptAveraging: {mean: 3}}", "callbacks must be a list; write `callbacks: [{Name: {...}}]`"),
        ("losses: {OTPreservation: {weight: 1}}", "losses must be a list"),
        ("head: {TipAdaptor: {}}", "unknown name 'TipAdaptor'; did you mean 'TipAdapter'?"),
        ("head: {TipAdapter: {alfa: 1}}", "unknown field of TipAdapter 'alfa'; did you mean 'alpha'?"),
        ("head: {TipAdapter: {alpha: -1}}", "alpha=-1"),
        ("{head: CLAP, losses: [{OTPreservation: {weight: 1}}]}", "losses without peft trains nothing"),
        (
            "{head: CLAP, classification_loss: {LogitAdjustment: {}}}",
            "classification_loss without peft trains nothing",
        ),
        ("stages: [{peft: NPTConfig.coop, head: CLAP}]", "stage 1: unknown key 'head'"),
        ("- a list", "must hold the keys peft, losses, classification_loss, callbacks, args"),
        ("peft: {", "cannot be read: while parsing"),
    ],
)
def test_refusals_name_the_nearest_right_one(tmp_path, text, message):
    with pytest.raises(ValueError) as caught:
        Recipe.read(write(tmp_path, text))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"Recipe {tmp_path / 'mine.yaml'}")
    assert "\n" not in str(caught.value)


def test_unknown_arguments_and_files(tmp_path):
    path = write(tmp_path, "args: {learning_rat: 1}")
    with pytest.raises(ValueError, match="unknown argument 'learning_rat'; did you mean 'learning_rate'"):
        parse_with_recipe(HfArgumentParser((Script, GeometryTrainingArguments)), [f"--recipe={path}"])
    path = write(tmp_path, "losses: [{OTPreservation: {budget: 0.05}}]")
    parser = HfArgumentParser((Script, GeometryTrainingArguments), allow_abbrev=False)
    for word, near in (("--budget", ""), ("--learning_rat", "--learning_rate")):
        with pytest.raises(ValueError, match="recipe's YAML") as caught:
            parse_with_recipe(parser, [f"--recipe={path}", word, "1"])
        assert str(path) in str(caught.value)
        assert re.findall(r"mean '(.*?)'", str(caught.value)) == [near] * bool(near)
    path = write(tmp_path, "{peft: NPTConfig.coop, head: CLAP}")
    with pytest.raises(ValueError, match="the head CLAP, .*fit the head with adapt"):
        parse_with_recipe(HfArgumentParser((Script, GeometryTrainingArguments)), [f"--recipe={path}"])
    with pytest.raises(ValueError, match="missing.yaml cannot be read"):
        Recipe.read(tmp_path / "missing.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_whole(path):
    recipe = Recipe.read(path)
    script = ImageScript if path.stem.startswith("lift") else Script
    recipe.set_defaults(HfArgumentParser((script, GeometryTrainingArguments)))
    assert (recipe.stages[0] if recipe.stages else recipe).config is not None
    assert recipe.args["max_grad_norm"] == 0
    assert recipe.args.get("optim") != "sgd" or recipe.args["optim_args"] == "momentum=0.9"
    assert "our reading" in path.read_text() or "# Ours" in path.read_text()


def test_a_default_recipe_is_read_where_none_is_named(tmp_path):
    for name, rate in (("default", 0.5), ("other", 0.25)):
        (tmp_path / f"{name}.yaml").write_text(f"args: {{learning_rate: {rate}}}\n")

    @dataclass
    class Script:
        recipe: str | None = None
        learning_rate: float = 0.0

    parser, default = HfArgumentParser(Script), tmp_path / "default.yaml"
    (script,), recipe = parse_with_recipe(parser, [], default)
    assert (recipe.name, script.learning_rate) == ("default", 0.5)
    (script,), recipe = parse_with_recipe(
        parser, ["--recipe", str(tmp_path / "other.yaml")], tmp_path / "default.yaml"
    )
    assert (recipe.name, script.learning_rate) == ("other", 0.25)


def test_a_recipe_of_the_package_is_read_by_its_name():
    assert Recipe.read("demo/budget").source == Recipe.read(FOLDER / "demo" / "budget.yaml").source
    assert {path.stem for path in RECIPES} <= {name.rpartition("/")[2] for name in recipe_names()}
    with pytest.raises(ValueError, match="'lora_budget'"):
        Recipe.read("lora_bugdet")
    assert "CLIP-LoRA, arXiv 2405.18541" in describe_recipe("clip_lora")


def test_methods_of_other_packages_count_whenever_they_are_registered(monkeypatch):
    """But none in place of a method of PEFT or of this package."""
    for name in ("OtherConfig", "LoraConfig", "NPTConfig"):
        config = type(name, (LoraConfig,), {"__module__": "other.methods"})
        monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, f"OTHER_{name}", config)
    content = {"target_modules": ["q_proj"], "r": 3}
    assert Recipe.from_dict("a", {"peft": {"OtherConfig": content}}).config().__class__.__module__ == "other.methods"
    assert type(Recipe.from_dict("a", {"peft": {"LoraConfig": content}}).config()) is LoraConfig
    assert type(Recipe.from_dict("a", {"peft": "NPTConfig.prompt_ot"}).config()) is NPTConfig
