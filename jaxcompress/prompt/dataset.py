"""Makes training data for a token classifier: texts -> a teacher's compressions -> labelled words.

    collect(documents, teacher, "pairs.jsonl")              # may be stopped at any moment and started again
    examples, report = label(read_pairs("pairs.jsonl"))
    write_examples(examples, "examples.jsonl")

Both files are JSON lines. A pair counts as done when it is on disk, so neither a failing teacher nor `kill -9` loses a
finished pair.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import regex

from jaxcompress.inputs.text import clean, json_lines
from jaxcompress.inputs.whole_file import whole_file
from jaxcompress.prompt.annotation import WINDOW, annotate, faithful, rough_lemma
from jaxcompress.prompt.endpoint import Refused
from jaxcompress.prompt.surface import Word, spelled, words_of
from jaxcompress.prompt.teacher import INSTRUCTION, Teacher, TeacherFailed, cut_for_teacher

_LINE = regex.compile(rb'\{"document": "(?:[^"\\]|\\.)*", "piece": \d+, "original": ".*', regex.DOTALL)


class Pair(NamedTuple):
    """A piece of a document and its compression.

    Attributes:
      document: its name.
      piece: which piece of it, from 0.
    """

    document: str
    piece: int
    original: str
    compressed: str


class Collected(NamedTuple):
    """What a call of `collect` did.

    Attributes:
      done: how many pieces of these documents the file has now.
      asked: how many pieces were sent to the teacher in this call.
      failed: (document, piece, why) of the pieces that are still missing.
    """

    done: int
    asked: int
    failed: list[tuple[str, int, str]]


def collect(
    documents: Iterable[tuple[str, str]],
    teacher: Teacher,
    path: str | Path,
    *,
    instruction: str = INSTRUCTION,
    cut: Callable[[str], Sequence[str]] = cut_for_teacher,
    workers: int = 1,
    patience: int = 5,
    progress: Callable[[int], None] = lambda pieces: None,
) -> Collected:
    """Has a teacher shorten the pieces of documents that the file does not have yet, and appends them to it.

    A piece is identified by document, number, text and instruction, so a changed text is shortened again, also one that
    is changed back: the last pair of a piece counts. If the teacher fails, the piece is left for the next call. After
    `patience` failures in a row, or a refusal, all further pieces are left. A piece of white space is not sent. Pieces
    that a document has no more are taken back at the end, by lines without a text.

    Args:
      documents: (name, text) each.
      path: JSON lines; created if missing. A last line that was cut off is removed.
      cut: cuts a text into pieces for the teacher.
      workers: requests at the same time. With several, the teacher must be safe to call from several threads.
      patience: failures in a row before no further piece is sent.
      progress: called with the number of pieces done, each time some are.

    Raises:
      ValueError: workers or patience is less than 1, or a line of the file is not a pair, or two documents have one
        name; names it.
      OSError: the file cannot be written.
    """
    if workers < 1 or patience < 1:
        raise ValueError(f"workers and patience are at least 1, not {workers} and {patience}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    known = _known(path)
    seal = zlib.crc32(instruction.encode())
    done, asked, failed = 0, 0, []
    names: set[str] = set()
    there: set[tuple[str, int]] = set()

    def missing() -> Iterator[Pair]:
        nonlocal done
        for name, text in documents:
            if (name := clean(str(name))) in names:
                raise ValueError(f"two documents have the name {name!r}; give each its own")
            names.add(name)
            for number, piece in enumerate(cut(clean(text))):
                if not piece.strip():
                    continue
                there.add((name, number))
                pair = Pair(name, number, piece, "")
                if _seal(pair, seal) != known.get((name, number)):
                    yield pair
                else:
                    done += 1
                    progress(1)

    shorten = partial(teacher, instruction)
    with open(path, "ab") as file, closing(_replies(missing(), shorten, workers, patience)) as replies:
        for reply in replies:
            asked += reply.sent
            if reply.why is not None:
                failed.append((reply.pair.document, reply.pair.piece, reply.why))
                continue
            _append(file, reply.pair, seal)
            done += 1
            progress(1)
        for name, number in known.keys() - there:
            if name in names and known[name, number] is not None:
                _append(file, Pair(name, number, "", ""), seal)
    return Collected(done, asked, sorted(failed))


class _Reply(NamedTuple):
    """A pair with the teacher's compression; without one, `why`. `sent`: whether the teacher was asked."""

    pair: Pair
    why: str | None
    sent: bool = True


def _replies(
    pairs: Iterator[Pair], shorten: Callable[[str], str], workers: int, patience: int
) -> Generator[_Reply, None, None]:
    """Asks about several pairs at a time; about none any more after a refusal or `patience` failures in a row."""
    in_a_row, refused = 0, None
    running: dict[Future[str], Pair] = {}
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(running) < workers and (pair := next(pairs, None)) is not None:
                if refused is None:
                    running[pool.submit(shorten, pair.original)] = pair
                else:
                    yield _Reply(pair, refused, sent=False)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                pair, error = running.pop(future), future.exception()
                if error is None:
                    in_a_row = 0
                    yield _Reply(pair._replace(compressed=clean(future.result())), None)
                    continue
                if not isinstance(error, Exception):  # KeyboardInterrupt and the like
                    raise error
                in_a_row += 1
                why = str(error) if isinstance(error, TeacherFailed) else f"{type(error).__name__}: {error}"
                if isinstance(error, Refused) or in_a_row >= patience:
                    refused = f"not asked, because the teacher failed {in_a_row} times in a row: {why}"
                yield _Reply(pair, why)


def _known(path: Path) -> dict[tuple[str, int], tuple[int, int] | None]:
    """The text and instruction of the last pair of each piece that the file has; None where it was taken back."""
    pairs = _read(path) if path.exists() else ()
    return {(pair.document, pair.piece): _seal(pair, seal) if pair.original else None for pair, seal in pairs}


def _seal(pair: Pair, seal: int) -> tuple[int, int]:
    return zlib.crc32(pair.original.encode()), seal


def _append(file: Any, pair: Pair, seal: int) -> None:
    """Writes one line in one write; it is on disk when this returns."""
    file.write(json.dumps({**pair._asdict(), "instruction": seal}, ensure_ascii=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _mend(path: Path) -> None:
    """Removes a last line without an end, which a killed writer left.

    Raises:
      ValueError: the file has other lines than those of `_append`; nothing is removed.
    """
    if not path.exists():
        return
    with open(path, "r+b") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole == len(data):
            return
        if not _LINE.fullmatch(data[whole:], partial=True):
            raise ValueError(f"{path}: the last line is no pair, and has no end; give a file of pairs, or a new one")
        if whole:
            next(_read(path), None)
        file.truncate(whole)


def _read(path: str | Path) -> Iterator[tuple[Pair, int]]:
    for _, where, value in json_lines(path):
        try:
            pair = Pair(str(value["document"]), int(value["piece"]), value["original"], value["compressed"])
            if not isinstance(pair.original, str) or not isinstance(pair.compressed, str):
                raise TypeError("original and compressed must be texts")
            seal = int(value.get("instruction", 0))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: not a pair with document, piece, original and compressed ({error})") from None
        yield pair, seal


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a file, by document (in the order of the file) and piece; of two pairs of one piece, the later.

    A pair without a text takes those of its piece back that are before it.

    Raises:
      ValueError: a line is not a pair; names file and line.
    """
    order: dict[str, int] = {}
    pairs: dict[tuple[int, int], Pair] = {}
    for pair, _ in _read(path):
        pairs[order.setdefault(pair.document, len(order)), pair.piece] = pair
    return [pairs[key] for key in sorted(pairs) if pairs[key].original]


class Example(NamedTuple):
    """A text whose words are labelled.

    Attributes:
      words: start and end of each in the text.
      labels: one per word, True: kept.
    """

    text: str
    words: list[Word]
    labels: list[bool]


class Report(NamedTuple):
    """What `label` did with the pairs.

    Attributes:
      pairs: how many were given.
      empty: how many of them have no words.
      unfaithful: how many `faithful` left out.
      kept_share: share of words labelled as kept, in the examples.
      variation_rate, alignment_gap: means over the examples.
    """

    pairs: int
    empty: int
    unfaithful: int
    kept_share: float
    variation_rate: float
    alignment_gap: float


def label(
    pairs: Iterable[Pair],
    *,
    window: int = WINDOW,
    key: Callable[[str], str] = rough_lemma,
    variation: float = 95.0,
    gap: float = 90.0,
) -> tuple[list[Example], Report]:
    """Labels the words of each text by its compression, and leaves out pairs that are not faithful enough.

    Words are those of the text as it is written, commas included, as the classifier will see them. (The authors train
    on lemmas without commas.)

    Args:
      window, key: see `annotate`.
      variation, gap: see `faithful`.
    """
    given = list(pairs)
    texts = [(pair, words) for pair in given if (words := words_of(pair.original))]
    annotations = [
        annotate(spelled(pair.original, words), spelled(pair.compressed), window=window, key=key)
        for pair, words in texts
    ]  # fmt: skip
    good = faithful(annotations, variation=variation, gap=gap)
    examples = [Example(texts[i][0].original, texts[i][1], annotations[i].labels) for i in good]
    mean = lambda values: sum(values) / len(values) if values else 0.0
    report = Report(
        len(given), len(given) - len(texts), len(texts) - len(good),
        kept_share=mean([label for example in examples for label in example.labels]),
        variation_rate=mean([annotations[i].variation_rate for i in good]),
        alignment_gap=mean([annotations[i].alignment_gap for i in good]),
    )  # fmt: skip
    return examples, report


def write_examples(examples: Iterable[Example], path: str | Path) -> None:
    """Writes JSON lines with text, words ([start, end] each) and labels (0 or 1); the file appears when complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, open(part, "w", encoding="utf-8") as file:
        for text, words, labels in examples:
            line = dict(text=text, words=[list(word) for word in words], labels=list(map(int, labels)))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_examples(path: str | Path) -> list[Example]:
    """Reads a file of `write_examples`.

    Raises:
      ValueError: a line is not an example; names file and line and says why.
    """
    examples = []
    for _, where, value in json_lines(path):
        try:
            words = [Word(int(start), int(end)) for start, end in value["words"]]
            example = Example(value["text"], words, [bool(label) for label in value["labels"]])
            _check(example)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: not an example with text, words and labels ({error})") from None
        examples.append(example)
    return examples


def _check(example: Example) -> None:
    text, words, labels = example
    if not isinstance(text, str):
        raise TypeError("the text is not a string")
    if len(words) != len(labels):
        raise ValueError(f"{len(words)} words, {len(labels)} labels")
    ends = [0, *(place for word in words for place in word), len(text)]
    if ends != sorted(ends) or any(start == end for start, end in words):
        raise ValueError("words do not follow each other inside the text")
