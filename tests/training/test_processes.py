"""Two and three processes give what one gives: for every loss, every callback and every kind of model."""

from __future__ import annotations

import re

import pytest
import torch

from peft_ncgeo import losses, training

from ..launching import launch
from .processes import ALONE, STEPS, gather_uneven, images, run_all, runs_of
from .runs import Gradients, lora_vit, transformers_trainer

pytestmark = pytest.mark.slow

SEVERAL = (2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the results of each process of launches with 1, 2 and 3 processes, by run."""
    found = {}
    for n in (1, *SEVERAL):
        folder = tmp_path_factory.mktemp(f"processes{n}")
        assert launch(run_all, str(folder), n, processes=n) == [0] * n
        found[n] = {
            name: [torch.load(folder / name / f"result_{rank}.pt") for rank in range(n)] for name in runs_of(n)
        }
    return found


def is_near(got, expected, what, share=1e-4):
    """Within a share of the largest entry of each tensor; gives the largest such share there is."""
    assert got.keys() == expected.keys()
    shares = [0.0]
    for name, value in expected.items():
        if value.numel():
            largest = max(0.02, float(value.nan_to_num().abs().amax()))
            torch.testing.assert_close(
                got[name],
                value,
                atol=share * largest,
                rtol=0,
                equal_nan=True,
                msg=lambda m, n=name: f"{what}, {n}: {m}",
            )
            shares.append(float((got[name] - value).nan_to_num().abs().amax()) / largest)
    return max(shares)


@pytest.mark.parametrize(("name", "processes"), [(name, n) for n in SEVERAL for name in runs_of(n)])
def test_several_processes_equal_one(results, name, processes, record_property):
    one, several = results[1][name][0], results[processes][name][0]
    assert len(one["gradients"]) == STEPS.get(name, 3 if name in ALONE else 6)
    for step, (expected, got) in enumerate(zip(one["gradients"], several["gradients"], strict=True)):
        # a tower that no term looks at has no gradient on one process, and one of zero on several
        assert expected.keys() <= got.keys()
        expected = {key: expected.get(key, torch.zeros_like(value)) for key, value in got.items()}
        # on some processors rounding of 3e-6 grows two to five times with each step
        share = 1e-4 if step < 3 else 5e-4
        record_property("difference", is_near(got, expected, f"gradients of step {step}", share))
    is_near(several["weights"], one["weights"], "weights")
    is_near(several["state"], one["state"], "state")
    assert several["factors"] == pytest.approx(one["factors"], rel=1e-4)
    for expected, got in zip(one["log"], several["log"], strict=True):
        assert got.keys() == expected.keys()
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-7)
    if "metrics" in one:
        assert several["metrics"].keys() == one["metrics"].keys()
        assert several["metrics"] == pytest.approx(one["metrics"], rel=1e-3)
    if "sets" in one:
        for moment in ("before", "after"):  # what a card tells
            expected = one["sets"]["test"][moment]
            assert several["sets"]["test"][moment] == pytest.approx(expected, rel=5e-3, abs=1e-6)
    if "report" in one:
        expected, got = one["report"], several["report"]
        for part in ("baselines", "per_class"):
            for row, numbers in expected[part].items():
                assert got[part][row] == pytest.approx(numbers), row
        for number in ("error", "error_after", "temperature"):
            assert got["calibration"][number] == pytest.approx(expected["calibration"][number], rel=1e-2), number


@pytest.mark.parametrize("processes", [1, 3])  # which train each loss alone
def test_accumulated_micro_batches_are_one_batch(results, processes, tmp_path):
    """27 images as 12 + 12 + 3, of which the last process has none, give the gradient of Transformers' Trainer."""
    whole = Gradients()
    options = {"per_device_train_batch_size": 27, "max_steps": 1, "callbacks": [whole]}
    torch.manual_seed(0)
    transformers_trainer(tmp_path, lora_vit(), images(27), **options).train()
    (got,) = results[processes]["CrossEntropy, accumulated"][0]["gradients"]
    is_near(got, whole.steps[0], "gradients")


@pytest.mark.parametrize(("name", "processes"), [(name, n) for n in SEVERAL for name in runs_of(n)])
def test_all_processes_hold_the_same(results, name, processes):
    """Memories, means, clusters, averages, multipliers and weights, to the last bit."""
    first, *others = results[processes][name]
    for other in others:
        for part in ("weights", "state", "gradients"):
            torch.testing.assert_close(other[part], first[part], atol=0, rtol=0, equal_nan=True)
        assert other["factors"] == first["factors"]


def test_every_loss_and_callback_is_among_the_runs():
    tested = {re.match(r"\w+", name)[0] for name in ALONE}
    callbacks = {"GeometryMonitor", "GradientProjection", "PromptAveraging", "SlerpAlignment"}
    assert callbacks <= set(training.__all__)
    assert tested >= set(losses.__all__) - {"GeometryBatch", "Regularizer"} | callbacks


def test_gathering_uneven_batches(tmp_path):
    assert launch(gather_uneven, str(tmp_path), processes=2) == [0, 0]
    rows = torch.arange(10, dtype=torch.float64).reshape(5, 2).requires_grad_()
    (rows @ rows.T).pow(2).sum().backward()
    gradients = []
    for rank in range(2):
        sizes, together, gradient = torch.load(tmp_path / f"{rank}.pt")
        assert sizes == [3, 2]
        assert torch.equal(together, rows)
        gradients += gradient.tolist()
    assert gradients == [*rows.grad.tolist(), [0, 0]]
