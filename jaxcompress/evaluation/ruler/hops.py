"""Questions whose answer takes two documents, from a file of HotpotQA's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxcompress.inputs.text import parse_json, read_text


class Puzzle(NamedTuple):
    """A question over documents.

    Attributes:
      documents: those that hold the answer, and what the file gives beside them.
    """

    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


def read_puzzles(path: Path) -> tuple[Puzzle, ...]:
    """The questions of a file like hotpot_dev_distractor_v1.json: [{question, answer, context: [[title, [sentence]]]}].

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is of another form; the message names the entry.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there are no questions in {path.absolute()}; give the path of a file of HotpotQA's form, or leave it out "
            "and two-hop questions are made up"
        )
    entries = parse_json(read_text(path), str(path))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of questions")
    return tuple(_puzzle(entry, f"{path}, entry {number}") for number, entry in enumerate(entries))


def _puzzle(entry: Any, where: str) -> Puzzle:
    try:
        documents = tuple(f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"])
        return Puzzle(str(entry["question"]), (str(entry["answer"]),), documents)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} must be an object with question, answer and context, pairs of title and sentences ({error!r:.60})"
        ) from None
