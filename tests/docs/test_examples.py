"""The Python of the README and of the documentation runs as it stands, block after block of a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS, PAGES, ROOT, name, text

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
FIRST = "docs/getting-started"
WITH_PYTHON = [page for page in PAGES if page.is_relative_to(DOCS) and BLOCK.search(text(page))]


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=name(page), marks=() if name(page) == FIRST else pytest.mark.slow) for page in WITH_PYTHON],
)
def test_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown, names = text(page), dict[str, Any](__name__=page.stem)
    for block in BLOCK.finditer(shown):
        above = shown[: block.start(1)].count("\n")  # so that an error names the line of the page
        exec(compile("\n" * above + block[1], str(page), "exec"), names)


def test_the_readme_has_no_python_of_its_own() -> None:
    """What it shows is part of a page that runs above."""
    blocks = BLOCK.findall(text(ROOT / "README.md"))
    assert blocks
    assert set(blocks) <= {block for page in WITH_PYTHON for block in BLOCK.findall(text(page))}
