"""Methods and backbones for the contracts, and the count of PEFT's own tests at the end of a run."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from ..cases import TUNERS, Tuner
from .copa_backbones import BACKBONES, Backbone
from .fetch_peft_suite import VERSION
from .peft_suite_cases import CASES

# One of each kind of prompts, prototypes and heads, on the kinds of towers; the others are slow.
FAST = {
    *("clip-ivlp", "clip-maple", "clip_text", "clip_vision", "siglip-vpt", "vit_classifier-vpt", "dinov2"),
    *("vit_classifier-prototypes-prompts", "resnet_classifier-prototypes-trained"),
    *("clip-copa", "vit_classifier-copa-adapters", "resnet-copa"),
    *("clip-adaptformer", "vit_classifier-adaptformer"),
}


@pytest.fixture(params=BACKBONES, scope="module")
def backbone(request) -> Backbone:
    return BACKBONES[request.param]


@pytest.fixture(
    params=[pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in TUNERS], scope="module"
)
def case(request) -> Tuner:
    return TUNERS[request.param]


@pytest.fixture(params=sorted(FAST), scope="module")
def one_of_a_kind(request) -> Tuner:
    return TUNERS[request.param]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """A line for each of our methods; with `-v` the reasons of what does not apply, too."""
    outcomes = {"passed": "passed", "xfailed": "not applicable", "failed": "failed"}
    counts: Counter[tuple[str, str]] = Counter()
    reasons: Counter[str] = Counter()
    methods = "|".join({case.name.partition("-")[0] for case in CASES})
    for outcome, told in outcomes.items():
        for report in terminalreporter.stats.get(outcome, []):
            method = re.search(rf"test_peft_suite\.py::.*\[(?:.*-)?({methods})-", report.nodeid)
            if method:
                counts[method[1], told] += 1
                reasons[getattr(report, "wasxfail", "")] += 1
    if not counts:
        return
    terminalreporter.section(f"PEFT {VERSION}'s own tests")
    for method in sorted({method for method, _ in counts}):
        told = ", ".join(f"{counts[method, told]} {told}" for told in outcomes.values() if counts[method, told])
        terminalreporter.line(f"NCGEO_{method}: {told}")
    if config.get_verbosity() >= 0:
        for reason, count in reasons.most_common():
            if reason:
                terminalreporter.line(f"{count:5} not applicable: {reason}")
