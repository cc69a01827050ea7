"""README's Python blocks run, two steps a training; those that need the Hub in `hub/test_readme_blocks.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .training.runs import trainer

README = (Path(__file__).parents[1] / "README.md").read_text()
ALL_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
HUB_BLOCKS = [block for block in ALL_BLOCKS if '"user/' in block]
BLOCKS = [block for block in ALL_BLOCKS if block not in HUB_BLOCKS]
STEPS = re.compile(r"(max_steps(?:\"?: |=))\d+|num_train_epochs=\d+")


def shorter(block: str) -> str:
    """The block with two steps a training."""
    return STEPS.sub(lambda found: f"{found[1] or 'max_steps='}2", block)


PROGRAM = """
import sys
for block in open(sys.argv[1]).read().split("\\0"):
    exec(compile(block, "README.md", "exec"), {})
"""


@pytest.mark.slow
def test_python_blocks_run_and_warn_of_nothing(tmp_path):
    """In a process of their own, whose warnings are those that a user sees."""
    assert BLOCKS
    (tmp_path / "blocks").write_text("\0".join(map(shorter, BLOCKS)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    command = [sys.executable, "-c", PROGRAM, "blocks"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torch.Size([2, 128])" in done.stdout
    assert "torch.Size([2, 5])" in done.stdout
    assert (tmp_path / "outputs" / "readme" / "adapter_model.safetensors").exists()
    assert not [line for line in done.stderr.splitlines() if "warning" in line.lower()]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_readers_own_loss_trains_beside_the_packages(tmp_path):
    (block,) = [block for block in BLOCKS if "KeepSimilarities" in block]
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    run = trainer(tmp_path / "own", losses=names["losses"], max_steps=2)
    run.train()
    assert {"loss/ot", "loss/similarities", "lambda/similarities"} <= run.state.log_history[-2].keys()


def test_nothing_is_left_to_fill_in():
    for mark, table in re.findall(r"<!-- ([\w ]+) table -->(.*?)<!-- end of", README, flags=re.DOTALL):
        assert table.count("\n|") > 2, f"{mark} has no rows"
    assert not re.findall(r"\b(TODO|CHOICES|SPEED|ANSWER|[A-Z]+-(TEXT|TABLE))\b", README)


def test_files_and_targets_named_in_readme_exist():
    root = Path(__file__).parents[1]
    for path in set(re.findall(r"(?:examples|peft_ncgeo)/[\w/.]+", README)):
        assert (root / path.rstrip(".")).exists(), path
    makefile = (root / "Makefile").read_text()
    for target in set(re.findall(r"make ([\w-]+)", README)):
        assert f"\n{target}:" in makefile, target
