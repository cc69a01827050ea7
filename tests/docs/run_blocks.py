"""Run Python blocks of pages in one process: python -m tests.docs.run_blocks FILE.

The file is JSON: a list of pages, each with its name and the code of its blocks, which share their names. The built-in
data has a few evaluation images of each class, so that a run takes seconds.
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

from ..small_demo import few_test_images, first_of_each_class

KEPT = {"validation": 5}  # images of each class; below five, a sweep warns


def smaller(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loader of built-in data with small evaluation sets."""

    def loaded(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        parts = {
            name: part if name == "train" else part.select(first_of_each_class(part["label"][:], KEPT.get(name, 1)))
            for name, part in found.splits.items()
        }
        return found._replace(splits=DatasetDict(parts))

    return loaded


def main() -> None:
    data.load_demo, data.load_image_demo = smaller(data.load_demo), smaller(data.load_image_demo)
    for page, codes in json.loads(Path(sys.argv[1]).read_text()):
        names: dict[str, Any] = {"__name__": "__main__"}
        for i, code in enumerate(codes, 1):
            start = time.process_time()
            gc.freeze()  # Trainer collects garbage often
            exec(compile(code, f"{page}, block {i}", "exec"), names)
            print(f"{page}, block {i}: {time.process_time() - start:.1f} CPU seconds", flush=True)


if __name__ == "__main__":
    with few_test_images():
        main()
