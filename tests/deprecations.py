"""Deprecated calls fail: also those that a library only logs, and those of the processes that tests start.

pyproject.toml's `filterwarnings` say which warnings are errors, and which one is a library's own affair.
"""

from __future__ import annotations

import logging
import os
import warnings

import pytest

LIBRARIES = ("accelerate", "datasets", "evaluate", "huggingface_hub", "peft", "torch", "transformers")


class Deprecations(logging.Handler):
    """Makes a warning of each log line about something deprecated."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in (text := record.getMessage()):
            warnings.warn(f"{record.name}: {text}", DeprecationWarning, stacklevel=2)


@pytest.fixture(scope="session", autouse=True)
def deprecations_in_logs_and_processes(pytestconfig):
    handler = Deprecations(logging.WARNING)
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    # not in xdist's controller, which starts Python with it before pytest has read a filter
    os.environ["PYTHONWARNINGS"] = ",".join(pytestconfig.getini("filterwarnings"))
    yield
    for name in LIBRARIES:
        logging.getLogger(name).removeHandler(handler)


@pytest.fixture(autouse=True)
def deprecations_among_user_warnings():
    """A test that ignores PEFT's user warnings does not mean these."""
    warnings.filterwarnings("error", message=r"(?s).*\bdeprecated\b", category=UserWarning)
