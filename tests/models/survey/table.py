"""The committed results of the survey, and the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path

from peft_ncgeo.markdown import table

ROOT = Path(__file__).parents[3]
RESULTS, PAGE = Path(__file__).with_name("results.json"), ROOT / "docs" / "supported_models.md"
HEADINGS = {
    "a_vision": "image prompts",
    "a_text": "text prompts",
    "b_prototype": "prototypes",
    "b_copa": "CoPA",
    "b_adaptformer": "AdaptFormer",
    "c_train_lora_ce": "train LoRA",
    "c_train_lora": "LoRA, SpA and OT",
    "c_train_prompts": "train prompts",
    "c_train_prototypes": "train prototypes",
    "d_zero_lora": "zero-shot, LoRA",
    "d_zero_prompts": "zero-shot, prompts",
    "e_align": "alignment",
    "f_pipe_lora": "pipeline, LoRA",
    "f_pipe_prompts": "pipeline, prompts",
}
KINDS = {"dual": "Dual encoders", "classifier": "Image classifiers", "backbone": "Backbones"}
INTRODUCTION = """# Supported models

Look up which methods work on your model. `print(peft_ncgeo.models.describe(model))` prints the same for a model that
you have loaded.

**yes**: the method works, and its outputs are correct. **no**: the method is refused with a one-line error; the number
is that of the reason [below](#reasons). Empty: the method does not apply to this kind of model.

`make models` writes this page. It tries every method on a tiny random model of each class of Transformers, and
compares the outputs with those of the model itself. A test repeats this for one model of each family, and fails if the
page is wrong.
"""


def read_results() -> dict[str, dict]:
    """Model -> its kind, and for each try how it ended: "works", "n/a" or the reason of a refusal."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write_results(found: dict[str, dict], order: list[str]) -> None:
    """Put results in the place of older ones of the same models, and write the page."""
    kept = read_results() | found
    kept = {name: kept[name] for name in [*order, *sorted(kept.keys() - set(order))] if name in kept}
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(kept))


def short(status: str, message: str) -> str:
    """A result as the file holds it: for a refusal, its reason without what is to be done about it."""
    if status != "refused":
        return status
    return message.partition(": ")[2].split("; ")[0].split(", so ")[0].rstrip(".")


def page(results: dict[str, dict]) -> str:
    """The page as Markdown: a table for each kind of model, and the reasons."""
    reasons: dict[str, int] = {}
    parts = [INTRODUCTION]
    for kind, title in KINDS.items():
        rows = {name: row["tries"] for name, row in results.items() if row["kind"] == kind}
        columns = [column for column in HEADINGS if any(column in tries for tries in rows.values())]
        cells = [
            [name, *(_cell(tries.get(column, "n/a"), name, reasons) for column in columns)]
            for name, tries in rows.items()
        ]
        parts.append(f"## {title}\n\n{table(['model', *(HEADINGS[column] for column in columns)], cells)}\n")
    listed = "\n".join(f"{place}. {reason}" for reason, place in reasons.items())
    return "\n".join([*parts, f"## Reasons\n\n{listed}\n"])


def _cell(end: str, name: str, reasons: dict[str, int]) -> str:
    if end in ("works", "n/a"):
        return "yes" if end == "works" else ""
    words = end.split(" ")  # the model's name in front is left out, so that models share a reason
    reason = " ".join(words[1:]) if words[0] in name else end
    return f"no {reasons.setdefault(reason, len(reasons) + 1)}"
