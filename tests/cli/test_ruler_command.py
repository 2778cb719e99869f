"""`jaxcompress ruler` and `jaxcompress board`: a sweep that goes on, exit codes, and what is said of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_chat import chat_folder

from jaxcompress.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(chat_folder(tmp_path_factory.mktemp("ruler_cli")))


def test_a_sweep_and_its_board(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One cell cannot be measured: the others are, and the next run tries only that one."""
    out = tmp_path / "rows.jsonl"
    ruler = ["ruler", "--model", model, "--tasks", "vt", "--lengths", "1700", "--fractions", "4", "--samples", "1",
             "--question", "unknown", "--policies", "full", "tova/once64", "--out", str(out)]  # fmt: skip
    assert main(ruler) == 4
    told = capsys.readouterr()
    assert "vt, tova/once64, 361 slots, seed 0: once(tova/once64)" in told.err
    assert "1 of 2 cells failed" in told.err
    before = out.read_bytes()
    assert json.loads(before)["policy"] == "full"
    assert main(ruler) == 4
    assert "1 cells were in" in capsys.readouterr().err
    assert out.read_bytes() == before
    page, figure, folder = tmp_path / "board.html", tmp_path / "board.svg", tmp_path / "kvpress"
    board = ["board", "--rows", str(out), "--page", str(page), "--figure", str(figure), "--kvpress", str(folder)]
    assert main(board) == 0
    assert "ruler, vt: string match %" in capsys.readouterr().out
    assert page.exists()
    assert figure.exists()
    assert (next(folder.iterdir()) / "predictions.csv").exists()
    assert main([*board[:3], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["policy"] == "full"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("ruler", "--haystack", "none.txt"), "none.txt; give UTF-8 files, or folders with .txt files"),
        (("ruler", "--tasks", "niah"), "unknown task 'niah' in --tasks; known: niah_single_1"),
        (("ruler", "--lengths", "200"), "--lengths must be at least 264"),
        (("ruler", "--samples", "0"), "--samples must be at least 1"),
        (("ruler", "--puzzles", "none.json"), "none.json; give the path of a file of HotpotQA's form"),
        (("board", "--rows", "none.jsonl"), "there are no results in"),
        (("board", "--rows", "broken.jsonl"), "broken.jsonl, line 2 is not JSON"),
        (("board", "--rows", "empty.jsonl"), "there are no rows in empty.jsonl"),
    ],
)
def test_bad_input_is_told_in_a_line(
    words: tuple[str, ...], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("broken.jsonl").write_text("\n{\n")
    Path("empty.jsonl").write_text("")
    assert main(list(words)) == 2
    told = capsys.readouterr().err
    assert why in told
    assert told.count("\n") == 1
