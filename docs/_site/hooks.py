"""Hook of MkDocs: pages and figures from outside `docs/`, API pages, and links that lead out of the site.

Links in the pages are those of the repository, so that they work in a viewer of files too. In the site, a link to a
file that has no page there becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from ast import literal_eval
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# file of the repository -> page of the site
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "README.md": "index.md",
}
API = (
    "peft_ncgeo",
    "peft_ncgeo.data",
    "peft_ncgeo.models",
    "peft_ncgeo.tuners",
    "peft_ncgeo.losses",
    "peft_ncgeo.geometry",
    "peft_ncgeo.training",
    "peft_ncgeo.few_shot",
    "peft_ncgeo.evaluation",
    "peft_ncgeo.metrics",
    "peft_ncgeo.reports",
    "peft_ncgeo.plots",
    "peft_ncgeo.hub",
    "peft_ncgeo.protocols",
)
INHERITING = ("peft_ncgeo", "peft_ncgeo.evaluation", "peft_ncgeo.training")  # classifiers share their methods
FIGURES = "examples/results/"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```)", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside, the figures, and an API page for each package."""
    for source, page in PAGES.items():
        if (ROOT / source).exists() and page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for figure in (ROOT / FIGURES).glob("*.png"):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    for name, content in api_pages().items():
        files.append(File.generated(config, name, content=content))
    config.nav = [expand(entry, files) for entry in config.nav if not missing(entry, files)]
    return files


def missing(entry: Any, files: Files) -> bool:
    """Return True for a page from outside that this checkout lacks."""
    return entry in PAGES.values() and files.get_file_from_path(entry) is None


def expand(entry: Any, files: Files) -> Any:
    """Return an entry of the navigation with each folder replaced by its pages, its own page first."""
    if not isinstance(entry, dict):
        return entry
    ((title, value),) = entry.items()
    if isinstance(value, str) and value.endswith("/"):
        pages = sorted(file.src_uri for file in files.documentation_pages() if file.src_uri.startswith(value))
        value = sorted(pages, key=lambda page: posixpath.basename(page) not in ("README.md", "index.md"))
    return {title: value}


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrite the links of a page to those of the site; keep numbers in one line, and tables that are folded."""
    target = page.file.src_uri
    source = next((path for path, name in PAGES.items() if name == target != "index.md"), f"docs/{target}")
    parts = FENCE.split(markdown)  # every second one is a block of code
    parts[::2] = [LINK.sub(lambda found: link(found, source, target), part) for part in parts[::2]]
    parts[::2] = [
        part.replace(" ± ", "\u00a0±\u00a0").replace("<details>", "<details markdown>") for part in parts[::2]
    ]
    return "".join(parts)


def link(found: re.Match[str], source: str, page: str) -> str:
    """Return a link of the repository as the site has it."""
    mark, text, href = found.groups()
    path, _, anchor = href.partition("#")
    if re.match(r"[a-z]+:", href) or not path:
        return found[0]
    place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if place in PAGES:
        name = PAGES[place]
    elif place.startswith("docs/"):
        name = place.removeprefix("docs/")
    elif place.startswith(FIGURES) and place.endswith(".png"):
        name = f"figures/{posixpath.basename(place)}"
    else:
        return text
    relative = posixpath.relpath(name, posixpath.dirname(page) or ".")
    return f"{mark}[{text}]({relative}{'#' + anchor if anchor else ''})"


def api_pages() -> dict[str, str]:
    """Return a page for each package: its public names, each with its docstring once, where it comes first."""
    root = griffe.load("peft_ncgeo", search_paths=[ROOT])
    overview = "# API reference\n\nMade from the docstrings.\n\n| package | holds |\n|---|---|\n"
    pages: dict[str, str] = {}
    shown: dict[str, str] = {}  # object -> page
    for package in API:
        module = root if package == "peft_ncgeo" else root[package.partition(".")[2]]
        title = module.name
        says = module.docstring.value.splitlines()[0]
        overview += f"| [`{package}`]({title}.md) | {says} |\n"
        entries, others = [], []
        for public in sorted(map(str, module.exports), key=str.lower):
            real = definition(root, module, public)
            if "hub_metrics" in real:  # loaded by path, by `evaluate`
                continue
            if real in shown:
                others.append(f"[`{public}`]({shown[real]}.md#{real})")
                continue
            shown[real] = title
            inherited = str(package in INHERITING).lower()
            entries.append(
                f"[](){{#{package}.{public}}}\n\n::: {real}\n    options:\n      inherited_members: {inherited}\n"
            )
        also = [f"Also here: {', '.join(others)}.\n"] if others else []
        pages[f"api/{title}.md"] = "\n".join([f"# {package}\n", f"{says}\n", *also, *entries])
    return {"api/index.md": overview, **pages}


def definition(root: griffe.Object, module: griffe.Object, name: str) -> str:
    """Return the path of the object that a package hands on under a public name, now or on first use."""
    while True:
        lazy = module.members.get("_LAZY")
        source = literal_eval(str(lazy.value)).get(name) if lazy else None
        if source is None:
            member = module[name]
            if not member.is_alias:
                return member.path
            source_path, _, name = member.target_path.rpartition(".")
        else:
            dots = len(source) - len(source.lstrip("."))
            source_path = ".".join(
                [*module.path.split(".")[: len(module.path.split(".")) + 1 - dots], source.lstrip(".")]
            )
        if "hub_metrics" in source_path and source_path.count(".") > 2:
            return f"{source_path}.{name}"
        module = root[source_path.partition(".")[2]] if "." in source_path else root
