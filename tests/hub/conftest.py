"""A Hub on this machine, and a user of it in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .loopback import LoopbackHub
from .tuned import KINDS
from .user import User


@pytest.fixture(scope="session")
def loopback() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def hub(loopback) -> Iterator[LoopbackHub]:
    """Without faults, with an empty request log; repositories of earlier tests stay, so take a name of your own."""
    loopback.reset()
    yield loopback
    loopback.reset()


@pytest.fixture(scope="session")
def user(loopback) -> Iterator[User]:
    """Logged in as "user"; slow imports are paid once for all tests."""
    with User(loopback.url, loopback.token) as user:
        yield user


TUNED = f"""
import sys, warnings
sys.path.append({str(Path(__file__).parents[2])!r})
warnings.simplefilter("ignore", UserWarning)
from transformers import CLIPModel, pipeline
import peft_ncgeo
from peft_ncgeo import FewShotClassifier, ZeroShotClassifier
from peft_ncgeo.hub import hypothesis_template, load_adapter, push_adapter
from tests.hub import tuned
"""


@pytest.fixture
def small_demo_of_user(user) -> Iterator[None]:
    """Few test images in the built-in data of the user's process."""
    user.run(f"""
import contextlib, sys
sys.path.append({str(Path(__file__).parents[2])!r})
from tests.small_demo import few_test_images
small = contextlib.ExitStack()
small.enter_context(few_test_images())
""")
    yield
    user.run("small.close()")


@pytest.fixture(scope="session")
def author(user) -> User:
    """The user with `tests.hub.tuned`, whose base models are on the Hub."""
    user.run(f"{TUNED}\ntuned.push_bases()")
    return user


@pytest.fixture(scope="session")
def reader(loopback) -> Iterator[User]:
    """Somebody else, not logged in, with a process and a cache that have seen nothing of the author's."""
    with User(loopback.url) as reader:
        reader.run(TUNED)
        yield reader


@pytest.fixture(scope="session")
def pushed(loopback, author) -> dict[tuple[str, bool], tuple[str, dict]]:
    """Kind of adapter and whether by LFS -> its repository, and what the model said in the author's process."""
    said = {}
    for lfs in (False, True):
        for kind in KINDS:
            loopback.reset(lfs)
            repo_id = f"user/{kind}{'-lfs' * lfs}"
            said[kind, lfs] = repo_id, author.run(f"result = tuned.answers(tuned.push({kind!r}, {repo_id!r}))")
    loopback.reset()
    return said
