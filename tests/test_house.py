"""The shape of the package: which part may import which, and what files may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

PACKAGE = Path(__file__).parents[1] / "peft_ncgeo"
# each part -> the parts it may import; everything may import what its own row names, nothing else
BASE = {"markdown", "models", "validation"}
ALLOWED = {
    "validation": set(),
    "markdown": set(),
    "files": {"validation"},
    "models": {"validation"},
    "geometry": {"validation"},
    "losses": {"geometry", "validation"},
    "tuners": {"geometry", *BASE},
    "registration": {"tuners"},
    "data": {"files", *BASE},
    "metrics": {"geometry", "validation"},
    "loading": {"data", "files", "tuners", *BASE},
    "classifiers": {"loading", "metrics", "data", "files", "tuners", "geometry", *BASE},
    "few_shot": {"classifiers", "tuners", "geometry", *BASE},
    "evaluation": {"classifiers", "metrics"},
    "hub": {"classifiers", "loading", "metrics", "data", "files", "tuners", "geometry", *BASE},
    "training": {
        *("hub", "few_shot", "classifiers", "loading", "metrics", "losses", "data", "files", "tuners", "geometry"),
        *BASE,
    },
    "protocols": {
        *("training", "few_shot", "classifiers", "metrics", "losses", "data", "files", "tuners", "geometry"),
        *BASE,
    },
    "plots": {"geometry", "protocols"},
    "__init__": {"registration", "tuners"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_at_module_level(path: Path) -> set[str]:
    """Parts of the package that importing this file imports."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    package = parts[:-1]
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            names = [target[1]] if len(target) > 1 and target[1] else [alias.name for alias in node.names]
            found.update(names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_ncgeo."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert imports_at_module_level(path) - {part} <= ALLOWED[part]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_have_one_subject(path):
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem != "utils"
    assert path.stem == "__init__" or ast.get_docstring(ast.parse(path.read_text())), "no module docstring"


def test_the_check_would_notice(tmp_path):
    """It reads relative imports of every depth."""
    assert "models" in imports_at_module_level(PACKAGE / "tuners" / "prompt_model.py")
    assert "losses" in imports_at_module_level(PACKAGE / "training" / "trainer.py")


def test_every_import_is_declared():
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    declared = {name.lower() for name in re.findall(r'^    "([A-Za-z0-9_-]+)>=', project, flags=re.MULTILINE)}
    extras = {"canvas": {"matplotlib"}}  # file -> what an extra of its own installs
    assert 'plot = ["matplotlib' in project
    names = {"PIL": "pillow", "ot": "pot", "yaml": "pyyaml"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in (m.split(".")[0] for m in modules):
                if module not in sys.stdlib_module_names | {"peft_ncgeo"} | extras.get(path.stem, set()):
                    assert names.get(module, module).lower() in declared, (path, module)


def test_the_oldest_set_is_the_declared_bounds():
    """Of all that the tests import; the other tools are any version that is installed."""
    root = PACKAGE.parent
    bounds = dict(re.findall(r'"([A-Za-z0-9_-]+)>=([\d.]+)"', (root / "pyproject.toml").read_text()))
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (root / "constraints-oldest.txt").read_text(), flags=re.MULTILINE))
    tools = {"build", "mypy", "resvg-py", "ruff", "scikit-learn", "setuptools"}
    assert {name: Version(pin) for name, pin in pins.items()} == {
        name: Version(bound) for name, bound in bounds.items() if name not in tools
    }


# What PEFT and Transformers' CLIP import is there already; whoever adds a method to PEFT pays for nothing more.
IMPORTS = """
import sys, peft
from transformers import CLIPModel, CLIPProcessor
before = set(sys.modules)
import {part}
print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names))
"""


@pytest.mark.parametrize("part", ["peft_ncgeo", "peft_ncgeo.geometry"])
def test_importing_the_package_imports_nothing_but_itself(part):
    """Nor what needs more: `datasets`, POT, `evaluate`, matplotlib and Transformers' trainer come when first used."""
    command = [sys.executable, "-c", IMPORTS.format(part=part)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "peft_ncgeo.registration" in found
    assert not [name for name in found if not name.startswith("peft_ncgeo")]
    later = set(ALLOWED) - {"validation", "models", "geometry", "tuners", "registration", "__init__"}
    assert not later & {name.split(".")[1] for name in found if "." in name}
