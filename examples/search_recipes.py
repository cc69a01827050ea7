"""Search for the settings of any recipe on the demo's development data, twelve runs for every method.

    python examples/search_recipes.py --methods coop vpt
    python examples/search_recipes.py --write
    python examples/search_recipes.py --spaces examples/search/image_tail.yaml

The search is greedy: it tries the changes of one axis after the other, each time from the best configuration so far.
The files `search/*.yaml` hold the start and the axes of each method, and the task that scores a run:

- `base_to_new`, the default. Each configuration is trained with seed 1 on the development split: on the drawings of
  one artist at tau = 1, and on those of the other artist at IF 50. The best has the highest mean H over both
  trainings and both artists, so drawings that were not trained on count as much as those that were. For a method that
  cannot classify new classes it has the highest mean accuracy on base classes, over validation images and the other
  artist's drawings. The log also names the run that base validation images alone would choose.
- `long_tail`. The demo's ViT is trained on tails of its training photographs, one for each imbalance factor. The best
  configuration has the highest mean accuracy on the 500 validation photographs of `load_image_demo`, which are neither
  trained on nor in its test set.

A stopped search continues where it was, and several processes share the work. The log of a method is
`results/search/<method>.json`, or in the folder that the task names. `--write` writes the choice into the recipe of
that name, if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import yaml
from benchmark_base_new import TAILS, of_artist
from benchmark_image_tail import OF_CLASSIFIER, quieten, run_tails

from peft_ncgeo.data import load_demo, load_image_demo
from peft_ncgeo.files import read_yaml, write_whole
from peft_ncgeo.protocols import base_to_new
from peft_ncgeo.training import GeometryTrainingArguments, Recipe

FOLDER = Path(__file__).parent
RUNS, SEED = 12, 1
ARTISTS = {"twemoji": "tau=1", "emojione": "IF 50"}  # who is trained on, and how many images
Content = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ tasks


@dataclass
class BaseToNew:
    """The demo's development split, scored by H on the artist that is trained on and on the other one."""

    scores: ClassVar = ("H", "H_other", "base", "base_other", "new", "new_other", "validation")
    titles: ClassVar = {"validation": "base validation", "H_other": "H, other artist"}
    criterion: ClassVar = "mean H over both artists, after training on one: " + ", ".join(
        f"{artist} at {tail}" for artist, tail in ARTISTS.items()
    )
    recipes: str = "demo"
    logs: str = ""

    def run(self, recipes: dict[str, Content], folder: Path) -> list[Content]:
        """Return a row for each recipe and artist."""
        demo, rows = load_demo(), []
        for artist, tail in ARTISTS.items():
            train, test = of_artist("development", artist)
            validation = load_demo("development", train_artist=artist).splits["validation"]
            rows += base_to_new(
                [Recipe.from_dict(*recipe) for recipe in recipes.items()],
                train,
                {name: images for name, images in test.items() if name != "kept"} | {"validation": validation},
                lambda: load_demo().model,
                demo.processor,
                folder,
                tails={f"{artist}, {tail}": TAILS[tail]},
                seeds=(SEED,),
            ).rows
        return rows

    def score(self, run: Content) -> float:
        """Return what decides: mean H, or mean base accuracy where there are no new classes to tell apart."""
        keys = ("validation", "base_other") if run["H"] is None else ("H", "H_other")
        return round(statistics.fmean(run[key] for key in keys), 3)


@dataclass
class LongTail:
    """Tails of the demo's training photographs, scored by accuracy on its validation photographs.

    Attributes:
        recipes, logs: folders of recipes and logs, in `recipes` and in `results/search`.
        imbalance_factors: one tail for each.
        n_max: photographs of the largest class.
        seed: draws which class gets which count.
    """

    scores: ClassVar = ("validation", "many", "medium", "few")
    titles: ClassVar = {}
    recipes: str
    logs: str
    imbalance_factors: list[float]
    n_max: int
    seed: int

    @property
    def criterion(self) -> str:
        tails = " and ".join(f"IF {factor:g}" for factor in self.imbalance_factors)
        return f"mean accuracy on 500 photographs held out of training: {tails}, n_max {self.n_max}, seed {self.seed}"

    def run(self, recipes: dict[str, Content], folder: Path) -> list[Content]:
        """Return a row for each recipe and tail."""
        images = load_image_demo().splits["validation"]
        rows = run_tails(recipes, images, folder, self.imbalance_factors, self.n_max, [self.seed])
        return [{**row, "validation": row["all"]} for row in rows]

    def score(self, run: Content) -> float:
        """Return what decides: accuracy on validation photographs."""
        return run["validation"]


TASKS = {"base_to_new": BaseToNew, "long_tail": LongTail}


def read_task(path: Path) -> BaseToNew | LongTail:
    """Return the task of a space, the base-to-new task if it names none."""
    ((name, settings),) = read_yaml(path, "Search space").get("task", {"base_to_new": {}}).items()
    return TASKS[name](**settings)


# ----------------------------------------------------------------------------------------------------------- spaces


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
                    if isinstance(place, list) or name in place:
                        del place[name]
                    continue
                if isinstance(value, dict) and value.keys() == {"times"}:
                    multiple = float(f"{place[name] * value['times']:.6g}")
                    whole = multiple.is_integer() and isinstance(place[name], int)
                    place[name] = int(multiple) if whole else multiple
                else:
                    place[name] = deepcopy(value)
                values[path] = place[name]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"The change {key}: {value} does not fit the recipe ({error!r}).") from error
    return content, values


def read_space(path: Path, folder: Path) -> dict[str, tuple[Content, list[list[Content]]]]:
    """Read each method's start and axes; every change must give a valid recipe.

    A method starts from the recipe of its name. `grids` combine adapters with methods, named `adapter_method`. These
    start from the adapter's recipe with the adapter's changes and then the method's. An axis that is a name is the
    adapter's own axis, else a shared one.

    Raises:
        ValueError: a key or a shared axis that is not there, a method without changes, an argument that no training
            has, or a change that does not fit.
    """
    content = read_yaml(path, "Search space")
    known = [*(field.name for field in fields(GeometryTrainingArguments)), "batch_size", *OF_CLASSIFIER]
    spaces = {}
    try:
        for method, recipe, changes, named, shared in _methods(content):
            start, _ = changed(Recipe.read(folder / f"{recipe}.yaml").source, changes)
            axes = [shared[axis] if isinstance(axis, str) else axis for axis in named]
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


def _methods(content: Content) -> Iterator[tuple[str, str, Content, list[Any], Content]]:
    """Yield name, recipe, changes of the start, axes and shared axes of each method of a space."""
    shared = content.get("shared", {})
    for name, space in content.get("methods", {}).items():
        yield name, name, space["start"], space["axes"], shared
    for grid in content.get("grids", ()):
        for (adapter, own), (name, space) in product(grid["adapters"].items(), grid["methods"].items()):
            start = own.get("start", {}) | space["start"] | space.get("under", {}).get(adapter, {})
            yield f"{adapter}_{name}", own["recipe"], start, space["axes"], {**shared, **own["axes"]}


# ----------------------------------------------------------------------------------------------------------- search


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
        score: gives the scores of configurations; the highest `score` is best, the first of equals.
        most: runs in all.
    """
    runs: list[Content] = []
    for number, axis in enumerate(axes, 1):
        best = max(runs, key=itemgetter("score")) if runs else {"recipe": start, "changes": {}}
        fresh: list[Content] = []
        for change in axis:
            recipe, values = changed(best["recipe"], change)
            if recipe not in [run["recipe"] for run in (*runs, *fresh)]:
                fresh.append({"axis": number, "changes": {**best["changes"], **values}, "recipe": recipe})
        fresh = fresh[: most - len(runs)]
        scores = score([run["recipe"] for run in fresh]) if fresh else []
        runs += [{**run, **found} for run, found in zip(fresh, scores, strict=True)]
    return runs


def log_of(method: str, start: Content, runs: Sequence[Content], task: BaseToNew | LongTail) -> Content:
    """Return what is kept of a search: every run, the choice, and the choice of validation images alone."""
    chosen, alone = max(runs, key=itemgetter("score")), max(runs, key=itemgetter("validation"))
    return {
        "method": method,
        "criterion": task.criterion,
        "start": start,
        "runs": [{"run": i, **{k: v for k, v in run.items() if k != "recipe"}} for i, run in enumerate(runs, 1)],
        "chosen": {"run": runs.index(chosen) + 1, "score": chosen["score"], "recipe": chosen["recipe"]},
        "by_validation_alone": {"run": runs.index(alone) + 1, "score": alone["score"]},
    }


def scorer(method: str, folder: Path, task: BaseToNew | LongTail) -> Callable[[list[Content]], list[Content]]:
    """Return a function that trains and tests configurations of a method, with cells in `folder`."""

    def score(recipes: list[Content]) -> list[Content]:
        # a name that other axes do not change
        names = [f"{method}-{hashlib.sha256(json.dumps(r, sort_keys=True).encode()).hexdigest()[:8]}" for r in recipes]
        rows = task.run(dict(zip(names, recipes, strict=True)), folder)
        found = []
        for name in names:
            own = [row for row in rows if row["method"] == name]
            scores = {key: mean([row[key] for row in own]) for key in task.scores}
            spent = {key: round(sum(row.get(key, 0) for row in own), 1) for key in ("seconds", "cpu_seconds")}
            kept = dict.fromkeys((*task.scores, "few"))
            by_tail = {row["setting"]: {key: mean([row.get(key)]) for key in kept} for row in own}
            found.append({"score": task.score(scores), **scores, **spent, "settings": by_tail})
        return found

    return score


def write_recipe(path: Path, recipe: Content) -> None:
    """Write a recipe's content; the file's whole lines of comment stay, at its head."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    head = [line for line in lines if line.startswith("#")]
    text = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    write_whole(path, "\n".join([*head, text]))
    assert Recipe.read(path).source == recipe, path


def report(log: Content, task: BaseToNew | LongTail) -> str:
    """Return a table of all runs, with the choice in bold, and the choice by validation alone."""
    keys = ("score", *task.scores, "cpu_seconds")
    titles = {"score": "mean", "cpu_seconds": "CPU s", **task.titles}
    lines = [f"\n| {log['method']} | {' | '.join(titles.get(key, key) for key in keys)} |"]
    lines.append("|---" * (len(keys) + 1) + "|")
    for run in log["runs"]:
        mark = "**" * (run["run"] == log["chosen"]["run"])
        changes = ", ".join(f"{key}: {value}" for key, value in run["changes"].items()) or "start"
        numbers = " | ".join("-" if run[key] is None else f"{run[key]:.1f}" for key in keys)
        lines.append(f"| {mark}{run['run']}: {changes}{mark} | {numbers} |")
    alone = log["by_validation_alone"]
    told = f"\nValidation images alone would choose run {alone['run']}, with a mean of {alone['score']}."
    return "\n".join([*lines, told])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/search"))
    parser.add_argument("--log_dir", type=Path, default=FOLDER / "results" / "search")
    files = sorted((FOLDER / "search").glob("*.yaml"))
    parser.add_argument("--spaces", type=Path, nargs="+", default=files, help="YAML files of starts and axes")
    parser.add_argument("--recipes", type=Path, help="folder of the recipes; default: the one that the task names")
    parser.add_argument("--methods", nargs="+", help="those of the spaces to search for; default: all")
    parser.add_argument("--write", action="store_true", help="write each choice into the method's own recipe, if any")
    args = parser.parse_args()
    quieten()
    spaces = []
    for path in args.spaces:
        task = read_task(path)
        folder = args.recipes or FOLDER / "recipes" / task.recipes
        spaces += [(method, task, folder, *space) for method, space in read_space(path, folder).items()]
    known = dict.fromkeys(method for method, *_ in spaces)
    if unknown := set(args.methods or ()) - known.keys():
        parser.error(f"no space has a method {min(unknown)!r}; there are {', '.join(known)}.")
    for method, task, folder, start, axes in spaces:
        if method not in (args.methods or known):
            continue
        cells = args.output_dir / task.logs / method
        log = log_of(method, start, search(start, axes, scorer(method, cells, task)), task)
        write_whole(args.log_dir / task.logs / f"{method}.json", json.dumps(log, indent=1) + "\n")
        print(report(log, task), flush=True)
        path = folder / f"{method}.yaml"
        if args.write and path.exists():  # a grid's methods share recipes, and their logs alone keep the choice
            write_recipe(path, log["chosen"]["recipe"])


if __name__ == "__main__":
    main()
