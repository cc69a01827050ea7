"""`examples/walkthrough.py` as a user with a token runs it, twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "examples" / "walkthrough.py"
SETTINGS = "shots, epochs = 8, 10"


@pytest.fixture
def cells() -> list[str]:
    text = SCRIPT.read_text()
    assert SETTINGS in text
    cells = re.split(r"^# %%.*\n", text.replace(SETTINGS, "shots, epochs = 2, 1"), flags=re.MULTILINE)[1:]
    assert len(cells) > 15
    return cells


def run(user, cells) -> str:
    text = "\n".join(cells)
    return user.run(
        f"""
import contextlib, io
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    exec(compile({text!r}, "walkthrough.py", "exec"), {{"__name__": "__main__"}})
result = printed.getvalue()
"""
    )


def test_it_pushes_what_others_load(hub, user, cells):
    out = run(user, cells)
    assert "Warning" not in user.out
    assert "adapter in user/emoji-prompts" in out
    assert "the loaded adapter predicts the same: True" in out
    assert {"adapter_model.safetensors", "README.md", "geometry.png", "tokenizer.json"} <= set(
        hub.files("user/emoji-prompts")
    )
    assert "model.safetensors" in hub.files("user/mini-clip")
    card = hub.files("user/emoji-prompts")["README.md"].decode()
    assert "base_model: user/mini-clip" in card
    assert all(half in card for half in ("base (30 classes", "new (30 classes", "harmonic mean of base and new"))
    assert (user.work / "outputs/walkthrough/exported/model.safetensors").exists()

    # and once more, with more images a class than the first time: the drawings of the first run have them
    more = [cell.replace("shots, epochs = 2, 1", "shots, epochs = 3, 1") for cell in cells]
    drawn = sorted((user.work / "outputs/walkthrough/images").rglob("*.png"))
    first = (user.work / "outputs/walkthrough/exported/model.safetensors").read_bytes()
    assert "90 images of 30 classes" in run(user, more)
    assert sorted((user.work / "outputs/walkthrough/images").rglob("*.png")) == drawn
    assert (user.work / "outputs/walkthrough/exported/model.safetensors").read_bytes() != first
