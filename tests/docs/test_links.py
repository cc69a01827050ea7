"""Links of README and docs lead to files and headings that exist; every page is reached."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from .pages import PAGES, README, ROOT, anchors, links, name

EXAMPLES = ROOT / "examples" / "README.md"
CHANGES = ROOT / "CHANGELOG.md"


def leads(page: Path, link: str) -> bool:
    """Return True for a link to a file, to a heading that is there, or to an address, which is not fetched."""
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    whole = re.match(r"https?://[\w.-]+\.\w+(/|$)", link)
    return bool(whole) or (target.exists() and (not anchor or anchor in anchors(target)))


def test_links_lead_to_files_and_headings():
    pages = [*PAGES, EXAMPLES, CHANGES, ROOT / "CONTRIBUTING.md"]
    assert not [(name(page), link) for page in pages for link in links(page) if not leads(page, link)]
    assert not leads(README, "docs/missing.md")
    assert not leads(README, "docs/index.md#no-such-heading")


def test_every_page_is_reached_from_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        places = {posixpath.normpath(f"{page.parent}/{link.partition('#')[0]}") for link in links(page)}
        waiting += [other for other in [*PAGES, EXAMPLES] if str(other) in places]
    written = {page for page in PAGES if page.parent.name == "results"}  # by scripts; the site lists them
    assert set(PAGES) - written <= reached


def test_pages_stand_in_the_navigation_once():
    """Those of a folder that stands there with its name are listed by the site's hook."""
    listed = re.findall(
        r"^ +- (?:[\w ]+: )?([\w/]+(?:\.md|/))$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE
    )
    for page in PAGES[1:]:
        path = name(page).removeprefix("docs/")
        assert sum(path == entry or (entry.endswith("/") and path.startswith(entry)) for entry in listed) == 1, path


def test_papers_list_every_recipe_and_paper():
    """Recipes for the demo are those of the papers with other numbers."""
    page = (ROOT / "docs" / "papers.md").read_text()
    recipes = ROOT / "examples" / "recipes"
    for path in (*recipes.glob("*.yaml"), *(recipes / "images").glob("*.yaml")):
        assert f"({posixpath.relpath(path, ROOT / 'docs')})" in page, path
    methods = re.findall(r"^#### (.*)$", EXAMPLES.read_text(), flags=re.MULTILINE)
    for method in set(methods):
        assert f"#{re.sub(r'[^a-z0-9 ]', '', method.lower().replace('-', ' ')).replace(' ', '-')})" in page, method
