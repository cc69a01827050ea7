"""The shipped configurations of Accelerate."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config import load_config_from_file

from ..launching import launch_script

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"


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


@pytest.mark.slow
def test_fsdp_is_refused_under_accelerate_launch(tmp_path):
    """The command's flag is an environment variable for the script."""
    script = tmp_path / "script.py"
    script.write_text("from peft_ncgeo import GeometryTrainingArguments\nGeometryTrainingArguments('unused')\n")
    with pytest.raises(AssertionError, match="ValueError: FSDP is not supported: "):
        launch_script(script, out=tmp_path, processes=1, ACCELERATE_USE_FSDP="true")
