"""Data for a classifier: nothing that was finished is lost, and what is labelled is what was kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxcompress.prompt.dataset import (
    Example,
    Pair,
    collect,
    label,
    read_examples,
    read_pairs,
    write_examples,
)
from jaxcompress.prompt.endpoint import Refused
from jaxcompress.prompt.surface import Word, spelled, words_of
from jaxcompress.prompt.teacher import TeacherFailed

DOCUMENTS = [(f"d{n}", f"The {n}th text. It has two sentences, and three.") for n in range(6)]


def drop(instruction: str, text: str) -> str:
    return " ".join(word for word in text.split() if word.lower() not in ("the", "it", "and"))


class Counting:
    """A teacher that fails where it is told to."""

    def __init__(self, fails: set[int] = frozenset(), error: type[Exception] = TeacherFailed):  # type: ignore[assignment]
        self.calls, self.fails, self.error = 0, fails, error
        self.lock = threading.Lock()

    def __call__(self, instruction: str, text: str) -> str:
        with self.lock:
            self.calls += 1
            number = self.calls
        if number in self.fails:
            raise self.error("not now")
        return drop(instruction, text)


def test_collects_each_piece_once(tmp_path: Path) -> None:
    path, teacher = tmp_path / "a/pairs.jsonl", Counting()
    told: list[int] = []
    done = collect(DOCUMENTS, teacher, path, progress=told.append)
    assert (done.done, done.asked, done.failed, sum(told)) == (6, 6, [], 6)
    assert read_pairs(path) == [Pair(name, 0, text, drop("", text)) for name, text in DOCUMENTS]
    again = collect(DOCUMENTS, teacher, path)
    assert (again.done, again.asked, teacher.calls) == (6, 0, 6)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("error", [TeacherFailed, RuntimeError])
def test_a_teacher_that_fails_loses_nothing(tmp_path: Path, workers: int, error: type[Exception]) -> None:
    path = tmp_path / "pairs.jsonl"
    first = collect(DOCUMENTS, Counting({2, 5}, error), path, workers=workers)
    assert (first.done, first.asked, len(first.failed)) == (4, 6, 2)
    assert all("not now" in why for _, _, why in first.failed)
    second = collect(DOCUMENTS, Counting(), path, workers=workers)
    assert (second.done, second.asked, second.failed) == (6, 2, [])
    assert sorted(read_pairs(path)) == [Pair(name, 0, text, drop("", text)) for name, text in DOCUMENTS]


@pytest.mark.parametrize(("error", "asked"), [(TeacherFailed, 3), (Refused, 1)])
def test_stops_asking_a_teacher_that_is_gone(tmp_path: Path, error: type[Exception], asked: int) -> None:
    teacher = Counting(set(range(1, 100)), error)
    done = collect(DOCUMENTS, teacher, tmp_path / "pairs.jsonl", patience=3)
    assert (done.done, done.asked, teacher.calls, len(done.failed)) == (0, asked, asked, 6)
    assert "not asked" in done.failed[-1][2]


def test_changed_text_and_instruction_are_asked_again(tmp_path: Path) -> None:
    path, teacher = tmp_path / "pairs.jsonl", Counting()
    collect([("d", "One text.")], teacher, path)
    collect([("d", "Another text.")], teacher, path)
    assert read_pairs(path) == [Pair("d", 0, "Another text.", "Another text.")]
    collect([("d", "Another text.")], teacher, path, instruction="Shorten!")
    assert teacher.calls == 3


def test_what_is_changed_back_is_asked_again(tmp_path: Path) -> None:
    path, teacher = tmp_path / "pairs.jsonl", Counting()
    for text in ("One two three.", "Four five six.", "One two three."):
        assert collect([("d", text)], teacher, path).asked == 1
        assert [pair.original for pair in read_pairs(path)] == [text]
    for instruction in ("Shorten!", "Shorten.", "Shorten!"):
        assert collect([("d", text)], teacher, path, instruction=instruction).asked == 1
    assert collect([("d", text)], teacher, path, instruction="Shorten!").asked == 0


def test_names_of_documents_are_their_own(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with pytest.raises(ValueError, match="two documents have the name 'd'"):
        collect([("d", "One text."), ("d", "Another text.")], drop, path)
    assert read_pairs(path) == [Pair("d", 0, "One text.", "One text.")]


def test_a_line_that_was_cut_off_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    collect(DOCUMENTS, drop, path)
    whole = path.read_bytes()
    for cut in (1, 20):
        path.write_bytes(whole[:-cut])
        done = collect(DOCUMENTS, drop, path)
        assert (done.done, done.asked) == (6, 1)
        assert path.read_bytes() == whole


def test_another_file_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    pair = b'{"document": "d", "piece": 0, "original": "On'
    for content in (b'{"document": "d", "text": "One."}', b"Some notes", b'{"text": "a"}\n' + pair):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="pair"):
            collect(DOCUMENTS, drop, path)
        assert path.read_bytes() == content


def test_pieces_that_a_document_has_no_more(tmp_path: Path) -> None:
    path, teacher = tmp_path / "pairs.jsonl", Counting()
    lines = lambda text: text.splitlines(keepends=True)
    long, short = "One.\nTwo.\nThree.\n", "One.\n \n"
    for text, pieces, calls in ((long, [0, 1, 2], 3), (short, [0], 3), (short, [0], 3), (long, [0, 1, 2], 5)):
        collect([("d", text), DOCUMENTS[0]], teacher, path, cut=lines)
        assert [pair.piece for pair in read_pairs(path) if pair.document == "d"] == pieces
        assert teacher.calls == calls + 1
    collect([DOCUMENTS[1]], teacher, path, cut=lines)
    assert len(read_pairs(path)) == 5  # of documents that were not given nothing goes


def test_kill_loses_at_most_the_piece_under_way(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    script = (
        "import os, signal, sys\n"
        "from jaxcompress.prompt.dataset import collect\n"
        "calls = 0\n"
        "def teacher(instruction, text):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return text\n"
        "collect([(f'd{n}', f'Text {n}.') for n in range(6)], teacher, sys.argv[1])\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=False)
    assert ran.returncode == -signal.SIGKILL
    assert [pair.document for pair in read_pairs(path)] == ["d0", "d1", "d2"]
    assert collect([(f"d{n}", f"Text {n}.") for n in range(6)], drop, path).asked == 3


def test_long_documents_are_cut_and_white_space_is_not_sent(tmp_path: Path) -> None:
    path, teacher = tmp_path / "pairs.jsonl", Counting()
    text = "One two three. " * 400
    done = collect([("long", text), ("blank", " \n ")], teacher, path)
    pairs = read_pairs(path)
    assert done.done == len(pairs) == teacher.calls > 1
    assert "".join(pair.original for pair in pairs).split() == text.split()


@pytest.mark.parametrize("line", ["{", "[]", '{"document": "a"}', '{"document": "a", "piece": 0, "original": 1}'])
def test_files_that_are_none(tmp_path: Path, line: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1"):
        read_pairs(path)
    with pytest.raises(ValueError, match="line 1"):
        read_examples(path)


def test_wrong_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        collect(DOCUMENTS, drop, tmp_path / "x", workers=0)


def test_labels_are_what_was_kept(tmp_path: Path) -> None:
    pairs = [
        Pair("a", 0, "The council will vote, on Monday.", "council votes Monday."),
        Pair("a", 1, " \n", ""),
        Pair("b", 0, "One two three four.", "something else altogether here"),
    ]
    examples, report = label(pairs)
    (example,) = examples
    assert (report.pairs, report.empty, report.unfaithful) == (3, 1, 1)
    kept = [word for word, keep in zip(spelled(example.text), example.labels, strict=True) if keep]
    assert kept == ["council", "vote", "Monday", "."]
    assert report.kept_share == pytest.approx(0.5)
    write_examples(examples, tmp_path / "examples.jsonl")
    assert read_examples(tmp_path / "examples.jsonl") == examples
    assert label([]) == ([], report._replace(pairs=0, empty=0, unfaithful=0, kept_share=0.0))


@pytest.mark.parametrize(
    "change",
    [dict(labels=[1]), dict(words=[[0, 3], [2, 5]]), dict(words=[[0, 3], [4, 99]]), dict(words=[[0, 0], [4, 8]])],
)
def test_examples_that_do_not_fit_their_text(tmp_path: Path, change: dict) -> None:
    line = dict(text="The text", words=[[0, 3], [4, 8]], labels=[0, 1])
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | change) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_examples(path)


def test_example_of_words() -> None:
    assert words_of("The text") == [Word(0, 3), Word(4, 8)]
    assert Example("The text", words_of("The text"), [False, True]).labels == [False, True]
