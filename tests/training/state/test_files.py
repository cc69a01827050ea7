"""The state of losses and callbacks is saved in a checkpoint and restored from it."""

from __future__ import annotations

import pytest
import torch

from peft_ncgeo.training.state.files import FILE_NAME, load_state, save_state


class Memory:
    name = "memory"

    def __init__(self, value: float):
        self.held = {"mean": torch.full((300,), value)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.held

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        self.held = state_dict


def test_what_was_read_stays_when_the_checkpoint_is_written_over(tmp_path):
    memory = Memory(0.0)
    save_state([Memory(1.0)], tmp_path)
    load_state([memory], tmp_path)
    with (tmp_path / FILE_NAME).open("r+b") as file:
        file.seek(-4 * 300, 2)
        file.write(bytes(4 * 300))
    assert memory.held["mean"].mean() == 1.0


@pytest.mark.parametrize("damaged", [torch.ones(3, 3), torch.ones(3, dtype=torch.int64)])
def test_a_state_of_another_kind_is_refused(tmp_path, damaged):
    other = Memory(0.0)
    other.held["mean"] = damaged
    save_state([other], tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        load_state([Memory(1.0)], tmp_path)
