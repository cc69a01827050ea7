"""Processes that tests start, forked from one that has imported everything once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import warnings
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

# What the processes run, and POT, which is imported when it is first used. The first process imports all of it.
MODULES = ("tests.training.interruptions", "tests.training.processes", "ot")

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(list(MODULES))


def free_port() -> int:
    """Return the number of a port that nothing on this machine uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(function: Callable, *args: Any, processes: int = 1, end_others: bool = True) -> list[int]:
    """Run a function in a process of its own, or in several that find each other; return their exit codes.

    Several have the environment that `accelerate launch` gives them. Once one has failed, the others are ended, as
    there on one machine; on several machines, which `end_others=False` is like, nobody ends them.
    """
    port = free_port()
    children = [
        context.Process(target=_run, args=(rank, processes, port, function, args)) for rank in range(processes)
    ]
    for child in children:
        child.start()
    running = {child.sentinel: child for child in children}
    while running:
        for sentinel in connection.wait(list(running)):
            ended = running.pop(sentinel)
            ended.join()
            if ended.exitcode and end_others:
                for other in running.values():
                    other.kill()
    return [child.exitcode for child in children]


def _run(rank: int, processes: int, port: int, function: Callable, args: tuple) -> None:
    gc.set_threshold(100_000, 20, 20)  # seldom, as in the tests' own processes
    gc.freeze()  # garbage collection skips what was imported, as in the tests' own processes
    if processes > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    function(*args)


def launch_script(script: Path, *arguments: str, out: Path, processes: int = 2, **environment: str) -> str:
    """Run a script on several processes, and return what all of them print; `out` is a folder for it."""
    ends = launch(_run_script, str(script), arguments, str(out), environment, processes=processes)
    printed = "".join(path.read_text() for path in sorted(out.glob("printed-*")))
    assert ends == [0] * processes, printed[-3000:]
    return printed


def _run_script(script: str, arguments: tuple[str, ...], out: str, environment: dict[str, str]) -> None:
    os.environ |= environment
    warnings.simplefilter("ignore", UserWarning)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))  # as Python does for a script
    with Path(out, f"printed-{os.environ.get('RANK', 0)}").open("w") as file:
        sys.stdout = sys.stderr = file
        try:
            runpy.run_path(script, run_name="__main__")
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
            raise
        finally:
            file.flush()
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
