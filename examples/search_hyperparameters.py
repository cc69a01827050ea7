"""Search the learning rate and the weight of a loss with Optuna, by accuracy on validation images.

    pip install ".[search]"
    python examples/search_hyperparameters.py --n_trials 20

Each trial trains a new model with new losses on the demo's development split. The best trial is trained again
and evaluated on base and new classes.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import optuna
import transformers
from peft import PeftModel, get_peft_model

from peft_ncgeo import GeometryTrainer, GeometryTrainingArguments, NPTConfig
from peft_ncgeo.data import load_demo
from peft_ncgeo.losses import OTPreservation


def make_model() -> PeftModel:
    return get_peft_model(load_demo("development").model, NPTConfig.prompt_ot())


def make_losses(trial: Any) -> list[OTPreservation]:
    """Return the terms of a trial; `trial` is None when the trainer is created."""
    return [OTPreservation(weight=1.0 if trial is None else trial.suggest_float("ot_weight", 0.1, 30, log=True))]


def search_space(trial: Any) -> dict[str, Any]:
    """Return the training arguments of a trial."""
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 2e-2, log=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_trials", type=int, default=20)
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--shots", type=int, default=16, help="Training images per base class.")
    parser.add_argument("--output_dir", default="outputs/search")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    demo = load_demo("development", shots=options.shots)
    trainer = GeometryTrainer(
        model_init=make_model,
        args=GeometryTrainingArguments(
            options.output_dir,
            max_steps=options.max_steps,
            per_device_train_batch_size=60,
            per_device_eval_batch_size=240,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=demo.splits["train"],
        eval_dataset=demo.splits["validation"],
        processing_class=demo.processor,
        losses=make_losses,
    )
    best = trainer.hyperparameter_search(
        search_space,
        lambda metrics: metrics["eval_accuracy"],
        n_trials=options.n_trials,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=1),
    )
    print(f"Best of {options.n_trials}: validation accuracy {100 * best.objective:.1f} with {best.hyperparameters}")

    trainer.args.learning_rate = best.hyperparameters["learning_rate"]
    trainer.train(trial=optuna.trial.FixedTrial(best.hyperparameters))
    trainer.save_model()
    metrics = trainer.evaluate({name: demo.splits[name] for name in ("base", "new")})
    print(f"Base {100 * metrics['eval_base_accuracy']:.1f}, new {100 * metrics['eval_new_accuracy']:.1f}")


if __name__ == "__main__":
    main()
