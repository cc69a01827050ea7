"""Links of README and docs lead to files and headings that exist; every page is reached."""

from __future__ import annotations

import posixpath
import re

import pytest

from .pages import PAGES, README, ROOT, anchors, links, name

EXAMPLES = ROOT / "examples" / "README.md"
CHANGES = ROOT / "CHANGELOG.md"


@pytest.mark.parametrize("page", [*PAGES, EXAMPLES, CHANGES], ids=name)
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        if re.match(r"https?://[\w.-]+\.\w+(/|$)", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_reached_from_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        places = {posixpath.normpath(f"{page.parent}/{link.partition('#')[0]}") for link in links(page)}
        waiting += [other for other in [*PAGES, EXAMPLES] if str(other) in places]
    assert set(PAGES) <= reached


def test_pages_stand_in_the_navigation_once():
    """Those of a folder that stands there with its name are listed by the site's hook."""
    listed = re.findall(r"^ +- (?:[\w ]+: )?([\w/]+(?:\.md|/))$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    for page in PAGES[1:]:
        path = name(page).removeprefix("docs/")
        assert sum(path == entry or (entry.endswith("/") and path.startswith(entry)) for entry in listed) == 1, path
