"""The notebooks of the documentation as they are stored: run, clean, and with something to look at.

`make notebooks` runs them.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pages  # noqa: F401  adds docs/making to the path
import pytest

import notebook_pages  # isort: skip  in docs/making

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 500_000  # bytes


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_clean(path: Path) -> None:
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no picture: run .ci/notebooks.py --write"
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert all(cell["execution_count"] is None for cell in cells(path, "code"))
    assert path.stat().st_size < LARGEST
    assert str(FOLDER.parents[1]) not in path.read_text(encoding="utf-8"), "a path of this machine"
    for cell in cells(path, "code"):
        ast.parse("".join(cell["source"]))  # no magic words: it runs as a script, too


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", "".join(cell["source"])):
            assert (FOLDER / target).exists(), target


def test_the_site_shows_every_notebook_with_its_pictures() -> None:
    made = notebook_pages.pages()
    assert {Path(one.path).stem for one in made} == {path.stem for path in NOTEBOOKS}
    for one in made:
        assert one.text.startswith("# ")
        assert one.pictures
        for path, content in one.pictures.items():
            assert f"]({Path(path).name})" in one.text
            assert content.startswith(b"\x89PNG")
