"""Errors of processes that cannot continue a training together: one is lost, or they found different checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerState

from ...validation import one_line
from ..gathering import world_size

# Gloo has no errors of its own; those of the others are `DistError`.
_OF_GLOO = re.compile(r"gloo/|Connection (closed|reset) by peer|Broken pipe|Timed out waiting")


@contextmanager
def saying_who_is_lost(state: Callable[[], TrainerState], last_whole: Callable[[], str]) -> Iterator[None]:
    """Turn the error of a broken connection into one line that names the step and the last whole checkpoint.

    Args:
        state: function that returns the trainer's state.
        last_whole: function that returns the path of the last whole checkpoint, or raises a ValueError.

    Raises:
        ConnectionError: another process has ended, or did not answer within `ddp_timeout` seconds.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not (isinstance(error, dist.DistError) or _OF_GLOO.search(str(error))):
            raise
        try:
            mend = f"start all of them again with resume_from_checkpoint=True, from {Path(last_whole()).name}"
        except ValueError:
            mend = "there is no whole checkpoint to resume from, so start all of them from the beginning"
        raise ConnectionError(
            f"Process {dist.get_rank()} of {world_size()} lost another one after step {state().global_step} "
            f"({one_line(error)}); {mend}."
        ) from error


def agree(find: Callable[[], str]) -> str:
    """Return the checkpoint that every process has found.

    Raises:
        ValueError: a process found none, or a different one.
    """
    if world_size() == 1:
        return find()
    path, reason = "", ""
    try:
        path = find()
    except ValueError as error:
        reason = str(error)
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, Path(path).name)
    if not any(found):
        raise ValueError(reason)
    if len(set(found)) > 1:
        listed = "; ".join(f"process {rank}: {name or 'none'}" for rank, name in enumerate(found))
        raise ValueError(
            f"Processes found different checkpoints ({listed}). Put output_dir on a disk that all machines share, "
            "or set save_on_each_node=True and name a checkpoint that all of them have."
        )
    return path
