"""README and the pages of docs: their blocks of code, links, headings and tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:^<!-- not run: (.*?) -->\n+)?^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code: its page, language, code, and the reason why it is not run, if there is one."""

    page: str
    language: str
    code: str
    not_run: str | None

    @property
    def name(self) -> str:
        return f"{self.page}: {self.code.strip().splitlines()[0]}"


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """Return the blocks of a page in their order."""
    found = [Block(name(page), lang, code, reason or None) for reason, lang, code in FENCE.findall(page.read_text())]
    return [block for block in found if language in (None, block.language)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """Return a page without its blocks."""
    return FENCE.sub("", page.read_text())


def links(page: Path) -> set[str]:
    return set(re.findall(r"\]\(([^)\s]+)\)", prose(page)))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table(mark: str) -> str:
    """Return the text between the marks of a table, on the one page that has them."""
    start, end = f"<!-- {mark} table -->\n", f"<!-- end of {mark} table -->"
    (text,) = [text for text in (page.read_text() for page in PAGES) if start in text]
    return text.split(start)[1].split(end)[0]
