"""Recipes that come with the package, by name."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from ..validation import short_repr

_COMPARED = 80  # characters of an unknown name; the time of a comparison grows with their square


def recipe_folder() -> Path:
    """Return the folder of the package's recipes."""
    try:
        return Path(str(files("peft_ncgeo.recipes")))
    except ModuleNotFoundError:  # a clone that is on the path but not installed
        return Path(__file__).parents[2] / "examples" / "recipes"


def recipe_names() -> list[str]:
    """Return the names of the package's recipes, those for full-size models first: "budget", "demo/budget", ..."""
    folder = recipe_folder()
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(names, key=lambda name: ("demo/" in name, name.count("/"), name))


def find_recipe(name: str | Path) -> Path:
    """Return the path of a recipe: the given file, or the file of the package's recipe of that name.

    A path that ends in .yaml or .yml is returned even if there is no such file.

    Raises:
        ValueError: any other name that is neither a file nor a recipe; the error names the nearest recipe.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    known = recipe_names()
    if str(name) not in known:
        near = get_close_matches(str(name)[:_COMPARED], known, n=1, cutoff=0)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"No recipe is named {short_repr(str(name))}; {hint}`peft-ncgeo recipes` lists all names, and a "
            "file of your own must end in .yaml."
        )
    return recipe_folder() / f"{name}.yaml"


def describe_recipe(name: str) -> str:
    """Return the first sentence of a recipe's file, with method, paper and model."""
    words = []
    for line in find_recipe(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words.append(line.lstrip("# "))
    return " ".join(words).split(". ")[0].rstrip(".")
