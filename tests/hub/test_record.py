"""Records of trainings: their numbers computed again by other ways, and a trainer that is left as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from peft_ncgeo import CoPAConfig, NPTConfig, PrototypeConfig, ZeroShotClassifier, adapt
from peft_ncgeo.hub import create_card
from peft_ncgeo.hub.record import Component
from peft_ncgeo.losses import LanguageCollapse, OTPreservation
from peft_ncgeo.training import GeometryMonitor, PromptAveraging, record_few_shot
from peft_ncgeo.training.card_record import record_training

from ..conftest import NAMES, tiny_clip, tiny_images, tiny_processor, tiny_vit
from ..training.runs import lora_clip, prompted_clip, trainer, vit, weights

pytestmark = [pytest.mark.filterwarnings("ignore:.*all of them get prompts"), pytest.mark.slow]
NEW = ["red bird", "blue tree", "green cat"]
SPEEDS = ("runtime", "second", "steps", "time")


def long_tail():
    """9, 7, 5, 3 and 1 images of five classes."""
    images = tiny_images(45)
    return images.select([i for i in range(45) if i // 5 <= 8 - 2 * (i % 5)])


def sets():
    return {"base": tiny_images(60, seed=1), "new": tiny_images(60, NEW, seed=2)}


def share(predicted, dataset) -> float:
    return float(np.mean(np.asarray(predicted) == np.asarray(dataset["label"])))


def zero_shot(model, dataset, template=None) -> list[int]:
    names = dataset.features["label"].names
    found = ZeroShotClassifier(model, tiny_processor(), template).predict(dataset["image"][:], names)
    return [names.index(name) for name in found]


PROMPTS = {"text_depth": 2, "vision_depth": 2, "template": "the {} in red."}
BUILDS = {
    "prompts": lambda: get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=2, num_vision_tokens=2, **PROMPTS)),
    "lora": lora_clip,
    "text-alone": lambda: get_peft_model(tiny_clip(), NPTConfig(num_text_tokens=3)),
}


@pytest.fixture(scope="module", params=BUILDS)
def run(request, tmp_path_factory):
    """A trained trainer over a long tail, with sets of base and new classes."""
    torch.manual_seed(0)
    template = {"template": "a {} of the tree."} if request.param == "lora" else {}
    options = {"train": long_tail(), "eval_dataset": sets(), "max_steps": 6, "learning_rate": 1.0, **template}
    run = trainer(tmp_path_factory.mktemp("out"), BUILDS[request.param](), **options)
    run.train()
    return run


# Numbers


def test_before_is_the_untuned_model_and_after_the_trainers_evaluation(run):
    record = run.record()
    template = {"NPTConfig": run.task.template, "LoraConfig": "a {} of the tree."}[record.adapter.name]
    assert record.template == template
    evaluated = run.evaluate()
    moved = []
    for name, dataset in sets().items():
        entry = record.sets[name]
        assert (entry["size"], entry["classes"]) == (60, len(dataset.features["label"].names))
        assert entry["before"]["accuracy"] == share(zero_shot(tiny_clip(), dataset, template), dataset)
        assert entry["after"]["accuracy"] == share(zero_shot(run.model, dataset, template), dataset)
        assert entry["after"]["accuracy"] == evaluated[f"eval_{name}_accuracy"]
        assert entry["after"]["balanced_accuracy"] == evaluated[f"eval_{name}_balanced_accuracy"]
        moved.append(entry["after"]["accuracy"] != entry["before"]["accuracy"])
    assert any(moved)
    row = record.row()
    assert row["seed"] == 7
    assert row["base"] == 100 * evaluated["eval_base_accuracy"]
    assert row["H"] == pytest.approx(100 * evaluated["eval_harmonic_mean"])


def test_groups_are_thirds_of_the_tail(run):
    record, dataset = run.record(), sets()["base"]
    assert (record.class_counts, record.thresholds, record.geometry_set) == ([9, 7, 5, 3, 1], "thirds", "base")
    labels = np.asarray(dataset["label"])
    for moment, model in (("before", tiny_clip()), ("after", run.model)):
        right = np.asarray(zero_shot(model, dataset, record.template)) == labels
        for group, classes in {"many": [0, 1], "medium": [2, 3], "few": [4]}.items():
            assert record.sets["base"][moment][group] == pytest.approx(right[np.isin(labels, classes)].mean())
        assert not {"many", "medium", "few"} & record.sets["new"][moment].keys()


def test_geometry_is_the_monitors(run, tmp_path):
    record, base = run.record(), {"base": sets()["base"]}
    for moment, model in (("before", tiny_clip()), ("after", run.model)):
        monitor, template = GeometryMonitor(), record.template if moment == "before" else run.args.template
        other = trainer(tmp_path, model, eval_dataset=base, callbacks=[monitor], template=template)
        metrics = other.evaluate()
        for key in ("nc1", "nc2", "nc3", "alignment", "class_exponent", "modality_gap", "text_nc2"):
            assert record.sets["base"][moment][key] == pytest.approx(metrics[f"eval_base_{key}"], rel=1e-5), key
        means, classifier = record.snapshots[moment == "after"]
        torch.testing.assert_close(means, monitor.class_means)
        torch.testing.assert_close(classifier, monitor.weights)


def test_an_image_classifier_against_its_head_before(tmp_path):
    dataset = tiny_images(60, seed=1)
    run = trainer(tmp_path, vit(), train=tiny_images(30), eval_dataset=dataset, max_steps=30)
    with torch.no_grad():
        run.model.get_base_model().classifier.original_module.bias[3] += 9.0
    run.train()
    record = run.record()
    assert (record.task, record.template, record.thresholds) == ("image-classification", None, None)
    assert record.sets["test"]["before"]["accuracy"] == share([3] * 60, dataset)
    assert record.sets["test"]["after"]["accuracy"] == run.evaluate()["eval_accuracy"]
    assert record.sets["test"]["after"]["accuracy"] != record.sets["test"]["before"]["accuracy"]


@pytest.mark.parametrize("residual", [False, True])
def test_few_shot_against_the_nearest_prototype(residual):
    names = sorted(NEW)
    support, dataset = tiny_images(9, names), tiny_images(60, names, seed=4)
    model = get_peft_model(tiny_vit(), CoPAConfig(residual_adapters=residual))
    labels = [names[label] for label in support["label"]]
    classifier = adapt(model, support["image"][:], labels, steps=30, lr=0.2, processor=tiny_processor())
    record = record_few_shot(classifier, dataset, class_counts=[3, 3, 3])
    entry = record.sets["test"]
    assert entry["after"]["accuracy"] == share(
        [names.index(n) for n in classifier.predict(dataset["image"][:])], dataset
    )
    e, p = classifier.heads.embed(classifier.features(dataset["image"][:]), classifier.prototypes)
    assert entry["after"]["gap"] == pytest.approx(float((e.mean(0) - p.mean(0)).norm()), rel=1e-4)
    assert record.terms == [Component("adapt", {"steps": 30, "lr": 0.2, "weight_decay": 0.1, "optimizer": "Adam"})]
    assert ("before" in entry) != residual  # the features that were are not known any more
    if not residual:
        features = classifier.features(dataset["image"][:])
        cosines = torch.cosine_similarity(features[:, None], classifier.prototypes[None], dim=-1)
        assert entry["before"]["accuracy"] == share(cosines.argmax(-1).tolist(), dataset)
    assert record.class_names == names
    with pytest.raises(ValueError, match="The data set's classes"):
        record_few_shot(classifier, tiny_images(6, NAMES))


# The trainer afterwards


def state(run) -> dict:
    return {
        "log": json.dumps(run.state.log_history),
        "step": run.state.global_step,
        "callbacks": list(run.callback_handler.callbacks),
        "template": run.args.template,
        "weights": {name: value.tolist() for name, value in weights(run.model).items()},
        "trainable": [parameter.requires_grad for parameter in run.model.parameters()],
        "predicted": zero_shot(run.model, tiny_images(10)),
    }


def test_the_trainer_is_left_as_it_was(run):
    before = state(run)
    first = run.record()
    assert state(run) == before
    second = run.record()
    assert second.sets == first.sets


def test_a_failure_leaves_it_too(tmp_path):
    dataset = tiny_images(10).add_column("broken", [0] * 10)
    run = trainer(tmp_path, prompted_clip(), eval_dataset={"good": tiny_images(10), "bad": dataset})
    run.eval_dataset["bad"] = dataset.with_transform(lambda rows: {"label": rows["label"]})  # no image any more
    before = state(run)
    with pytest.raises(ValueError, match="image"):
        run.record()
    assert state(run) == before


class Shown(TrainerCallback):
    """Counts the batches that are predicted."""

    def __init__(self):
        self.batches = 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += 1


def test_no_set_is_predicted_twice_by_the_same_model(tmp_path):
    shown = Shown()
    run = trainer(
        tmp_path, prompted_clip(), eval_dataset=sets(), callbacks=[shown], per_device_eval_batch_size=60, max_steps=2
    )
    run.train()
    evaluated = run.evaluate()
    assert shown.batches == 2
    record = run.record()
    assert shown.batches == 4  # the frozen model's
    assert record.sets["new"]["after"]["accuracy"] == evaluated["eval_new_accuracy"]
    assert run.record().sets == record.sets
    assert shown.batches == 4
    with torch.no_grad():  # written past every counter of changes
        next(p for p in run.model.parameters() if p.requires_grad).data.add_(3.0)
    changed = run.record().sets
    assert shown.batches == 6
    assert changed["base"]["before"] == record.sets["base"]["before"]
    assert changed["base"]["after"] != record.sets["base"]["after"]
    run.predict(tiny_images(5, seed=3))  # none of the trainer's sets
    assert run.record().sets == changed


def test_weights_trained_beside_adapters_are_measured_anew(tmp_path):
    model = prompted_clip()
    model.get_base_model().visual_projection.requires_grad_(True)
    run = trainer(tmp_path, model, eval_dataset=sets())
    run.evaluate()
    before = run.record().sets["base"]["after"]
    with torch.no_grad():
        model.get_base_model().visual_projection.weight.normal_()
    changed = run.record().sets["base"]["after"]
    assert changed["nc1"] != before["nc1"]
    assert changed["accuracy"] == run.evaluate()["eval_base_accuracy"]


def test_a_monitor_of_ones_own_is_left_alone(tmp_path):
    monitor = GeometryMonitor()
    run = trainer(tmp_path, prompted_clip(), eval_dataset=sets(), callbacks=[monitor])
    record = run.record()
    assert [c for c in run.callback_handler.callbacks if isinstance(c, GeometryMonitor)] == [monitor]
    assert monitor.class_means is None
    assert record.sets["base"]["after"]["nc1"] > 0
    assert record.snapshots is not None


# What else is told


def test_without_measuring_nothing_is_evaluated(run):
    shown = Shown()
    run.add_callback(shown)
    record = record_training(run, measure=False)
    run.remove_callback(shown)
    assert shown.batches == 0
    assert record.sets == {}
    assert record.snapshots is None
    assert (record.steps, record.seed, record.class_names) == (6, 7, NAMES)


def test_metrics_of_ones_own(tmp_path):
    """A card's accuracy is the share of right predictions, whatever else is computed or kept of them."""

    def only_list(prediction):
        return {"correct": [1.0, 0.0], "accuracy": 48.5}

    run = trainer(tmp_path, prompted_clip(), eval_dataset=tiny_images(10))
    expected = run.record().sets
    run.compute_metrics = only_list
    run.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    run.args.prediction_loss_only = True
    assert run.record().sets == expected
    assert run.compute_metrics is only_list
    assert run.args.prediction_loss_only


def test_numbers_of_ones_own_metrics_are_in_the_card_as_they_are(tmp_path):
    def counts(prediction, class_names):
        right = prediction.predictions.argmax(-1) == prediction.label_ids
        return {"right": int(right.sum()), "half_classes": len(class_names) / 2, "each": right.tolist()}

    run = trainer(tmp_path, prompted_clip(), eval_dataset=sets(), compute_metrics=counts)
    with torch.no_grad():  # else before and after are the same
        next(p for p in run.model.parameters() if p.requires_grad).data.add_(3.0)
    record = run.record()
    text = str(create_card(record=record))
    for name, half in (("base", "2.5"), ("new", "1.5")):
        right = [round(60 * record.sets[name][moment]["accuracy"]) for moment in ("before", "after")]
        assert f"| right | {name} | {right[0]} | {right[1]} |" in text
        assert f"| half_classes | {name} | {half} | {half} |" in text.replace("\\_", "_")
        assert set(record.sets[name]["after"]["own"]) == {"right", "half_classes"}
    run.evaluate()
    assert run.record().sets == record.sets
    assert "own" not in trainer(tmp_path, prompted_clip(), eval_dataset=sets()).record().sets["base"]["after"]


class Named(TrainerCallback):
    name = "mine"


def test_terms_with_what_was_set_and_no_more(tmp_path):
    terms = [OTPreservation(weight=lambda t: t, solver="entropic"), LanguageCollapse(budget=0.1, name="mine too")]
    callbacks = [PromptAveraging(mean=2, std=1), GeometryMonitor(nc4=False), Named()]
    run = trainer(tmp_path, prompted_clip(), terms, callbacks=callbacks)
    assert run.record().terms == [
        Component("CrossEntropy"),
        Component("OTPreservation", {"weight": "a function of the share of training done", "solver": "entropic"}),
        Component("LanguageCollapse", {"budget": 0.1, "name": "mine too"}),
        Component("PromptAveraging", {"mean": 2}),
        Component("Named"),
    ]


def test_settings_of_a_config_that_is_not_ours(tmp_path):
    model = get_peft_model(
        tiny_clip(), LoraConfig(r=3, target_modules=["v_proj", "q_proj"], rank_pattern={"v_proj": 2})
    )
    record = trainer(tmp_path, model).record()
    settings = {"r": 3, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}
    assert record.adapter == Component("LoraConfig", settings)


def test_arguments_tell_no_path_and_no_token(tmp_path):
    run = trainer(
        tmp_path / "secret-place",
        prompted_clip(),
        run_name="/secret-place/run",
        hub_token="hf_secret",
        hub_model_id="user/secret-place",
        resume_from_checkpoint="/secret-place/checkpoint-1",
        trackio_space_id="secret-place",
        project="secret-place",
        accelerator_config={"split_batches": False},
        weight_decay=0.5,
        augmentation="crop_flip",
        warmup_steps=3,
    )
    record = run.record()
    assert "secret" not in json.dumps(record.arguments)
    assert str(tmp_path) not in json.dumps(record.to_dict())
    assert not any(
        re_aside in name for name in record.arguments for re_aside in ("dir", "hub", "token", "path", "save")
    )
    names = list(record.arguments)
    changed = set(names[: record.changed])
    assert {"learning_rate", "weight_decay", "augmentation", "warmup_steps", "optim", "seed"} <= changed
    assert {"lr_scheduler_type", "gradient_accumulation_steps", "class_balanced_sampling"} <= set(names) - changed
    assert record.arguments["weight_decay"] == 0.5
    assert (record.seed, record.processes, record.device) == (7, 1, "cpu")


def test_a_head_of_another_size_has_no_before(tmp_path):
    names = NAMES[:3]
    config = PrototypeConfig(projection_dim=16, num_classes=3, num_vision_tokens=2)
    run = trainer(tmp_path, vit(config), train=tiny_images(30, names), eval_dataset=tiny_images(9, names), max_steps=1)
    run.train()
    record = run.record()
    assert "before" not in record.sets["test"]
    assert record.sets["test"]["after"]["nc1"] is not None
    assert record.snapshots is None
    assert "before training" not in create_card(record=record).text


def test_a_classifier_is_described_by_its_own_adapter():
    names = sorted(NEW)
    model = get_peft_model(tiny_vit(), CoPAConfig())
    support = tiny_images(9, names)
    labels = [names[label] for label in support["label"]]
    classifier = adapt(model, support["image"][:], labels, steps=1, processor=tiny_processor())
    model.add_adapter("later", CoPAConfig(residual_adapters=True))
    model.set_adapter("later")
    assert "residual_adapters" not in record_few_shot(classifier).adapter.settings


def test_a_plain_model_is_refused(tmp_path):
    run = trainer(tmp_path, tiny_clip(), eval_dataset=tiny_images(10))
    with pytest.raises(TypeError, match="Expected a PeftModel, got CLIPModel"):
        run.record()
