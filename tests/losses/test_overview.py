"""The overview of losses names them all, and says of each whether it reads labels."""

from __future__ import annotations

import re
from pathlib import Path

import peft_ncgeo.losses as losses
from peft_ncgeo.losses import CrossEntropy, Regularizer

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "README.md"


def test_every_loss_stands_in_the_overview():
    rows = dict(re.findall(r"^\| `(\w+)` \| (yes|no)\b", PAGE.read_text(), flags=re.MULTILINE))
    named = {name: getattr(losses, name) for name in losses.__all__}
    terms = {
        name: kind
        for name, kind in named.items()
        if isinstance(kind, type) and issubclass(kind, Regularizer | CrossEntropy) and kind is not Regularizer
    }
    assert rows.keys() == terms.keys()
    for name, kind in terms.items():
        assert rows[name] == ("yes" if getattr(kind, "reads_labels", True) else "no"), name


def test_links_lead_to_files():
    for page in PAGE.parent.glob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), (page.name, target)
