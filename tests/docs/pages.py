"""The pages of the documentation, with what they include."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
INCLUDE = re.compile(r'^--8<-- "([\w./-]+)(?::(\w+))?"$', re.MULTILINE)

sys.path.append(str(DOCS / "making"))  # what makes the site


def name(page: Path) -> str:
    return str(page.relative_to(ROOT).with_suffix(""))


def text(page: Path) -> str:
    """As the site shows it: parts of other files stand where they are included."""
    return INCLUDE.sub(lambda found: _part(found[1], found[2]), page.read_text(encoding="utf-8"))


def _part(file: str, section: str | None) -> str:
    whole = (ROOT / file).read_text(encoding="utf-8")
    if section is None:
        return whole
    begin, end = (f"<!-- --8<-- [{edge}:{section}] -->" for edge in ("start", "end"))
    return whole[whole.index(begin) + len(begin) : whole.index(end)].strip()
