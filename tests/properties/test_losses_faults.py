"""Whatever is wrong with one field of a batch: the losses that read it say so in one line, at once or in a step."""

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

pytestmark = pytest.mark.filterwarnings("ignore")


@st.composite
def spoilt_field(draw, batch: GeometryBatch, field: str, lowest: int) -> Any:
    value = getattr(batch, field)
    if draw(st.integers(0, 9)) == 0:
        return None
    if field == "labels":
        other = next(
            v
            for f in ("logits", "text_features", "class_means", "classifier_weight", "template_features")
            if (v := getattr(batch, f)) is not None
        )
        classes = other.shape[1] if other is batch.logits else len(other)
        return draw(no_labels(len(value), classes, lowest))
    if field == "progress":
        return draw(st.sampled_from([float("nan"), -0.1, 1.5, "half", torch.ones(2)]))
    if field == "class_counts":
        wrong = value.double().clone()
        wrong[draw(st.integers(0, len(value) - 1))] = draw(
            st.sampled_from([0.0, -1.0, float("nan"), float("inf"), 1e39])
        )
        return draw(
            st.sampled_from([wrong, wrong[:0], value[None], torch.cat([value, value[:1]]), value.bool(), "many"])
        )
    if field == "logit_scale":
        return draw(st.sampled_from([torch.tensor(float("nan")), torch.zeros(2), torch.tensor(1j), 2.0, "big"]))
    return draw(spoilt(value, whole_rows_of_nan=field == "class_means"))


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
    if field in ("labels",) and name in ("alignment", "alignment_uncentred"):
        return
    broken = replace(batch, **{field: data.draw(spoilt_field(batch, field, term.lowest_label))})
    if name.startswith("alignment") and field == "classifier_weight" and broken.classifier_weight is None:
        pass  # texts would stand in, and there are none
    loss = term.make()

    def call():
        return loss(broken)

    assert said_well(in_a_step(call) if deferred else call) is None


@given(data=st.data(), name=names, deferred=st.booleans())
def test_sizes_that_do_not_fit_each_other_are_refused(data, name, deferred):
    term = TERMS[name]
    batch = data.draw(batches(term))
    fields = [f for f in term.fields if isinstance(getattr(batch, f), torch.Tensor) and getattr(batch, f).dim()]
    if len(fields) < 2:
        return
    field = data.draw(st.sampled_from(fields))
    value = getattr(batch, field).detach()
    alone = {"labels": 0, "template_features": 1}  # an axis that another field shares: not the templates'
    axis = data.draw(st.sampled_from([a for a in range(value.dim()) if (field, a) != ("template_features", 1)]))
    shared = _lengths_beside(batch, term.fields, field)
    longer = torch.cat([value, value.narrow(axis, 0, 1)], axis)
    if _AXES[field][axis] not in shared or alone.get(field) == -1:
        return
    loss = term.make()
    broken = replace(batch, **{field: longer})
    assert said_well(in_a_step(lambda: loss(broken)) if deferred else lambda: loss(broken)) is None


_AXES = {
    "image_features": "Bd",
    "frozen_image_features": "Bd",
    "text_features": "Kd",
    "frozen_text_features": "Kd",
    "labels": "B",
    "logits": "BK",
    "template_features": "KTd",
    "classifier_weight": "Kd",
    "class_means": "Kd",
    "class_counts": "K",
}


def _lengths_beside(batch: GeometryBatch, fields: tuple[str, ...], field: str) -> set[str]:
    """The axes that fields other than this one have."""
    return {axis for other in fields if other != field for axis in _AXES.get(other, "")}
