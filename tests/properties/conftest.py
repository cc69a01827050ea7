"""How many cases hypothesis makes up, the same ones in every run: `--hypothesis-profile=thorough` asks for more."""

from __future__ import annotations

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
