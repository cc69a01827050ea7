"""Search for the settings of any recipe on the demo's development split, twelve runs for every method.

    python examples/search_recipes.py --methods coop vpt
    python examples/search_recipes.py --write

A run trains one configuration with seed 1 at tau = 1 and at IF 50; its mean H over the two decides (for a method that
cannot tell new classes apart, its accuracy on base validation images). The search is greedy: axis after axis, from the
best configuration so far. Axes and start of each method are data, in `search/*.yaml`. What base validation images
alone would have chosen of the same runs is told beside it. Cells are resumable and shared by processes; the log of a
method is `results/search/<method>.json`, and `--write` writes its choice into the recipe's file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers
import yaml

from peft_ncgeo.data import load_demo
from peft_ncgeo.files import read_yaml, write_whole
from peft_ncgeo.protocols import base_to_new
from peft_ncgeo.training import GeometryTrainingArguments, Recipe

FOLDER = Path(__file__).parent
RUNS, SEED = 12, 1
TAILS = {"tau=1": {"tau": 1.0}, "IF 50": {"imbalance_factor": 50, "n_max": 50}}
SCORES = ("H", "base", "new", "validation")
Content = dict[str, Any]


def targets(place: Any, keys: Sequence[str], path: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any, str]]:
    """Yield every container, key in it and whole path that a dotted key names; `*` names all keys of a container."""
    first, *rest = keys
    names = list(place) if isinstance(place, dict) else list(range(len(place)))
    chosen = names if first == "*" else [int(first) if isinstance(place, list) else first]
    for name in chosen:
        whole = (*path, str(name))
        if rest:
            yield from targets(place[name], rest, whole)
        else:
            yield place, name, ".".join(whole)


def changed(content: Content, change: Content) -> tuple[Content, Content]:
    """Return a copy of a recipe's content with other values, and these values by their paths.

    Args:
        content: a recipe's content.
        change: dotted key -> new value, `{times: 3}` for a multiple of the present one, or `{remove: true}`, which may
            find none.

    Raises:
        ValueError: a key that names nothing in the recipe, or a multiple of something that is no number.
    """
    content, values = deepcopy(content), {}
    for key, value in change.items():
        try:
            for place, name, path in list(targets(content, key.split("."))):
                if value == {"remove": True}:
                    place.pop(name, None)
                    continue
                if isinstance(value, dict) and value.keys() == {"times"}:
                    product = float(f"{place[name] * value['times']:.6g}")
                    whole = product.is_integer() and isinstance(place[name], int)
                    place[name] = int(product) if whole else product
                else:
                    place[name] = deepcopy(value)
                values[path] = place[name]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"The change {key}: {value} does not fit the recipe ({error!r}).") from error
    return content, values


def read_space(path: Path, folder: Path) -> dict[str, tuple[Content, list[list[Content]]]]:
    """Read each method's start and axes; every change must give a valid recipe.

    Raises:
        ValueError: a key or a shared axis that is not there, a method without changes, an argument that no training
            has, or a change that does not fit.
    """
    content = read_yaml(path, "Search space")
    known = [*(field.name for field in fields(GeometryTrainingArguments)), "batch_size"]
    spaces = {}
    try:
        for method, space in content["methods"].items():
            start, _ = changed(Recipe.read(folder / f"{method}.yaml").source, space["start"])
            axes = [content["shared"][axis] if isinstance(axis, str) else axis for axis in space["axes"]]
            if not any(axes):
                raise ValueError(f"{method} has no change in its axes; give {{}} for a run of its start")
            for change in (change for axis in axes for change in axis):
                Recipe.from_dict(method, changed(start, change)[0]).check_args(known)
            spaces[method] = start, axes
    except KeyError as error:
        raise ValueError(f"Search space {path} has no {error}; add it, or correct its name.") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"Search space {path} must hold methods with a start and lists of changes.") from error
    except ValueError as error:
        raise ValueError(f"Search space {path}: {error}") from error
    return spaces


def criterion(run: Content) -> float:
    """Return a run's H; for a method that cannot tell new classes apart, its accuracy on base validation images."""
    return run["validation"] if run["H"] is None else run["H"]


def mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else round(statistics.fmean(values), 3)


def search(
    start: Content,
    axes: Sequence[Sequence[Content]],
    score: Callable[[list[Content]], list[Content]],
    most: int = RUNS,
) -> list[Content]:
    """Return all runs of a greedy search, axis after axis from the best so far; a configuration is run once.

    Args:
        start: content of the first recipe, which is itself run if an axis has an empty change.
        axes: lists of changes.
        score: gives the scores of configurations; [`criterion`] decides, the first of equals.
        most: runs in all.
    """
    runs: list[Content] = []
    for number, axis in enumerate(axes, 1):
        best = max(runs, key=criterion) if runs else {"recipe": start, "changes": {}}
        fresh: list[Content] = []
        for change in axis:
            recipe, values = changed(best["recipe"], change)
            if recipe not in [run["recipe"] for run in (*runs, *fresh)]:
                fresh.append({"axis": number, "changes": {**best["changes"], **values}, "recipe": recipe})
        fresh = fresh[: most - len(runs)]
        scores = score([run["recipe"] for run in fresh]) if fresh else []
        runs += [{**run, **found} for run, found in zip(fresh, scores, strict=True)]
    return runs


def log_of(method: str, start: Content, runs: Sequence[Content]) -> Content:
    """Return what is kept of a search: every run, the choice, and the choice of base validation images alone."""
    chosen = max(runs, key=criterion)
    alone = max(runs, key=lambda run: run["validation"])
    measure = "base validation accuracy" if chosen["H"] is None else "H"
    return {
        "method": method,
        "criterion": f"mean {measure} over {' and '.join(TAILS)} on the development split, seed {SEED}",
        "start": start,
        "runs": [{"run": i, **{k: v for k, v in run.items() if k != "recipe"}} for i, run in enumerate(runs, 1)],
        "chosen": {"run": runs.index(chosen) + 1, "H": chosen["H"], "recipe": chosen["recipe"]},
        "by_validation_alone": {"run": runs.index(alone) + 1, "H": alone["H"], "validation": alone["validation"]},
    }


def scorer(method: str, folder: Path) -> Callable[[list[Content]], list[Content]]:
    """Return a function that trains and tests configurations of a method, with cells in `folder`."""
    demo = load_demo("development")
    test = {name: demo.splits[name] for name in ("base", "new", "validation")}

    def score(recipes: list[Content]) -> list[Content]:
        # a name that other axes do not change
        names = [f"{method}-{hashlib.sha256(json.dumps(r, sort_keys=True).encode()).hexdigest()[:8]}" for r in recipes]
        rows = base_to_new(
            [Recipe.from_dict(name, recipe) for name, recipe in zip(names, recipes, strict=True)],
            lambda seed, n_max: load_demo("development", shots=n_max, seed=seed).splits["train"],
            test,
            lambda: load_demo().model,
            demo.processor,
            folder,
            tails=TAILS,
            seeds=(SEED,),
        ).rows
        found = []
        for name in names:
            own = [row for row in rows if row["method"] == name]
            scores = {key: mean([row[key] for row in own]) for key in SCORES}
            spent = {key: round(sum(row.get(key, 0) for row in own), 1) for key in ("seconds", "cpu_seconds")}
            kept = (*SCORES, "few")
            by_tail = {row["setting"]: {key: mean([row.get(key)]) for key in kept} for row in own}
            found.append({**scores, **spent, "settings": by_tail})
        return found

    return score


def write_recipe(path: Path, recipe: Content) -> None:
    """Write a recipe's content; the file's whole lines of comment stay, at its head."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    head = [line for line in lines if line.startswith("#")]
    text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    write_whole(path, "\n".join([*head, text]))
    assert Recipe.read(path).source == recipe, path


def report(log: Content) -> str:
    """Return a table of all runs, with the choice in bold, and the choice by validation alone."""
    lines = [f"\n| {log['method']} | H | base | new | base validation | CPU s |", "|---" * 6 + "|"]
    for run in log["runs"]:
        mark = "**" * (run["run"] == log["chosen"]["run"])
        changes = ", ".join(f"{key}: {value}" for key, value in run["changes"].items()) or "start"
        numbers = " | ".join("-" if run[k] is None else f"{run[k]:.1f}" for k in (*SCORES, "cpu_seconds"))
        lines.append(f"| {mark}{run['run']}: {changes}{mark} | {numbers} |")
    alone = log["by_validation_alone"]
    return "\n".join([*lines, f"\nBase validation alone would choose run {alone['run']}, with H {alone['H']}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/search"))
    parser.add_argument("--log_dir", type=Path, default=FOLDER / "results" / "search")
    files = sorted((FOLDER / "search").glob("*.yaml"))
    parser.add_argument("--spaces", type=Path, nargs="+", default=files, help="YAML files of starts and axes")
    parser.add_argument("--recipes", type=Path, default=FOLDER / "recipes" / "demo", help="folder of the recipes")
    parser.add_argument("--methods", nargs="+", help="default: all of the spaces")
    parser.add_argument("--write", action="store_true", help="write each choice into the recipe's file")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)
    spaces = {name: space for path in args.spaces for name, space in read_space(path, args.recipes).items()}
    if unknown := set(args.methods or ()) - set(spaces):
        parser.error(f"no space has a method {min(unknown)!r}; there are {', '.join(spaces)}.")
    for method in args.methods or spaces:
        start, axes = spaces[method]
        log = log_of(method, start, search(start, axes, scorer(method, args.output_dir / method)))
        write_whole(args.log_dir / f"{method}.json", json.dumps(log, indent=1) + "\n")
        print(report(log), flush=True)
        if args.write:
            write_recipe(args.recipes / f"{method}.yaml", log["chosen"]["recipe"])


if __name__ == "__main__":
    main()
