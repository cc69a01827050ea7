"""The blocks of docs/howto/share.md that push and load, over HTTP, in the process of a user."""

from __future__ import annotations

import pytest

from ..docs.pages import ROOT, blocks

HUB_BLOCKS = [block.code for block in blocks(ROOT / "docs/howto/share.md", "python") if block.not_run]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_demo_of_user")]


def test_blocks_push_and_load(hub, user):
    push, load = HUB_BLOCKS
    user.run(push)
    assert "Warning" not in user.out
    files = hub.files("user/emoji-prompts")
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "processor_config.json"} <= set(files)
    assert 14_000 < len(files["adapter_model.safetensors"]) < 16_000  # the page says 15 kB
    assert b"license: apache-2.0" in files["README.md"]
    user.fresh(load)  # by someone else
    assert "Warning" not in user.out
    predicted, scores = user.out.strip().splitlines()[-2:]
    assert predicted in ("['crab']", "['rocket']", "['cherries']")
    assert predicted[2:-2] in scores.split("}")[0]  # the pipeline's best is the same
