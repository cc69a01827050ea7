"""One wrong field of a batch: the losses that read it say so in one line, at once or in a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_ncgeo.geometry.checks import DeferredChecks
from peft_ncgeo.losses import GeometryBatch

from .outcomes import said_well
from .tensors import no_labels, spoilt
from .terms import TERMS, batches, names

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

AXES = {
    "image_features": "Bd",
    "frozen_image_features": "Bd",
    "text_features": "Kd",
    "frozen_text_features": "Kd",
    "labels": "B",
    "logits": "BK",
    "multi_hot": "BK",
    "template_features": "KTd",
    "classifier_weight": "Kd",
    "class_means": "Kd",
    "class_counts": "K",
}


@st.composite
def spoilt_field(draw, batch: GeometryBatch, field: str, lowest: int) -> Any:
    value = getattr(batch, field)
    if draw(st.integers(0, 9)) == 0:
        return None
    if field == "labels":
        sizes = [getattr(batch, f).shape[axes.index("K")] for f, axes in AXES.items() if _has(batch, f, "K")]
        return draw(no_labels(len(value), sizes[0] if sizes else None, lowest))
    if field == "progress":
        return draw(st.sampled_from([float("nan"), -0.1, 1.5, "half", torch.ones(2)]))
    if field == "class_counts":
        wrong = value.double().clone()
        bad = st.sampled_from([0.0, -1.0, float("nan"), float("inf")])
        wrong[draw(st.integers(0, len(value) - 1))] = draw(bad)
        shapes = [wrong[:0], value[None], torch.cat([value, value[:1]])]
        return draw(st.sampled_from([wrong, wrong, *shapes, value.bool(), "many"]))
    if field == "logit_scale":
        return draw(st.sampled_from([torch.tensor(float("nan")), torch.zeros(2), torch.tensor(1j), 2.0, "big"]))
    return draw(spoilt(value, whole_rows_of_nan=field == "class_means"))


def _has(batch: GeometryBatch, field: str, axis: str) -> bool:
    return getattr(batch, field) is not None and axis in AXES[field]


def in_a_step(call):
    """As the trainer calls a loss."""

    def step():
        with DeferredChecks() as checks:
            value = call()
        checks.read()
        return value

    return step


@pytest.mark.parametrize("name", TERMS)
@given(data=st.data(), deferred=st.booleans())
def test_a_field_that_is_wrong_is_refused(name, data, deferred):
    term = TERMS[name]
    batch = data.draw(batches(term))
    field = data.draw(st.sampled_from(term.fields))
    broken = replace(batch, **{field: data.draw(spoilt_field(batch, field, term.lowest_label))})
    loss = term.make()
    assert said_well(in_a_step(lambda: loss(broken)) if deferred else lambda: loss(broken)) is None


@given(data=st.data(), name=names, deferred=st.booleans())
def test_sizes_that_do_not_fit_each_other_are_refused(data, name, deferred):
    term = TERMS[name]
    batch, loss = data.draw(batches(term)), term.make()
    shared = [
        (field, axis)
        for field in AXES
        for axis in range(len(AXES[field]))
        if field in term.fields and any(_has(batch, other, AXES[field][axis]) for other in AXES if other != field)
    ]
    if not shared:
        return
    field, axis = data.draw(st.sampled_from(shared))
    value = getattr(batch, field).detach()
    broken = replace(batch, **{field: torch.cat([value, value.narrow(axis, 0, 1)], axis)})
    assert said_well(in_a_step(lambda: loss(broken)) if deferred else lambda: loss(broken)) is None
