"""How a teacher shortens: chunk by chunk or at once, by which instruction, and what the filters leave (LLMLingua-2, 3).

    python experiments/teacher_tables.py --model smollm2 --texts books/ --out rows.jsonl
    python experiments/teacher_tables.py --endpoint http://localhost:8000/v1 --teacher NAME --texts books/ --out ...
    python experiments/teacher_tables.py --out rows.jsonl --table table.md     # only draws what the file holds

The paper's ablations are of its data: GPT-4 is told to delete words, of pieces of at most 512 tokens, and the pairs of
the worst variation rate and alignment gap are left out. Figures near the paper's need a teacher that follows
instructions, behind an endpoint; a small local model shows only that the measurement works, and how it strays. A cell
is one instruction and size of the pieces, over the same pieces of text.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from command import arguments, stop
from paper_tables import OfBooks, Plan, markdown, of_experiment, of_texts, run

from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.policies import Full
from jaxcompress.prompt.annotation import Annotation, annotate, faithful
from jaxcompress.prompt.endpoint import Endpoint, Refused
from jaxcompress.prompt.surface import words_of
from jaxcompress.prompt.teacher import INSTRUCTION, Teacher, cut_for_teacher, model_teacher

EXPERIMENT = "teacher_tables"
RATE, VARIATION, GAP = "words kept, %", "variation rate, %", "alignment gap, %"
LEFT, AFTER_VARIATION, AFTER_GAP = "pairs after the filters, %", "variation after, %", "gap after, %"
FAILED = "pieces without an answer, %"
INSTRUCTIONS = {
    "five restrictions": INSTRUCTION,
    "short": "Compress the given text into short expressions, so that you can reconstruct it.",
}
"""Ours in place of the paper's, and one sentence, as earlier work asks."""


@dataclass(frozen=True, kw_only=True)
class Arguments(OfBooks):
    """Adds rows to the file for each instruction and size, and prints the table."""

    endpoint: str | None = None
    """A server that speaks OpenAI's chat completions, such as http://localhost:8000/v1, in place of --model."""
    teacher: str = ""
    """The model's name on that server. Its key is read from OPENAI_API_KEY."""
    instructions: tuple[str, ...] = tuple(INSTRUCTIONS)
    pieces: tuple[int, ...] = (64, 256, 1024)
    """Words of a piece, at most."""
    words: int = 1024
    """Words of each text that are shortened."""
    rows: int = 4
    """Texts."""
    answer: int = 1024
    """Tokens of an answer, at most."""


QUICK = Arguments(quick=True, instructions=("short",), pieces=(16,), words=32, rows=1, answer=16)


def teacher_of(args: Arguments) -> tuple[Teacher, Any]:
    """The teacher, and the local model if it is one."""
    if args.endpoint is not None:
        if not args.teacher:
            stop("--endpoint needs the model's name on the server: give it as --teacher")
        return Endpoint(args.endpoint, args.teacher), None
    loaded = args.load()
    room = 4 * max(args.pieces) + args.answer + 512
    return model_teacher(loaded.model, loaded.tokenizer, Full(), room, max_new_tokens=args.answer), loaded


def texts_of(args: Arguments) -> list[str]:
    """The beginnings of books."""
    found = []
    for _, text in args.books():
        words = words_of(text)[: args.words]
        found.append(text[words[0].start : words[-1].end])
        if len(found) == args.rows:
            break
    return found


def plan(args: Arguments) -> Plan:
    if unknown := [name for name in args.instructions if name not in INSTRUCTIONS]:
        stop(f"unknown instruction {unknown[0]!r}; known: {', '.join(INSTRUCTIONS)}")
    teacher, loaded = teacher_of(args)
    texts = texts_of(args)
    facts: dict[str, Any] = dict(model=args.teacher, model_hash=f"{args.endpoint} {args.teacher}", dtype="its own")
    if loaded is not None:
        cell = args.cells_of(EXPERIMENT, loaded.model, args.words)(task="", policy="", slots=0)
        facts = dict(model=cell.model, model_hash=cell.model_hash, dtype=cell.dtype)
    cells = (
        Cell(experiment=EXPERIMENT, task="books", policy=name, slots=size, context=args.words,
             settings=dict(rows=args.rows, answer=args.answer), **facts)
        for name in args.instructions
        for size in args.pieces
    )  # fmt: skip

    def figures(cell: Cell) -> Iterator[Figure]:
        assert isinstance(cell.slots, int)
        pieces = [piece for text in texts for piece in cut_for_teacher(text, limit=cell.slots) if piece.strip()]
        found = [one for piece in pieces if (one := shortened(teacher, INSTRUCTIONS[cell.policy], piece)) is not None]
        mine: dict[str, Any] = dict(samples=len(pieces), tokens=args.words * len(texts), state_bytes=0)
        yield Figure(metric=FAILED, value=100 * (1 - len(found) / len(pieces)), lower_is_better=True, **mine)
        if not found:
            return
        mean = lambda some, name: 100 * statistics.mean(getattr(one, name) for one in some)
        yield Figure(metric=RATE, value=mean(found, "compression_rate"), **mine)
        yield Figure(metric=VARIATION, value=mean(found, "variation_rate"), lower_is_better=True, **mine)
        yield Figure(metric=GAP, value=mean(found, "alignment_gap"), lower_is_better=True, **mine)
        left = [found[at] for at in faithful(found)]
        yield Figure(metric=LEFT, value=100 * len(left) / len(found), **mine)
        if left:
            yield Figure(metric=AFTER_VARIATION, value=mean(left, "variation_rate"), lower_is_better=True, **mine)
            yield Figure(metric=AFTER_GAP, value=mean(left, "alignment_gap"), lower_is_better=True, **mine)

    return of_texts(args, cells, figures, lambda cell: repr(texts))


def shortened(teacher: Teacher, instruction: str, piece: str) -> Annotation | None:
    """How a piece was shortened; None if the teacher gave no usable answer. Raises Refused if it never will."""
    try:
        answer = teacher(instruction, piece)
    except Refused:
        raise
    except Exception:  # whatever a teacher raises, it gave no answer
        return None
    spelled = lambda text: [text[word.start : word.end] for word in words_of(text)]
    return annotate(spelled(piece), spelled(answer))


def line(row: Row) -> str:
    return f"{row.cell.policy:20} {row.cell.slots!s:>6} {row.figure.metric:30} {row.figure.value:9.2f}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: a line for each instruction and size of the pieces."""
    rows = of_experiment(rows, EXPERIMENT)
    lines: dict[tuple[str, str, Any], dict[str, Figure]] = {}
    for row in rows:
        lines.setdefault((row.cell.model, row.cell.policy, row.cell.slots), {})[row.figure.metric] = row.figure
    if not lines:
        return ["no rows"]
    metrics = (FAILED, RATE, VARIATION, GAP, LEFT, AFTER_VARIATION, AFTER_GAP)
    value = lambda found, metric: f"{found[metric].value:.1f}" if metric in found else ""
    return markdown(
        ["teacher", "instruction", "words of a piece", "pieces", *metrics],
        ([model, name, f"{size:,}", f"{found[FAILED].samples:,}", *(value(found, metric) for metric in metrics)]
         for (model, name, size), found in lines.items()),
    )  # fmt: skip


if __name__ == "__main__":
    args = arguments(QUICK)
    run(args, lambda: plan(args), table, line, experiment=EXPERIMENT, apart=("model", "dtype"))
