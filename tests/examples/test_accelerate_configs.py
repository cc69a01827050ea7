"""The shipped configurations of Accelerate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"
SCRIPT = """
from peft_ncgeo import GeometryTrainingArguments
args = GeometryTrainingArguments(output_dir="unused")
print(f"process {args.process_index} of {args.world_size} on {args.device.type}")
"""


def launch(tmp_path: Path, *options: str) -> subprocess.CompletedProcess:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=900)


@pytest.mark.parametrize(
    ("name", "processes", "use_cpu"),
    [("cpu_1proc", 1, True), ("cpu_2proc", 2, True), ("gpu_1proc", 1, False), ("gpu_multi", 2, False)],
)
def test_fields(name, processes, use_cpu):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.num_processes, config.use_cpu, config.mixed_precision) == (processes, use_cpu, "no")
    assert config.distributed_type == ("MULTI_GPU" if processes > 1 else "NO")
    assert getattr(config, "gpu_ids", None) == {"gpu_1proc": "0", "gpu_multi": "all"}.get(name)
    assert len(list(FOLDER.glob("*.yaml"))) == 4


def test_two_processes_are_started(tmp_path):
    result = launch(tmp_path, "--config_file", str(FOLDER / "cpu_2proc.yaml"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert sorted(result.stdout.splitlines()) == ["process 0 of 2 on cpu", "process 1 of 2 on cpu"]


def test_fsdp_is_refused_under_accelerate_launch(tmp_path):
    result = launch(tmp_path, "--use_fsdp", "--num_processes", "1", "--num_machines", "1")
    assert result.returncode != 0
    assert "ValueError: FSDP is not supported: " in result.stderr
