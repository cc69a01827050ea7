"""A few-shot classifier on disk."""

from __future__ import annotations

import shutil

import pytest

from .few_shot_classifiers import few_shot


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A classifier with residual adapters, once written."""
    folder, classifier = tmp_path_factory.mktemp("saved"), few_shot(residual_adapters=True)
    classifier.save_pretrained(folder)
    return classifier, folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(saved[1], tmp_path / "copy")
