"""The survey of models, on one model of each family; `make models` tries everything on all of them."""

from __future__ import annotations

import pytest

from peft_ncgeo.models.families import FAMILIES

from .survey.outcomes import outcome
from .survey.tries import TRIES, specs

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.slow]
# the first of each; BlipModel is deprecated
MODELS = [spec for spec in specs() if spec.family in FAMILIES and spec.name != "BlipModel"]
BY_FAMILY = {spec.family: spec for spec in reversed(MODELS)}
WITHOUT_TRAINING = ("a_vision", "a_text", "b_prototype", "b_copa", "d_zero_lora", "d_zero_prompts")


@pytest.mark.parametrize("family", sorted(BY_FAMILY))
def test_what_is_taken_is_right_and_what_is_not_is_refused(family):
    spec = BY_FAMILY[family]
    for name in WITHOUT_TRAINING:
        run, kinds = TRIES[name]
        if spec.kind in kinds:
            status, message = outcome(lambda run=run: run(spec))
            assert status in ("works", "refused", "n/a"), f"{spec.name}, {name}: {status} {message}"


def test_most_families_have_a_model():
    assert len(BY_FAMILY) > 25
