"""The Python of the README and of the documentation runs as it stands, block after block of a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(page.read_text())]


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(encoding="utf-8"), dict[str, Any](__name__=page.stem)
    for block in BLOCK.finditer(text):
        above = text[: block.start(1)].count("\n")  # so that an error names the line of the page
        exec(compile("\n" * above + block[1], str(page), "exec"), names)
