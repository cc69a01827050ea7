"""A user of the Hub: a Python of its own, to which tests send snippets."""

from __future__ import annotations

import json
import linecache
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import traceback
import types
from pathlib import Path
from typing import Any


class UserError(Exception):
    """The error that a snippet raised: its name, its message, and its whole traceback."""

    def __init__(self, type_name: str, message: str, traceback_text: str):
        super().__init__(f"{type_name}: {message}")
        self.type_name, self.message, self.traceback_text = type_name, message, traceback_text


class User:
    """Runs snippets of Python as a user of the Hub at `url` would, who is logged in if there is a token.

    `out` is what the last snippet printed, errors and warnings included; `home` is the user's HF_HOME and `work` the
    directory snippets run in.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 120):
        self.timeout, self.out = timeout, ""
        self._folder = tempfile.TemporaryDirectory(prefix="user-")
        self.home, self.work = Path(self._folder.name, "home"), Path(self._folder.name, "work")
        self.home.mkdir()
        self.work.mkdir()
        ours = ("HF_", "HUGGING", "TRANSFORMERS_")  # nothing of the one who runs the tests, and no proxy
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
        self.environment = {
            **kept,
            "HF_ENDPOINT": url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            **({"HF_TOKEN": token} if token else {}),
        }
        self._process: _Process | None = None

    def __enter__(self) -> User:
        return self

    def __exit__(self, *exception) -> None:
        if self._process is not None:
            self._process.close()
        self._folder.cleanup()

    def run(self, code: str) -> Any:
        """The value of the snippet's `result`; names and imports stay for the next snippet."""
        if self._process is None or not self._process.alive:
            self._process = _Process(self.environment, self.work)
        return self._ask(self._process, code)

    def fresh(self, code: str, **environment: str | None) -> Any:
        """The same in a new process, in which variables can be set, or unset by None."""
        changed = {**self.environment, **environment}
        process = _Process({name: value for name, value in changed.items() if value is not None}, self.work)
        try:
            return self._ask(process, code)
        finally:
            process.close()

    def _ask(self, process: _Process, code: str) -> Any:
        answer, self.out = process.ask(textwrap.dedent(code), self.timeout)
        if answer is None:
            name, reason = ("ProcessError", "the process ended while it ran the snippet")
            if process.timed_out:
                name, reason = ("TimeoutError", f"the snippet was stopped after {self.timeout:g} s")
            raise UserError(name, reason, self.out)
        if "error" in answer:
            raise UserError(*answer["error"])
        return answer["result"]


class _Process:
    """A child that runs snippets: JSON lines through its pipes, what they print in a file."""

    def __init__(self, environment: dict[str, str], folder: Path):
        descriptor, name = tempfile.mkstemp(dir=folder.parent, suffix=".out")
        os.close(descriptor)
        self.printed, self.timed_out = Path(name), False
        with self.printed.open("ab") as file:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file, "text": True}
            self.child = subprocess.Popen([sys.executable, __file__], env=environment, cwd=folder, **pipes)

    @property
    def alive(self) -> bool:
        return self.child.poll() is None

    def ask(self, code: str, timeout: float) -> tuple[dict | None, str]:
        """The answer, None if there is none any more, and what was printed meanwhile."""
        start = self.printed.stat().st_size
        timer = threading.Timer(timeout, self.stop)
        timer.start()
        try:
            print(json.dumps(code), file=self.child.stdin, flush=True)
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self.close()
        return json.loads(line) if line else None, self.printed.read_bytes()[start:].decode(errors="replace")

    def stop(self) -> None:
        self.timed_out = True
        self.child.kill()

    def close(self) -> None:
        self.child.terminate()  # a coverage run writes its lines first
        self.child.communicate()


def serve() -> None:
    """The child's side: each line that comes in is a snippet, each that goes out its answer."""
    snippets, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # snippets print where errors go, not among the answers
    sys.path[0] = ""  # the working directory, not the tests'
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    for number, line in enumerate(snippets, start=1):
        name, code = f"<snippet {number}>", json.loads(line)
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)  # for tracebacks
        vars(main).pop("result", None)
        try:
            exec(compile(code, name, "exec", dont_inherit=True), vars(main))
            answer = json.dumps({"result": vars(main).get("result")})
        except BaseException as error:
            answer = json.dumps({"error": [type(error).__name__, str(error), traceback.format_exc()]})
        sys.stdout.flush()
        sys.stderr.flush()
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    serve()
