"""What the tests make of a deprecated call."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[1]
FILES = sorted(path for part in ("examples", "peft_ncgeo", "tests") for path in (ROOT / part).rglob("*.py"))
LIBRARY = "`is_gradient_checkpointing` is deprecated and will be removed"


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_a_deprecated_call_fails(category):
    with pytest.raises(category, match="old name"):
        warnings.warn("old name", category, stacklevel=1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_so_does_one_that_is_a_user_warning():
    warnings.warn("the adapter is replaced", UserWarning, stacklevel=1)
    with pytest.raises(UserWarning, match="old name is deprecated"):
        warnings.warn("Well:\nold name is deprecated", UserWarning, stacklevel=1)


def test_so_does_one_that_is_only_logged():
    logger = transformers.logging.get_logger("transformers.configuration_utils")
    with pytest.raises(DeprecationWarning, match="configuration_utils: `torch_dtype` is deprecated! Use `dtype`"):
        logger.error("`torch_dtype` is deprecated! Use `dtype` instead!")
    logger.error("a log line about something else")


@pytest.mark.parametrize(("warning", "code"), [("FutureWarning('old name')", 1), (f"FutureWarning({LIBRARY!r})", 0)])
def test_so_does_one_in_a_process_of_its_own(warning, code):
    program = f"import warnings; warnings.simplefilter('ignore', UserWarning); warnings.warn({warning})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Invalid -W option" not in done.stderr


def test_what_peft_calls_in_transformers_does_not():
    warnings.warn(LIBRARY, FutureWarning, stacklevel=1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_ignores_every_warning(path):
    assert not re.findall(r'(?:filterwarnings|simplefilter)\("ignore"\)', path.read_text())
