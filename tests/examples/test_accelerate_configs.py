"""The shipped configurations of Accelerate."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file

from ..launching import launch_script

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"


@pytest.mark.parametrize(
    ("name", "processes", "use_cpu", "machines"),
    [
        ("cpu_1proc", 1, True, 1),
        ("cpu_2proc", 2, True, 1),
        ("cpu_2nodes", 2, True, 2),
        ("gpu_1proc", 1, False, 1),
        ("gpu_multi", 2, False, 1),
        ("gpu_2nodes", 2, False, 2),
    ],
)
def test_fields(name, processes, use_cpu, machines):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.num_processes, config.use_cpu, config.mixed_precision) == (processes, use_cpu, "no")
    assert config.distributed_type == ("MULTI_GPU" if processes > 1 else "NO")
    assert config.num_machines == machines
    assert getattr(config, "gpu_ids", None) == (None if use_cpu else "0" if processes == 1 else "all")
    assert len(list(FOLDER.glob("*.yaml"))) == 6


@pytest.mark.slow
def test_fsdp_is_refused_under_accelerate_launch(tmp_path):
    """The command's flag is an environment variable for the script."""
    script = tmp_path / "script.py"
    script.write_text("from peft_ncgeo import GeometryTrainingArguments\nGeometryTrainingArguments('unused')\n")
    with pytest.raises(AssertionError, match="ValueError: FSDP is not supported: "):
        launch_script(script, out=tmp_path, processes=1, ACCELERATE_USE_FSDP="true")
