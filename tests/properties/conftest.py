"""How many cases hypothesis makes up, the same ones in every run: `--hypothesis-profile=thorough` asks for more."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, settings

STEADY = {
    "derandomize": True,
    "deadline": None,  # no test is timed
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.differing_executors],
}
settings.register_profile("steady", max_examples=50, **STEADY)
settings.register_profile("thorough", max_examples=2000, **STEADY)
settings.load_profile("steady")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    """Notes how many cases were made up and passed, for the table of promises."""
    if call.when == "call" and (found := re.findall(r"(\d+) passing", getattr(item, "hypothesis_statistics", ""))):
        item.user_properties.append(("cases", sum(map(int, found))))
