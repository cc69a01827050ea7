"""Gradient accumulation: a step of uneven micro-batches is the step of one batch, as in Transformers' own Trainer."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import TrainerCallback

from peft_ncgeo.losses import LanguageCollapse, PointwisePreservation, RotationStabilization
from peft_ncgeo.training import GradientProjection

from ...conftest import tiny_images
from ..runs import Gradients, Pointwise, lora_vit, prompted_clip, trainer, transformers_trainer, weights

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]

CUTS = {"10": (10, 1), "3+3+3+1": (3, 4), "9+1": (9, 2)}


def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)]).double()


def is_near(got: list[dict[str, torch.Tensor]], expected: list[dict[str, torch.Tensor]], share: float = 2e-6) -> None:
    """Gradients of the same steps, their difference below a share of their length."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        assert (flat(one) - flat(other)).norm() < share * flat(other).norm()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("count", [10, 14])
def test_steps_are_those_of_transformers(tmp_path, cut, count):
    """10 images are one step; 14 leave fewer micro-batches for the epoch's last step."""
    size, parts = CUTS[cut]
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "num_train_epochs": 2}
    results = []
    for make in (
        lambda **o: trainer(tmp_path, lora_vit(), train=tiny_images(count), **o),
        lambda **o: transformers_trainer(tmp_path, lora_vit(), tiny_images(count), **o),
    ):
        gradients = Gradients()
        run = make(callbacks=[gradients], learning_rate=0.0, **options)
        run.train()
        results.append((gradients.steps, [e["loss"] for e in run.state.log_history if "loss" in e], run))
    is_near(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
    assert [e["loss/ce"] for e in results[0][2].state.log_history if "loss" in e] == pytest.approx(results[1][1])


CASES = {  # each a mean over images, or a term on texts alone
    "classification": dict,
    "terms": lambda: {
        "losses": [
            Pointwise(budget=0.1),
            PointwisePreservation(weight=0.5, kl_reduction="mean", name="consistency"),
            RotationStabilization(weight=0.3),
            LanguageCollapse(budget=0.2),
        ]
    },
    "texts alone": lambda: {"losses": [RotationStabilization(weight=1.0)], "classify": False},
    "budget": lambda: {"losses": [Pointwise(budget=0.05)], "classify": False},
    "projected": lambda: {"callbacks": [GradientProjection()]},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("cut", ["3+3+3+1", "9+1"])
def test_terms_have_the_gradient_of_one_batch(tmp_path, case, cut):
    """So have what is logged of them, and their multipliers, which here decide the second step."""
    results = []
    for size, parts in (CUTS["10"], CUTS[cut]):
        options, gradients = CASES[case](), Gradients()
        options["callbacks"] = [*options.get("callbacks", []), gradients]
        run = trainer(
            tmp_path,
            prompted_clip(),
            train=tiny_images(10),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            **options,
        )
        run.train()
        log = [{k: v for k, v in e.items() if k != "grad_norm"} for e in run.state.log_history if "loss" in e]
        results.append((gradients.steps, log, [loss.factor() for loss in run.losses]))
    (one, logs, factors), (got, got_logs, got_factors) = results
    is_near(got, one, share=2e-5)  # float32 cosines at a logit scale, and the second step starts from another float
    assert len(logs) == 2
    for expected, entry in zip(logs, got_logs, strict=True):
        assert entry == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert got_factors == pytest.approx(factors, rel=1e-4)


def test_a_log_is_the_mean_of_its_steps(tmp_path):
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "train": tiny_images(10)}
    logs = []
    for every in (1, 2):
        run = trainer(tmp_path, losses=[Pointwise(budget=0.1)], logging_steps=every, **options)
        run.train()
        logs.append([e for e in run.state.log_history if "loss" in e])
    each, both = logs
    assert len(each) == 2 * len(both) == 4
    for i, entry in enumerate(both):
        for key in ("loss", "loss/ce", "loss/pointwise", "lambda/pointwise"):
            assert entry[key] == pytest.approx((each[2 * i][key] + each[2 * i + 1][key]) / 2, rel=1e-5)


def test_nothing_grows_where_nothing_is_logged(tmp_path):
    class Count(TrainerCallback):
        def __init__(self):
            self.tensors = []

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (4, 16):
                gc.collect()
                self.tensors.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

    count = Count()
    run = trainer(
        tmp_path, losses=[Pointwise(budget=0.1)], callbacks=[count], logging_strategy="no", num_train_epochs=4
    )
    run.train()
    assert run.state.global_step == 16
    assert count.tensors[1] <= count.tensors[0]


class Breaks(Pointwise):
    """Fails once, in a given call or in the backward pass of it."""

    default_name = "breaks"

    def __init__(self, at: int, backward: bool = False, error: str = "Interrupted") -> None:
        super().__init__(weight=0.3)
        self.left, self.backward, self.error = at, backward, error

    def forward(self, batch):
        value = super().forward(batch)
        self.left -= 1
        if self.left == 0 and self.backward:
            batch.logits.register_hook(self._fail)
        elif self.left == 0:
            self._fail()
        return value

    def _fail(self, *_):
        raise torch.OutOfMemoryError(self.error)


@pytest.mark.parametrize("build", [prompted_clip, lora_vit])
@pytest.mark.parametrize(("at", "backward"), [(2, False), (2, True)])
def test_a_training_after_one_that_broke_off_is_a_fresh_one(tmp_path, build, at, backward):
    """It broke off in the first step, so weights are as they were; sums of that step must not count."""

    def run(at):
        losses = [Breaks(at, backward), Pointwise(budget=0.1)]
        return trainer(
            tmp_path,
            build(),
            losses,
            callbacks=[GradientProjection()],
            per_device_train_batch_size=3,
            gradient_accumulation_steps=3,
        )

    broken, fresh = run(at), run(0)
    with pytest.raises(torch.OutOfMemoryError, match="Interrupted"):
        broken.train()
    broken.train()
    fresh.train()
    for name, value in weights(fresh.model).items():
        assert torch.equal(weights(broken.model)[name], value), name
    assert broken.losses[1].factor() == fresh.losses[1].factor()
    torch.testing.assert_close(broken.class_means.means, fresh.class_means.means, atol=0, rtol=0, equal_nan=True)
