"""The graph of the package's imports: every file, and the files that importing it runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy.sparse.csgraph import connected_components

PACKAGE = Path(__file__).parents[1] / "peft_ncgeo"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
Import = ast.Import | ast.ImportFrom


def read_imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[Import, bool]]:
    """Yield each import of a file, and True for one inside a function.

    Imports under `if TYPE_CHECKING:` are yielded too.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside
        else:
            yield from read_imports(node, inside or isinstance(node, FUNCTIONS))


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its name with dots."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def targets(node: Import, name: str, is_package: bool) -> list[str]:
    """Return the full names that an import in the module `name` asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    above = name.split(".") if is_package else name.split(".")[:-1]
    base = above[: len(above) - node.level + 1] if node.level else []
    return [".".join([*base, *(node.module or "").split("."), alias.name]).replace("..", ".") for alias in node.names]


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The file without its blocks for type checkers: a package's `__init__` hands these names on when asked."""
    kept = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    return ast.Module(kept, [])


def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Each module -> the modules of the package that its imports run, wherever in the file they stand.

    To import `a.b.c` is to run the `__init__` files of `a` and `a.b` too, except those that hold the importing file.
    """
    found, edges = modules(package), {}
    for name, path in found.items():
        is_package = path.name == "__init__.py"
        tree = ast.parse(path.read_text())
        edges[name] = set()
        for node, _ in read_imports(without_type_checking(tree) if is_package else tree):
            for target in targets(node, name, is_package):
                parts = (target if target in found else target.rpartition(".")[0]).split(".")
                run = {".".join(parts[: i + 1]) for i in range(len(parts))}
                edges[name] |= {part for part in run & found.keys() if not f"{name}.".startswith(f"{part}.")}
    return edges


def circles(edges: Mapping[str, set[str]]) -> list[set[str]]:
    """Strongly connected components of more than one module."""
    names = sorted(edges)
    matrix = np.array([[other in edges[name] for other in names] for name in names])
    count, labels = connected_components(matrix, connection="strong")
    components = [{name for name, label in zip(names, labels, strict=True) if label == i} for i in range(count)]
    return [component for component in components if len(component) > 1]
