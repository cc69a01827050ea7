"""`examples/quickstart.ipynb`, whose cells run twice in one process, as "Run all" pressed twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
SHORT = {"num_train_epochs=10": "max_steps=2", "load_demo(shots=8)": "load_demo(shots=2)"}


def code_cells() -> list[str]:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)  # stored without outputs
    return ["".join(cell["source"]) for cell in cells]


@pytest.mark.slow
def test_it_runs_twice(tmp_path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(code_cells())
    for long, short in SHORT.items():
        assert long in code
        code = code.replace(long, short)
    names: dict = {"__name__": "__main__"}
    found = []
    for _ in range(2):
        exec(compile(code, NOTEBOOK.name, "exec"), names)
        found.append((names["zero_shot"], names["after"]))
        assert names["trainer"].state.global_step == 2
    assert found[0] == found[1]  # seeded, and nothing is left of the first run
    assert found[0][0] != found[0][1]
    assert "60 images of 30 base classes" in capsys.readouterr().out
    assert (tmp_path / "outputs/quickstart/adapter/adapter_model.safetensors").exists()
    matplotlib.pyplot.close("all")
