"""`jaxcompress ruler` and `jaxcompress board`: a sweep that goes on, exit codes, and what is said of bad input."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_chat import chat_folder

from jaxcompress.cli import main
from jaxcompress.cli.ruler import IN_TEXT
from jaxcompress.cli.runtime import line_of
from jaxcompress.evaluation.provenance import Provenance
from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.evaluation.ruler.hops import Puzzle
from jaxcompress.evaluation.ruler.sample import Sources
from jaxcompress.evaluation.ruler.tasks import TASKS
from jaxcompress.evaluation.sweep import Row as SweptRow

PUZZLE = dict(question="a?", answer="a", context=[["a", ["b"]]])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(chat_folder(tmp_path_factory.mktemp("ruler_cli")))


@pytest.mark.slow
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
        (("ruler", "--policies", "full", "--fractions", "4"), "--fractions does nothing for full"),
        (("ruler", "--puzzles", "x.json", "--tasks", "vt"), "--puzzles is for the task qa_2, which is not among vt"),
        (
            ("ruler", "--haystack", "broken.jsonl", "--tasks", "vt", "niah_single_1"),
            "--haystack does nothing for vt, niah_single_1; it is for niah_single_2",
        ),
        (
            ("ruler", "--haystack", "broken.jsonl", "--tasks", "qa_2", "--puzzles", "two.json"),
            "--haystack does nothing for qa_2; it is for niah_single_2",
        ),
        (
            ("ruler", "--tasks", "cwe", "--lengths", "400", "--fractions", "2", "--policies", "tova"),
            "cwe does not fit into 400 tokens",
        ),
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
    Path("two.json").write_text(json.dumps([PUZZLE, PUZZLE]))
    assert main(list(words)) == 2
    told = capsys.readouterr().err
    assert why in told
    assert told.count("\n") == 1


def test_the_haystack_is_read_by_the_tasks_that_are_told_so() -> None:
    """Two puzzles give qa_2 its documents; without them it takes those of the text."""
    puzzles = tuple(Puzzle("a?", ("a",), (f"a {n}", f"b {n}")) for n in range(2))
    text = "\n\n".join(" ".join(f"{word}{n}" for n in range(30)) + "." for word in ("one", "two"))
    made = lambda task, text, puzzles: TASKS[task].make(40, random.Random(0), Sources(text, 1024, puzzles)).context
    reads = lambda task, puzzles=(): made(task, text, puzzles) != made(task, text.upper(), puzzles)
    assert {task for task in TASKS if reads(task)} == {*IN_TEXT, "qa_2"}
    assert not reads("qa_2", puzzles)
    assert reads("qa_2", puzzles[:1])


def test_a_row_of_another_version_is_told() -> None:
    """Not a fault to be reported: the file and the row are named."""
    cell = Cell(
        experiment="perplexity",
        task="t",
        model="m",
        model_hash="0f",
        policy="tova",
        slots=64,
        context=64,
        dtype="float32",
    )
    figure = Figure(metric="nats per token", value=1.0, tokens=1, samples=1, state_bytes=1)
    made = Provenance(version="0.1.0", code="abc", device="cpu", command="jaxcompress")
    for details in (None, {"policy": "tova"}, {"else": 1}):
        row = Row(cell, replace(figure, details=details), made, "")
        with pytest.raises(ValueError, match=r"rows\.jsonl: the row of tova with 64 slots is of another version"):
            line_of(SweptRow, row, Path("rows.jsonl"))
