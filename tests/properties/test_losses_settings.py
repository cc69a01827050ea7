"""Losses made with any settings: refused in one line, or right for as long as they train."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_ncgeo import losses
from peft_ncgeo.losses import GeometryBatch, Regularizer

from ..losses.batches import random_batch
from ..profiles import cases
from . import loss_oracles as oracles
from .outcomes import said_well
from .tensors import NO_NUMBERS
from .terms import in_float64

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

OTHERS = ("CrossEntropy", "GeometryBatch", "Regularizer")
CLASSES = [getattr(losses, name) for name in losses.__all__ if name not in OTHERS]
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 3, 0.5, 1e-30, 1e-6, 1e6, 1e30, 1e300, -1e30, math.nan, math.inf, True]),
    st.sampled_from(NO_NUMBERS),
    st.floats(),
)
WORDS = st.sampled_from(["mean", "sum", "exact", "entropic", "image", "joint", "sinkhorn", "", "x.y", None, 3])
NEEDED = {losses.PrototypeSupCon: {"copies": 1.0, "temperature": 0.5}}
TEXTUAL = ("name", "method", "reduction", "kl_reduction", "modality", "solver")


def settings_of(cls: type) -> list[str]:
    return [
        p for p in inspect.signature(cls).parameters if p not in ("prototypes", "detach_means", "center", "anchor")
    ]


@st.composite
def made(draw, cls: type) -> dict:
    """Settings of which one or two are out of the ordinary."""
    chosen = dict(NEEDED.get(cls, {}))
    if issubclass(cls, Regularizer):
        chosen["weight"] = 1.0
    names = settings_of(cls)
    for name in draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []:
        chosen[name] = draw(WORDS if name in TEXTUAL else NUMBERS)
        if name == "budget":
            chosen["weight"] = None
    return chosen


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_settings_are_refused_or_lead_to_finite_values(cls, data):
    chosen = data.draw(made(cls))
    loss = said_well(lambda: cls(**chosen))
    if loss is None:
        return
    batch = random_batch(dtype=torch.float32)
    value = said_well(lambda: loss(batch))
    if value is None:
        return
    assert value.isfinite(), chosen
    if isinstance(loss, Regularizer):
        for _ in range(3):
            said_well(lambda: loss.update(loss.constrained(value)))
            factor = said_well(loss.factor)
            assert factor is not None, chosen
            assert math.isfinite(factor), chosen
            if loss.budget is not None:
                assert factor >= 0


@given(
    budget=st.floats(1e-38, 1e38),
    values=st.lists(st.floats(0, 1e30), min_size=1, max_size=5),
    step_size=st.sampled_from([0.0, 0.3, 1e3, 1e30]),
    max_step=st.sampled_from([None, 1e-6, 1.0, math.inf]),
)
def test_a_multiplier_is_that_of_dual_ascent_or_stays(budget, values, step_size, max_step):
    loss = losses.RotationStabilization(budget=budget, step_size=step_size, max_step=max_step)
    expected = 1.0
    for value in values:
        raised = max(0.0, expected + step_size * min(value / budget - 1, math.inf if max_step is None else max_step))
        held = raised < torch.finfo(torch.float32).max
        assert (said_well(lambda value=value: loss.update(value) or True) is not None) == held
        expected = raised if held else expected
        assert loss.factor() == pytest.approx(expected, rel=1e-5, abs=1e-5 * (1 + step_size))
        expected = loss.factor()


@given(value=st.sampled_from([math.nan, math.inf, -math.inf, "3", None, torch.ones(2), torch.tensor(math.nan)]))
def test_no_number_moves_a_multiplier(value):
    loss = losses.RotationStabilization(budget=0.1)
    assert said_well(lambda: loss.update(value) or True) is None
    assert loss.factor() == 1.0


@given(returned=st.one_of(st.floats(), st.sampled_from(NO_NUMBERS)), progress=st.floats(0, 1))
def test_a_weight_over_time_is_a_finite_number_or_refused(returned, progress):
    loss = losses.RotationStabilization(weight=lambda _: returned)
    factor = said_well(lambda: loss.factor(progress))
    good = isinstance(returned, float) and math.isfinite(returned)
    assert factor == (returned if good else None)


@given(
    tau=st.floats(-1e6, 1e6), margin=st.floats(0, 1e6), scale=st.floats(0, 1e6), beta=st.floats(0, 1, exclude_max=True)
)
def test_margins_of_any_strength_are_the_formulas(tau, margin, scale, beta):
    batch = random_batch()
    wide = in_float64(batch)
    adjusted, ldam = losses.LogitAdjustment(tau)(batch), losses.LDAM(margin, scale, 0.5, beta)(batch)
    assert float(adjusted) == pytest.approx(oracles.logit_adjustment(wide, tau), rel=1e-9, abs=1e-9)
    assert float(ldam) == pytest.approx(oracles.ldam(wide, margin, scale, beta), rel=1e-9, abs=1e-9)


@given(copies=st.sampled_from([0, 1e-6, 0.5, 3, 1e6, 1e30]), temperature=st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 1e6]))
def test_contrast_at_any_temperature_is_the_formulas(copies, temperature):
    batch = random_batch()
    wide = in_float64(batch)
    one = losses.PrototypeSupCon(copies=copies, temperature=temperature)(batch)
    assert float(one) == pytest.approx(oracles.supcon(wide, copies, temperature), rel=1e-9, abs=1e-9)
    other = losses.PrototypeImageContrast(temperature)(batch)
    assert float(other) == pytest.approx(oracles.prototype_image(wide, temperature), rel=1e-9, abs=1e-9)


@cases(0.2)
@given(epsilon=st.sampled_from([1e-8, 0.01, 0.1, 1.0, 1e6]), seed=st.integers(0, 1))
def test_transport_at_any_epsilon_is_the_formulas_or_refused(epsilon, seed):
    batch = random_batch(seed=seed)
    wide = in_float64(batch)
    one = said_well(lambda: losses.OTPreservation(weight=1.0, solver="entropic", epsilon=epsilon)(batch))
    assert one is not None or epsilon < 0.1
    if one is not None:
        assert float(one) == pytest.approx(oracles.transport(wide, "joint", epsilon), rel=0.01)
    other = said_well(lambda: losses.ModalityIsomorphism(weight=1.0, method="sinkhorn", epsilon=epsilon)(batch))
    assert other is not None or epsilon < 0.1
    if other is not None:
        assert float(other) == pytest.approx(oracles.isomorphism_sinkhorn(wide, epsilon), rel=0.01)


@cases(0.1)
@pytest.mark.parametrize("cls", [losses.CrossEntropy, losses.BalancedSoftmax, losses.LDAM])
@given(seed=st.integers(0, 99))
def test_a_hundred_thousand_classes_are_the_formulas(cls, seed):
    k, generator = 100_000, torch.Generator().manual_seed(seed)
    batch = GeometryBatch(
        logits=torch.randn(2, k, generator=generator),
        labels=torch.randint(k, (2,), generator=generator),
        class_counts=torch.randint(1, 10**6, (k,), generator=generator),
    )
    wide = in_float64(batch)
    expected = {
        "ce": lambda: oracles.cross_entropy(wide["logits"], wide["labels"]),
        "balanced_softmax": lambda: oracles.logit_adjustment(wide, 1.0),
        "ldam": lambda: oracles.ldam(wide, 0.5, 1.0),
    }
    loss = cls()
    assert float(loss(batch)) == pytest.approx(expected[loss.name](), rel=1e-5)


def test_the_oracles_memory_is_left_to_other_tests():
    """A memory over several batches is tested with its paper; here: that any size of it is one."""
    for size in (0, 1, 10**9):
        loss = losses.OTPreservation(weight=1.0, memory_size=size)
        loss(random_batch()), loss(random_batch(seed=1))
        assert loss.memory.shape[1] == min(size, 14)
