"""`model_init`: each training has a model, losses and callbacks of its own, also in a search."""

from __future__ import annotations

import optuna
import pytest
import torch
from transformers import EarlyStoppingCallback

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments
from peft_ncgeo.losses import CrossEntropy, LogitAdjustment, OTPreservation, Regularizer
from peft_ncgeo.training import GeometryMonitor, PromptAveraging, SlerpAlignment

from ...conftest import tiny_images, tiny_processor
from ..runs import ot_and_budget, prompted_clip, vit, weights

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]
optuna.logging.set_verbosity(optuna.logging.WARNING)


def make(output_dir, model_init=prompted_clip, model=None, losses=(), callbacks=(), loss=None, **arguments):
    defaults = {"per_device_train_batch_size": 8, "max_steps": 4, "learning_rate": 0.05, "logging_steps": 1}
    defaults |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 7}
    return GeometryTrainer(
        model,
        GeometryTrainingArguments(str(output_dir), **{**defaults, **arguments}),
        tiny_images(32),
        tiny_images(20, seed=1),
        tiny_processor(),
        losses=losses,
        callbacks=list(callbacks),
        classification_loss=loss or CrossEntropy(),
        model_init=None if model is not None else lambda: model_init(),
    )


def curve(run) -> list[dict[str, float]]:
    steps = [entry for entry in run.state.log_history if "loss/ce" in entry]
    return [{key: value for key, value in entry.items() if "/" in key} for entry in steps]


class Counting(Regularizer):
    """A term whose value is how often it was called: state that no checkpoint holds."""

    default_name = "count"

    def __init__(self):
        super().__init__(weight=1.0)
        self.calls = 0

    def forward(self, batch):
        self.calls += 1
        return 0 * batch.logits.sum() + self.calls


RUNS = {
    "prompts": lambda: {"losses": [*ot_and_budget(), Counting()], "callbacks": [PromptAveraging(mean=1.0, std=1.0)]},
    "head": lambda: {"model_init": vit, "callbacks": [SlerpAlignment(alpha=0.5)], "loss": LogitAdjustment()},
    "accumulated": lambda: {"losses": ot_and_budget(), "gradient_accumulation_steps": 2},
    "views": lambda: {"losses": ot_and_budget(), "augmentation": "crop_flip", "num_views": 2, "max_steps": 16},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_second_training_is_the_first_one_again(tmp_path, name):
    """And that of a model that was handed over."""
    options = RUNS[name]()
    run = make(tmp_path, **options)
    found = []
    for _ in range(2):
        run.train()
        found.append((weights(run.model), curve(run), run.evaluate()["eval_loss"]))
    build = options.pop("model_init", prompted_clip)
    torch.manual_seed(7)
    other = make(
        tmp_path, model=build(), **{**options, **{k: v for k, v in RUNS[name]().items() if k != "model_init"}}
    )
    torch.manual_seed(7)
    build()  # draws what it draws after the seed, as in train()
    other.train()
    for trained, steps, loss in found:
        torch.testing.assert_close(trained, weights(other.model), rtol=0, atol=0)
        assert steps == curve(other)
        assert loss == other.evaluate()["eval_loss"]
    assert any(not torch.equal(value, weights(build())[key]) for key, value in found[0][0].items())


def test_losses_as_given_are_not_touched(tmp_path):
    given = ot_and_budget()
    run = make(tmp_path, losses=given)
    run.train()
    assert given[1].multiplier == 1
    assert not given[0].memory.numel()
    assert run.losses[1].multiplier > 1
    kept = ot_and_budget()
    make(tmp_path, model=prompted_clip(), losses=kept).train()  # one model: its losses are the trainer's
    assert kept[1].multiplier > 1


def test_all_that_reads_the_model_reads_the_new_one(tmp_path):
    monitor = GeometryMonitor()
    run = make(tmp_path, losses=ot_and_budget(), callbacks=[monitor], bf16=True)
    first = run.model
    run.train()
    assert (
        run.model
        is run.extractor.model
        is run.frozen.extractor.model
        is run.task.model
        is run.features.extractor.model
    )
    assert run.model is not first
    assert run.evaluate()["eval_nc1"] > 0
    assert monitor.per_class
    expected = make(tmp_path, model=run.model).evaluate()
    assert run.evaluate()["eval_accuracy"] == expected["eval_accuracy"]
    before = run.record().sets["test"]["before"]
    assert before["accuracy"] == make(tmp_path, model=prompted_clip()).record().sets["test"]["before"]["accuracy"]


def test_the_patience_of_early_stopping_is_new_each_time(tmp_path):
    patience = EarlyStoppingCallback(3)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 12}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.0}
    run = make(tmp_path, callbacks=[patience], **options)
    steps = [run.train().global_step for _ in range(3)]
    assert steps == [4, 4, 4]  # nothing improves on the first evaluation
    assert patience.early_stopping_patience_counter == 3


def test_a_resumed_training_keeps_its_state(tmp_path):
    options = {"losses": ot_and_budget(), "save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "a", **options)
    whole.train()
    resumed = make(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    assert resumed.losses[1].multiplier == whole.losses[1].multiplier


def test_a_search_gives_what_separate_trainings_give(tmp_path):
    def options():
        return {"losses": ot_and_budget(), "callbacks": [PromptAveraging(mean=1.0, std=1.0)], "max_steps": 2}

    rates, objectives = [], []

    def space(trial):
        rates.append(trial.suggest_categorical("learning_rate", [0.01, 0.2]))
        return {"learning_rate": rates[-1]}

    def objective(metrics):
        objectives.append(metrics["eval_loss"])
        return metrics["eval_loss"]

    run = make(tmp_path, **options())
    best = run.hyperparameter_search(space, objective, n_trials=3, sampler=optuna.samplers.RandomSampler(seed=0))
    expected = {}
    for rate in set(rates):
        alone = make(tmp_path, **options(), learning_rate=rate)
        alone.train()
        expected[rate] = alone.evaluate()["eval_loss"]
    assert len(expected) == 2
    assert objectives == [expected[rate] for rate in rates]
    assert best.objective == min(objectives)
    with pytest.raises(ValueError, match="train"):
        run.evaluate()
    run.args.learning_rate = rates[0]
    run.train()
    assert run.evaluate()["eval_loss"] == objectives[0]


def test_losses_of_a_trial(tmp_path):
    seen = []

    def losses(trial):
        seen.append(None if trial is None else trial.number)
        weight = 1.0 if trial is None else trial.suggest_float("weight", 2.0, 3.0)
        return [OTPreservation(weight=weight)]

    run = make(tmp_path, losses=losses, loss=lambda: LogitAdjustment(tau=0.5), max_steps=1)
    assert run.losses[0].weight == 1.0
    best = run.hyperparameter_search(lambda trial: {}, lambda metrics: metrics["eval_loss"], n_trials=2)
    assert seen == [None, 0, 1]
    assert set(best.hyperparameters) == {"weight"}
    run.train(trial=optuna.trial.FixedTrial(best.hyperparameters))
    assert run.losses[0].weight == best.hyperparameters["weight"]
    assert run.classification_loss.tau == 0.5


def test_one_model_or_one_way_to_make_them(tmp_path):
    args = GeometryTrainingArguments(str(tmp_path))
    for both in ({}, {"model": prompted_clip(), "model_init": prompted_clip}):
        with pytest.raises(ValueError, match="model_init"):
            GeometryTrainer(args=args, processing_class=tiny_processor(), **both)
    optimizer = torch.optim.SGD(prompted_clip().parameters(), 0.1)
    with pytest.raises(ValueError, match="optimizers"):
        GeometryTrainer(
            args=args, processing_class=tiny_processor(), model_init=prompted_clip, optimizers=(optimizer, None)
        )
    with pytest.raises(TypeError, match="losses"):  # a function, but only one model
        make(tmp_path, model=prompted_clip(), losses=lambda: [])
