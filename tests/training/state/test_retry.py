"""`auto_find_batch_size`: what comes after running out of memory is a training with the smaller batch, and no more."""

from __future__ import annotations

import pytest
import torch

from peft_ncgeo.losses import OTPreservation, SpaceAlignment
from peft_ncgeo.training import GradientProjection, PromptAveraging, SlerpAlignment

from ...conftest import tiny_images
from ..runs import lora_vit, ot_and_budget, prompted_clip, trainer, weights
from .test_accumulation import Breaks

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]

MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"
CASES = {
    "clip": lambda: {
        "model": prompted_clip(),
        "losses": [*ot_and_budget(), SpaceAlignment(weight=0.5)],
        "callbacks": [GradientProjection(), PromptAveraging(mean=1, std=1)],
    },
    "views": lambda: {  # image features known from the start
        "model": prompted_clip(num_vision_tokens=0),
        "losses": ot_and_budget(),
        "augmentation": "crop_flip",
        "num_views": 1,
    },
    "vit": lambda: {
        "model": lora_vit(),
        "losses": [OTPreservation(budget=0.01, modality="image", memory_size=6)],
        "callbacks": [SlerpAlignment(alpha=2e-5), GradientProjection()],
    },
}


def run(tmp_path, case, at=0, backward=False, **arguments):
    options = CASES[case]()
    options["losses"] = [*options["losses"], Breaks(at, backward, MEMORY)]
    return trainer(tmp_path, **{"train": tiny_images(24), **options, **arguments})


FAILURES = {  # the call that runs out of memory, in its forward or backward pass, and the micro-batches of a step
    "second micro-batch": (2, False, 2),
    "backward": (1, True, 2),
    "second backward": (2, True, 3),
    "third step": (6, False, 2),
}


@pytest.mark.parametrize(
    ("case", "failure"),
    [
        ("clip", "second micro-batch"),
        ("clip", "third step"),
        ("views", "backward"),
        ("vit", "second backward"),
    ],
)
def test_a_retry_is_a_training_with_the_smaller_batch(tmp_path, case, failure):
    at, backward, parts = FAILURES[failure]
    retried = run(tmp_path, case, at, backward, gradient_accumulation_steps=parts, auto_find_batch_size=True)
    retried.train()
    size = retried._train_batch_size
    assert 0 < size < 8
    clean = run(tmp_path, case, per_device_train_batch_size=size, gradient_accumulation_steps=parts)
    clean.train()
    for name, value in weights(clean.model).items():
        assert torch.equal(weights(retried.model)[name], value), name
    assert [loss.factor() for loss in retried.losses] == [loss.factor() for loss in clean.losses]
    states = [
        {(own.name, k): v for own in r._stateful() for k, v in own.state_dict().items()} for r in (retried, clean)
    ]
    torch.testing.assert_close(*states, atol=0, rtol=0, equal_nan=True)
    logs = [[e for e in r.state.log_history if "loss" in e] for r in (retried, clean)]
    assert logs[0] == logs[1]


def test_a_retry_keeps_the_optimiser_that_was_given(tmp_path):
    """With its own state, as it was before the training."""

    def given(**options):
        made = run(tmp_path, "clip", **options)
        made.optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], 0.05, momentum=0.9)
        return made

    retried = given(at=3, auto_find_batch_size=True)
    optimizer = retried.optimizer
    retried.train()
    assert retried.optimizer.optimizer is optimizer
    clean = given(per_device_train_batch_size=retried._train_batch_size)
    clean.train()
    for name, value in weights(clean.model).items():
        assert torch.equal(weights(retried.model)[name], value), name


def test_a_resumed_training_begins_again_from_its_checkpoint(tmp_path):
    run(tmp_path, "clip", save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    retried = run(tmp_path / "a", "clip", at=3, auto_find_batch_size=True)
    retried.train(resume_from_checkpoint=checkpoint)
    clean = run(tmp_path / "b", "clip", per_device_train_batch_size=retried._train_batch_size)
    clean.train(resume_from_checkpoint=checkpoint)
    assert retried.state.global_step == clean.state.global_step > 2
    for name, value in weights(clean.model).items():
        assert torch.equal(weights(retried.model)[name], value), name
    assert [loss.factor() for loss in retried.losses] == [loss.factor() for loss in clean.losses]
