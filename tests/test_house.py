"""The shape of the package: which part may import which, and what files may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

from .import_graph import PACKAGE, circles, graph, modules, read_imports, targets

# each part -> the parts it may import; everything may import what its own row names, nothing else
BASE = {"markdown", "models", "validation"}
ALLOWED = {
    "validation": set(),
    "files": {"validation"},
    "markdown": set(),
    "models": {"validation"},
    "geometry": {"validation"},
    "losses": {"geometry", "validation"},
    "tuners": {"geometry", *BASE},
    "registration": {"models", "tuners"},
    "data": {"files", *BASE},
    "metrics": {"geometry", "validation"},
    "reports": {"plots", "files", "markdown", "metrics", "validation"},
    "loading": {"data", "files", "tuners", *BASE},
    "classifiers": {"loading", "metrics", "data", "files", "tuners", "geometry", *BASE},
    "few_shot": {"classifiers", "data", "tuners", "geometry", *BASE},
    "demo_app": {"classifiers"},
    "evaluation": {"classifiers", "metrics"},
    "hub": {
        "plots",
        "reports",
        "markdown",
        "classifiers",
        "loading",
        "metrics",
        "data",
        "files",
        "tuners",
        "geometry",
        *BASE,
    },
    "training": {
        *(
            "hub",
            "reports",
            "few_shot",
            "classifiers",
            "loading",
            "metrics",
            "losses",
            "data",
            "files",
            "tuners",
            "geometry",
        ),
        *BASE,
    },
    "protocols": {
        "markdown",
        *("training", "few_shot", "classifiers", "metrics", "losses", "data", "files", "tuners", "geometry"),
        *BASE,
    },
    "plots": {"few_shot", "geometry", "protocols", "validation"},
    "cli": {
        *("protocols", "training", "reports", "demo_app", "hub", "classifiers", "loading", "data", "files", "tuners"),
        *BASE,
    },
    "__init__": {"registration", "tuners"},
}
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted(Path(__file__).parent.rglob("*.py"))
# The only modules that are imported inside functions: POT, for what its import costs, and what needs an extra.
INSIDE_FUNCTIONS = {"ot", "peft_ncgeo.plots", "peft_ncgeo.hub.onnx_export"}


def test_imports_point_one_way():
    wrong = []
    for name, reached in graph().items():
        part = name.split(".")[1] if "." in name else "__init__"
        parts = {target.split(".")[1] for target in reached if "." in target}
        wrong += [f"{name} imports {other}" for other in parts - ALLOWED[part] - {part}]
    assert wrong == []


def test_no_modules_import_each_other():
    """Also not by imports inside functions, by types alone, or by the `__init__` files that an import runs."""
    assert circles(graph()) == []


def test_a_circle_is_found(tmp_path):
    files = {
        "package/__init__.py": "if TYPE_CHECKING:\n    from .a import f",
        "package/a.py": "def f():\n    from .part.b import g",
        "package/part/__init__.py": "from . import b",
        "package/part/b.py": "",
        "package/c.py": "from .part import b",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert circles(graph(tmp_path / "package")) == []
    (tmp_path / "package" / "part" / "__init__.py").write_text("from ..c import b")
    assert circles(graph(tmp_path / "package")) == [{"package.part", "package.c"}]
    (tmp_path / "package" / "part" / "__init__.py").write_text("")
    (tmp_path / "package" / "part" / "b.py").write_text("import package.a")
    assert circles(graph(tmp_path / "package")) == [{"package.a", "package.part.b"}]


def test_what_is_imported_inside_functions():
    """Optional packages and POT; a package's `__init__` may hand names on when they are asked for."""
    for name, path in modules(PACKAGE).items():
        is_package = path.name == "__init__.py"
        text = path.read_text()
        assert is_package or "import_module" not in text, path
        found = {
            target
            for node, inside in read_imports(ast.parse(text))
            if inside
            for target in targets(node, name, is_package)
        }
        allowed = {t for t in found for a in INSIDE_FUNCTIONS if t == a or t.startswith(f"{a}.")}
        assert found == allowed, path


def test_files_have_one_subject():
    for path in [*FILES, *TESTS]:
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.stem != "utils", path
    for path in FILES:
        assert path.stem == "__init__" or ast.get_docstring(ast.parse(path.read_text())), f"{path}: no docstring"


def test_nothing_ignores_every_warning():
    for path in [*FILES, *TESTS, *PACKAGE.parent.glob("examples/**/*.py")]:
        assert not re.findall(r'(?:filterwarnings|simplefilter)\("ignore"\)', path.read_text()), path


def test_every_import_is_declared():
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    declared = {name.lower() for name in re.findall(r'^    "([A-Za-z0-9_-]+)>=', project, flags=re.MULTILINE)}
    extras = {"canvas": {"matplotlib"}, "demo_app": {"gradio"}}  # file -> what an extra of its own installs
    assert 'plot = ["matplotlib' in project
    names = {"PIL": "pillow", "ot": "pot", "sklearn": "scikit-learn", "yaml": "pyyaml"}
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
    project = re.sub(r"^docs = \[.*?^\]", "", (root / "pyproject.toml").read_text(), flags=re.DOTALL | re.MULTILINE)
    bounds = dict(re.findall(r'"([A-Za-z0-9_-]+)>=([\d.]+)"', project))
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (root / "constraints-oldest.txt").read_text(), flags=re.MULTILINE))
    tools = {"build", "gradio", "mypy", "resvg-py", "ruff", "setuptools"}
    assert {name: Version(pin) for name, pin in pins.items()} == {
        name: Version(bound) for name, bound in bounds.items() if name not in tools
    }


# What PEFT and Transformers' CLIP import is there already; whoever adds a method to PEFT pays for nothing more.
IMPORTS = """
import sys, peft
from transformers import CLIPModel, CLIPProcessor
before = set(sys.modules)
import peft_ncgeo.geometry  # and with it the package
print(*sorted(name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names))
"""


def test_importing_the_package_imports_nothing_but_itself():
    """Nor what needs more: `datasets`, POT, `evaluate`, matplotlib and Transformers' trainer come when first used."""
    command = [sys.executable, "-c", IMPORTS]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "peft_ncgeo.registration" in found
    assert not [name for name in found if not name.startswith("peft_ncgeo")]
    later = set(ALLOWED) - {"validation", "models", "geometry", "tuners", "registration", "__init__"}
    assert not later & {name.split(".")[1] for name in found if "." in name}
