"""The site is built from the pages and docstrings, without a warning."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_ncgeo import losses

from .pages import ROOT

TOOLS = Path(f"{sys.prefix}-docs")  # where `make docs` installs what makes the site


@pytest.mark.slow
@pytest.mark.skipif(not (TOOLS / "installed").exists(), reason="MkDocs is not installed; `make docs` installs it.")
def test_the_site_is_built_with_no_raw_references_and_fetches_nothing(tmp_path):
    command = [TOOLS / "bin" / "python", "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "quickstart.html", "methods/index.html", "api/losses.html"} <= pages.keys()
    for name, text in pages.items():
        shown = re.sub(r"<(code|pre|script)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert "[`" not in html.unescape(shown), name
        assert ".. math" not in shown, name
        assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?://", text), name
    page = pages["api/losses.html"]
    assert "<math" in page
    assert page.count('class="doc doc-object doc-class"') == len(losses.__all__)
