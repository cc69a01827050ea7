"""A note of how many cases hypothesis made up."""

from __future__ import annotations

import re

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    """Notes how many cases were made up and passed, for the table of promises."""
    if call.when == "call" and (found := re.findall(r"(\d+) passing", getattr(item, "hypothesis_statistics", ""))):
        item.user_properties.append(("cases", sum(map(int, found))))
