"""Hypothesis profiles: the number of cases, the same ones in every run; choose with `--hypothesis-profile`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

STEADY = {
    "derandomize": True,
    "deadline": None,  # no test is timed
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.differing_executors],
}
CASES = {"fast": 6, "steady": 30, "thorough": 2000}
for name, count in CASES.items():
    settings.register_profile(name, max_examples=count, **STEADY)
settings.load_profile("steady")


def cases(share: float) -> settings:
    """So many times as many cases as the profile asks for, and at least three."""
    return settings(max_examples=max(3, round(share * settings().max_examples)))
