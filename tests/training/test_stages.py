"""Training in stages: rows for the classes of the training, texts for all others."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerState

from peft_ncgeo import ZeroShotClassifier
from peft_ncgeo.classifiers.exported_classifier import ExportedClassifier
from peft_ncgeo.geometry.sphere import cosine_logits
from peft_ncgeo.hub import export_classifier, load_adapter, save_adapter
from peft_ncgeo.models.text_setting import TextSetting, active_text_setting
from peft_ncgeo.training import GeometryTrainer, GeometryTrainingArguments, Recipe, interpolate, train_stages

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor
from ..launching import launch
from ..papers.test_clip_lora import pattern

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NORMS = {"LNTuningConfig": {"target_modules": ["layer_norm1", "layer_norm2"]}}
LORA = {"LoraConfig": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}}
ARGS = {"batch_size": 8, "disable_tqdm": True, "learning_rate": 0.01, "logging_steps": 1, "seed": 7}
ARGS |= {"save_strategy": "steps", "save_steps": 2, "template": "the {} in the tree."}
OTHERS = ["blue cat", "red tree"]


def recipe(first=None, **second) -> Recipe:
    stages = [
        {"peft": first or NORMS, "args": {"max_steps": 4}},
        {"rows": "texts", "args": {"max_steps": 6}, **second},
    ]
    return Recipe.from_dict("two", {"stages": stages, "args": {"optim": "adamw_torch"}})


def run(folder, setting=None, model=None, **options):
    args = options.pop("args", {})
    return train_stages(
        setting or recipe(),
        model or tiny_clip(),
        tiny_images(32),
        tiny_processor(),
        folder,
        {**ARGS, **args},
        **options,
    )


def state(trainer) -> dict[str, torch.Tensor]:
    rows = active_text_setting(trainer.model).rows
    return {**{n: p.detach().clone() for n, p in trainer.model.named_parameters()}, "rows": rows.clone()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> GeometryTrainer:
    return run(tmp_path_factory.mktemp("stages") / "run")


def features(model, images):
    pixels = tiny_processor().image_processor(images=images, return_tensors="pt")
    with torch.no_grad():
        return nn.functional.normalize(model.eval().get_image_features(**pixels).pooler_output, dim=-1)


def text_features(model, names):
    texts = tiny_processor().tokenizer(
        [f"the {name} in the tree." for name in names], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        inputs = {name: texts[name] for name in ("input_ids", "attention_mask")}
        return nn.functional.normalize(model.eval().get_text_features(**inputs).pooler_output, dim=-1)


def test_rows_for_trained_names_and_texts_for_others(whole):
    images, model = tiny_images(10, seed=3)["image"][:], whole.model
    rows = active_text_setting(model).rows
    assert rows.shape == (len(NAMES), model.config.projection_dim)
    names = [OTHERS[0], NAMES[3], OTHERS[1], NAMES[0].replace(" ", "_")]
    texts = text_features(model, names)
    texts[1], texts[3] = (nn.functional.normalize(rows[k], dim=0) for k in (3, 0))
    expected = (model.get_base_model().logit_scale.exp() * features(model, images) @ texts.T).softmax(-1)
    found = ZeroShotClassifier(model, tiny_processor()).predict_proba(images, names)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", [NORMS, {"AdaptFormerConfig": {"bottleneck_dim": 2}}], ids=["norms", "adaptformer"])
def test_rows_start_at_the_tuned_texts_and_follow_the_published_steps(tmp_path, first):
    """Stage 2 repeated by hand: AdamW on the rows alone, with the batches that the trainer drew.

    The tower is the tuned one also where an adapter cannot be merged into its weights, and stays as stage 1 left it.
    """
    trainer = run(tmp_path / "run", recipe(first), args={"batch_size": 32, "lr_scheduler_type": "constant"})
    model, images = trainer.model, tiny_images(32)
    x, labels = features(model, images["image"][:]), torch.tensor(images["label"])
    rows = nn.Parameter(text_features(model, NAMES))
    optimizer = torch.optim.AdamW([rows], lr=ARGS["learning_rate"], weight_decay=0.0)
    scale = model.get_base_model().logit_scale.exp().item()
    for _ in range(6):  # each batch is the whole set
        optimizer.zero_grad()
        nn.functional.cross_entropy(scale * x @ nn.functional.normalize(rows, dim=-1).T, labels).backward()
        optimizer.step()
    torch.testing.assert_close(active_text_setting(model).rows, rows.detach(), atol=2e-4, rtol=1e-3)
    saved = load_file(tmp_path / "run" / "stage-1" / "adapter_model.safetensors")
    again = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert saved.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in saved.items())


def test_published_numbers():
    """Fixture: W from the texts T, CE of s unit(x) . unit(w), AdamW at 2e-4 and weight decay 1e-2, in float64."""

    def unit(values):
        return torch.tensor(values / np.linalg.norm(values, axis=-1, keepdims=True))

    x, rows = unit(pattern(6, 4, 1)), nn.Parameter(unit(pattern(3, 4, 5)))
    labels, losses = torch.tensor([0, 0, 1, 1, 2, 2]), []
    optimizer = torch.optim.AdamW([rows], lr=2e-4, weight_decay=1e-2)
    for _ in range(11):
        loss = nn.functional.cross_entropy(cosine_logits(x, rows, torch.tensor(np.log(10.0))), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(1.377059, abs=5e-7)
    assert losses[1] == pytest.approx(1.375536, abs=5e-7)
    assert losses[10] == pytest.approx(1.361859, abs=5e-7)


def test_stage_two_leaves_the_towers_alone(whole, tmp_path):
    only = Recipe.from_dict(
        "one", {"stages": [{"peft": NORMS, "args": {"max_steps": 4}}], "args": {"optim": "adamw_torch"}}
    )
    one = run(tmp_path / "one", only)
    assert active_text_setting(one.model).rows is None
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name


def test_rows_stop_on_their_way_from_the_texts(whole, tmp_path):
    """By hand from the trained rows: the same directions as `(1 - a) t + a w`, in a run that was resumed too."""
    trained = nn.functional.normalize(active_text_setting(whole.model).rows, dim=-1)
    texts = text_features(whole.model, NAMES)
    for fraction, folder in ((0.3, "part"), (0, "none"), (0.3, "part")):
        trainer = run(tmp_path / folder, recipe(fraction=fraction), resume=True)
        rows = active_text_setting(trainer.model).rows
        mixed = (1 - fraction) * texts + fraction * trained
        torch.testing.assert_close(rows, mixed, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(trained, texts, atol=1e-2)


def test_the_trainer_evaluates_with_the_rows(whole):
    images = tiny_images(20, seed=5)
    classifier = ZeroShotClassifier(whole.model, tiny_processor())
    predicted = classifier.predict(images["image"][:])
    expected = np.mean([name == NAMES[label] for name, label in zip(predicted, images["label"], strict=True)])
    assert whole.evaluate(images)["eval_accuracy"] == pytest.approx(expected)


def test_saved_and_loaded_with_other_names(whole, tmp_path):
    images = tiny_images(6, seed=3)["image"][:]
    names = [*OTHERS, *NAMES[:2]]
    expected = ZeroShotClassifier(whole.model, tiny_processor()).predict_proba(images, names)
    save_adapter(whole.model, tmp_path / "shared", tiny_processor())
    for folder in (Path(whole.args.output_dir), tmp_path / "shared"):
        loaded = ZeroShotClassifier(load_adapter(folder, tiny_clip()), tiny_processor())
        torch.testing.assert_close(loaded.predict_proba(images, names), expected)
        assert loaded.class_names == NAMES
    exported = export_classifier(whole.model, names, tmp_path / "exported", tiny_processor())
    pixels = tiny_processor().image_processor(images=images, return_tensors="pt")
    with torch.no_grad():
        logits = ExportedClassifier.from_pretrained(exported)(**pixels).logits
    torch.testing.assert_close(logits.softmax(-1), expected, atol=1e-5, rtol=1e-4)


def test_a_card_says_it_and_names_no_pipeline(whole, tmp_path):
    save_adapter(whole.model, tmp_path, tiny_processor(), record=whole.record())
    card = (tmp_path / "README.md").read_text()
    assert "trained rows" in card
    assert "pipeline(" not in card
    assert "LNTuningConfig" in card


def test_training_on_drops_the_rows(whole, tmp_path):
    model = load_adapter(whole.args.output_dir, tiny_clip())
    model.peft_config["default"].inference_mode = False
    model.set_adapter("default")
    args = GeometryTrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", disable_tqdm=True)
    GeometryTrainer(model, args, tiny_images(8), processing_class=tiny_processor()).train()
    assert active_text_setting(model) == TextSetting("the {} in the tree.", tuple(NAMES))
    assert active_text_setting(model).rows is None


def run_and_write(folder: str) -> None:
    torch.set_num_threads(1)
    found = state(run(Path(folder) / "run"))
    save_file(found, Path(folder) / f"state-{os.environ['RANK']}.safetensors")


def test_two_processes_train_as_one(whole, tmp_path):
    assert launch(run_and_write, str(tmp_path), processes=2) == [0, 0]
    expected = state(whole)
    for rank in (0, 1):
        for name, value in load_file(tmp_path / f"state-{rank}.safetensors").items():
            torch.testing.assert_close(value, expected[name], atol=2e-4, rtol=1e-3)
    loaded = load_adapter(tmp_path / "run", tiny_clip())
    torch.testing.assert_close(active_text_setting(loaded).rows, expected["rows"], atol=2e-4, rtol=1e-3)


class Stop(TrainerCallback):
    """Stops the training of one stage with an exception, as a kill would."""

    def __init__(self, stage: int, step: int) -> None:
        self.stage, self.step = stage, step

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(f"stage-{self.stage}") and state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("stage", "step"), [(1, 1), (1, 3), (2, 1), (2, 5)])
def test_a_killed_run_goes_on_in_either_stage(whole, tmp_path, stage, step):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(folder, callbacks=[Stop(stage, step)])
    again = state(run(folder, resume=True))
    for name, value in state(whole).items():
        assert torch.equal(again[name], value), name


def test_a_finished_run_is_not_trained_again(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole.args.output_dir, folder)
    again = run(folder, resume=True, callbacks=[Stop(1, 1), Stop(2, 1)])
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(again).items())
    assert again.state.global_step == 4


def test_a_stage_can_train_the_adapter_further(tmp_path):
    stages = [
        {"peft": LORA, "args": {"max_steps": 2}},
        {"classification_loss": {"LogitAdjustment": {}}, "args": {"max_steps": 2, "learning_rate": 0.05}},
        {"rows": "texts", "args": {"max_steps": 2}},
    ]
    setting = Recipe.from_dict("three", {"stages": stages})
    expected = state(run(tmp_path / "whole", setting))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", setting, callbacks=[Stop(2, 1)])
    again = state(run(tmp_path / "killed", setting, resume=True))
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_each_stage_is_evaluated_on_the_sets_that_it_can_classify(tmp_path):
    sets = {"base": tiny_images(10), "new": tiny_images(10, OTHERS)}
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    every |= {"metric_for_best_model": "eval_base_accuracy"}
    trainer = run(tmp_path / "run", args=every, eval_dataset=sets)
    assert {"eval_base_accuracy", "eval_new_accuracy"} <= trainer.evaluate().keys()
    logged = []
    for stage in (1, 2):
        history = TrainerState.load_from_json(str(tmp_path / "run" / f"stage-{stage}" / "trainer_state.json"))
        logged.append({name for entry in history.log_history for name in entry if name.endswith("_accuracy")})
    assert {"eval_base_accuracy", "eval_new_accuracy"} <= logged[0]
    assert {name for name in logged[1] if "balanced" not in name} == {"eval_base_accuracy"}
    with pytest.raises(ValueError, match="stage 2.*eval_strategy"):
        run(tmp_path / "other", args=every, eval_dataset=sets["new"])
    assert not (tmp_path / "other").exists()


def test_another_run_is_not_mixed_in(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole.args.output_dir, folder)
    with pytest.raises(FileExistsError, match="resume"):
        run(folder)
    with pytest.raises(ValueError, match="another recipe"):
        run(folder, recipe(LORA), resume=True)
    with pytest.raises(ValueError, match="another recipe"):
        run(folder, resume=True, args={"learning_rate": 0.5})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError):
        run(tmp_path / "other", resume=True)


def damaged(folder: Path, how: str) -> None:
    file = folder / "class_rows.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif how == "of another adapter":
        save_file({"rows": torch.ones(5, 16)}, file, metadata={"adapter_sha256": "0" * 64})
    elif how == "too few":
        save_file({"rows": torch.ones(3, 16)}, file)
    else:
        (folder / "geometry.json").unlink()


@pytest.mark.parametrize("how", ["truncated", "of another adapter", "too few", "without names"])
def test_damaged_rows_are_refused(whole, tmp_path, how):
    folder = tmp_path / "run"
    shutil.copytree(whole.args.output_dir, folder)
    damaged(folder, how)
    with pytest.raises(ValueError, match="class_rows") as refused:
        load_adapter(folder, tiny_clip())
    assert "\n" not in str(refused.value)


def test_rows_of_another_width_are_refused(whole):
    model = copy.deepcopy(whole.model)
    vars(model.peft_config["default"])["ncgeo_text_setting"] = TextSetting(None, ("red cat",), torch.ones(1, 3))
    with pytest.raises(ValueError, match="3 numbers"):
        ZeroShotClassifier(model, tiny_processor()).text_features(NAMES)


def test_rows_are_not_interpolated(whole):
    with pytest.raises(ValueError, match="rows"):
        interpolate(whole.model, 0.5)


def test_models_without_rows_to_train_are_refused(tmp_path, whole):
    with pytest.raises(ValueError, match="vision prompts"):
        run(tmp_path / "prompts", recipe({"NPTConfig.vpt": {}}))
    with pytest.raises(ValueError, match="without adapters"):
        run(tmp_path / "tuned", model=whole.model)
    with pytest.raises(ValueError, match="no stages"):
        run(tmp_path / "plain", Recipe.from_dict("plain", {"peft": NORMS}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stages": []}, "at least one stage"),
        ({"stages": [{"args": {}}]}, "first stage"),
        ({"stages": [{"peft": NORMS, "rows": "texts"}]}, "first stage"),
        ({"stages": [{"peft": NORMS}, {"peft": LORA}]}, "first stage"),
        ({"stages": [{"peft": NORMS}, {"rows": "means"}]}, "must be 'texts'"),
        ({"stages": [{"peft": NORMS}, {"row": "texts"}]}, "did you mean 'rows'"),
        ({"stages": [{"peft": NORMS}, {"rows": "texts", "fraction": 1.5}]}, "fraction=1.5"),
        ({"stages": [{"peft": NORMS}, {"rows": "texts", "fraction": "half"}]}, "fraction='half'"),
        ({"stages": [{"peft": NORMS, "fraction": 0.5}]}, "fraction belongs to a stage with rows"),
        ({"stages": [{"peft": NORMS}, {"stages": []}]}, "unknown key"),
        ({"stages": [{"peft": NORMS}, {"args": 3}]}, "stage 2: args"),
        ({"stages": [3]}, "a stage must be a mapping"),
        ({"stages": [{"peft": NORMS}], "peft": LORA}, "beside stages"),
        ({"rows": "texts"}, "unknown key"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(content, message):
    with pytest.raises(ValueError, match=message) as refused:
        Recipe.from_dict("wrong", content)
    assert "\n" not in str(refused.value)
