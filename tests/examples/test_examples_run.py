"""Every script of `examples/` does on less text what it does by default."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import jaxcompress as jc

FOLDER = Path(__file__).parents[2] / "examples"
LESS: dict[str, dict[str, Any]] = {
    "ask_long_file": dict(tokens=1500, slots=32, max_new_tokens=8),
    "chat": dict(),
    "distill": dict(slots=16, length=64, rows=2, steps=2, out=Path("distilled")),
    "new_policy": dict(slots=32, tokens=256),
    "retention_page": dict(slots=32, tokens=256, out=Path("page.html")),
    "shorten_prompt": dict(slots=32, characters=600, max_new_tokens=8),
}
SLOW = {"ask_long_file", "distill", "new_policy"}
SAYS = {  # patterns
    "ask_long_file": r"What is an assignment\?",
    "chat": r"> recall: current module ->\n default path",  # what it was told two messages before
    "distill": "/distilled",
    "new_policy": "Fading/protect-recent16",
    "retention_page": r"\nall +\d\d%",
    "shorten_prompt": "in all; recovered",
}


def test_all_are_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(LESS)


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LESS])
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / f"{name}.py"))["main"](**LESS[name])
    assert re.search(SAYS[name], capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} <= {"distilled", "page.html"}


@pytest.mark.parametrize(
    ("name", "flag"),
    [("ask_long_file", "file"), ("distill", "data"), ("retention_page", "file"), ("shorten_prompt", "file")],
)
def test_a_missing_file_is_told_before_the_model_is_loaded(
    name: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jc, "load_embedded", lambda: pytest.fail("the model was loaded first"))
    with pytest.raises(FileNotFoundError):
        runpy.run_path(str(FOLDER / f"{name}.py"))["main"](**{flag: tmp_path / "missing.txt"})
