"""The survey of models, on one model of each family; `make models` tries everything on all of them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from peft_ncgeo.models.families import FAMILIES

from .survey.outcomes import outcome
from .survey.specs import Spec
from .survey.table import PAGE, page, read_results, short
from .survey.tries import TRIES, specs

# the first of each; BlipModel is deprecated
MODELS = [spec for spec in specs() if spec.family in FAMILIES and spec.name != "BlipModel"]
BY_FAMILY = {spec.family: spec for spec in reversed(MODELS)}
WITHOUT_TRAINING = ("a_vision", "a_text", "b_prototype", "b_copa", "b_adaptformer", "d_zero_lora", "d_zero_prompts")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", sorted(BY_FAMILY))
def test_a_model_does_what_the_page_says(family):
    check(BY_FAMILY[family], WITHOUT_TRAINING)


def check(spec: Spec, names: Iterable[str]) -> None:
    """Try these things on a model, and compare how they end with the page."""
    written = read_results()[spec.name]["tries"]
    for name in names:
        run, kinds = TRIES[name]
        if spec.kind in kinds:
            status, message = outcome(lambda run=run: run(spec))
            assert status in ("works", "refused", "n/a"), f"{spec.name}, {name}: {status} {message}"
            assert short(status, message) == written[name], f"{spec.name}, {name}: run `make models` again"


def test_most_families_have_a_model():
    assert len(BY_FAMILY) > 25


def test_every_try_of_every_model_is_on_the_page():
    """timm's models too, which are tried where timm is installed."""
    results = read_results()
    for spec in specs():
        assert results[spec.name]["tries"].keys() == {name for name, (_, kinds) in TRIES.items() if spec.kind in kinds}
    assert page(results) == PAGE.read_text()
    ends = [end for row in results.values() for end in row["tries"].values()]
    assert not {"WRONG", "CRASH"} & set(ends)
