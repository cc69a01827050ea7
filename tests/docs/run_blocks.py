"""Run Python blocks of pages in one process: python -m tests.docs.run_blocks FILE.

The file is JSON: a list of pages, each with its name and the code of its blocks, which share their names. Evaluation
sets of the built-in data are cut to a few images of each class, so that a run takes seconds.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from peft_ncgeo import data

EVERY = 48  # of so many images of an evaluation set one is kept: one of each class


def smaller(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loader of built-in data with small evaluation sets."""

    def loaded(*args: Any, **kwargs: Any) -> Any:
        demo = load(*args, **kwargs)
        parts = {name: part if name == "train" else part.select(range(0, len(part), EVERY)) for name, part in demo.splits.items()}
        return demo._replace(splits=DatasetDict(parts))

    return loaded


def main() -> None:
    data.load_demo, data.load_image_demo = smaller(data.load_demo), smaller(data.load_image_demo)
    gc.freeze()  # Trainer collects garbage often
    for page, codes in json.loads(Path(sys.argv[1]).read_text()):
        names: dict[str, Any] = {"__name__": "__main__"}
        for i, code in enumerate(codes, 1):
            start = time.process_time()
            exec(compile(code, f"{page}, block {i}", "exec"), names)
            print(f"{page}, block {i}: {time.process_time() - start:.1f} CPU seconds", flush=True)


if __name__ == "__main__":
    main()
