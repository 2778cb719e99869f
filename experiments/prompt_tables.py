"""What a reader loses when its prompt is shortened 2 to 5 times, and what shortening costs (LLMLingua-2, section 4).

    python experiments/prompt_tables.py --model smollm2 --texts books/ --out rows.jsonl
    python experiments/prompt_tables.py --model smollm2 --texts books/ --squality squality/ --out rows.jsonl
    python experiments/prompt_tables.py --model smollm2 --domains documentation code --out rows.jsonl
    python experiments/prompt_tables.py --out rows.jsonl --table table.md      # only draws what the file holds

Three things are read after a shortened context, and their loss is taken, always over the same tokens: the text that
follows in the book (`continuation`), the number that a sentence hidden in the context names, asked for after it
(`needle`), and people's answers to questions about a story (`squality`). `--domains` takes the first two from other
texts than books (`logs: continuation`, `logs: needle`). A cell is one task, compressor and ratio, over all contexts.
`whole` keeps the context, `nothing` leaves it out: they bound what can be lost.

Compressors are `embedded` (the classifier that ships), a folder or hub id of another LLMLingua-2 classifier,
`llmlingua`, `selective-context` and `self-information` (with the reader as their small model), `repeated` and
`left-out` (what the reader needs, `reader_teachers.py`), `embedded-repeated` (the mean of ranks), `tf-idf`, `content`,
`uniform`, `first` and `random`. What follows a plus is an ablation: `embedded+numbers` protects numbers,
`embedded+chunks` meets the budget in each chunk of 512 subwords as the paper does, `embedded+lines` keeps line breaks.
Ablations of the paper's data (instruction, chunk-wise compression, filters) are in `teacher_tables.py`.

Seconds are the median over contexts of shortening one, and of reading what is left; both without compilation.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np
from command import arguments
from paper_tables import OfBooks, Plan, markdown, of_experiment, of_texts, run, spread
from prompt_domains import domains_of
from reader_teachers import left_out, repeated
from tova_documents import squality

from jaxcompress.checkpoints import Loaded
from jaxcompress.evaluation.perplexity import predictions
from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.evaluation.ruler.prompts import largest
from jaxcompress.evaluation.ruler.sample import Sources
from jaxcompress.evaluation.ruler.tasks import get_task
from jaxcompress.models.init_state import init_state
from jaxcompress.models.modes import ReadCall
from jaxcompress.policies import Full
from jaxcompress.prompt import Compressor, Scorer, TokenizerCounter, keep, mixed
from jaxcompress.prompt.baselines import content_words, evenly_spread, first_words, random_words, tf_idf
from jaxcompress.prompt.information import Reader, self_information
from jaxcompress.prompt.llmlingua import llmlingua
from jaxcompress.prompt.selective_context import selective_context
from jaxcompress.prompt.surface import words_of

EXPERIMENT, LOSS, RIGHT = "prompt_tables", "nats per token", "right, %"
CONTINUATION, NEEDLE = "continuation", "needle"
SHORTENING, READING = "seconds of shortening", "seconds of reading"
WIDTH = 256  # prompts are padded to a multiple, so that few programs are compiled
MADE: dict[str, Callable[[Reader, int], Scorer]] = {
    "embedded": lambda reader, seed: Compressor.load(dtype="float32"),
    "llmlingua": lambda reader, seed: llmlingua(reader),
    "selective-context": lambda reader, seed: selective_context(reader),
    "self-information": lambda reader, seed: self_information(reader),
    "repeated": lambda reader, seed: repeated(reader),
    "left-out": lambda reader, seed: left_out(reader),
    "embedded-repeated": lambda reader, seed: mixed((1, Compressor.load(dtype="float32")), (1, repeated(reader))),
    "tf-idf": lambda reader, seed: tf_idf(),
    "content": lambda reader, seed: content_words(),
    "uniform": lambda reader, seed: evenly_spread(),
    "first": lambda reader, seed: first_words(),
    "random": lambda reader, seed: random_words(seed),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "numbers": dict(protect=["numbers"]),
    "chunks": dict(scope="chunk"),
    "lines": dict(force=["\n"]),
}
BOUNDS = {"whole": 1.0, "nothing": math.inf}


@dataclass(frozen=True, kw_only=True)
class Arguments(OfBooks):
    """Adds rows to the file for each task, compressor and ratio, and prints the table. The model is the reader."""

    compressors: tuple[str, ...] = (
        "embedded", "llmlingua", "selective-context", "self-information", "tf-idf", "content", "uniform", "first",
        "random", "embedded+numbers", "embedded+chunks",
    )  # fmt: skip
    """Names, folders or hub ids, each with ablations after a plus."""
    ratios: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0)
    """How many times shorter."""
    contexts: int = 16
    """Contexts of each task."""
    words: int = 350
    """Words of a context, approximately."""
    after: int = 96
    """Tokens that follow a context in its book."""
    seeds: int = 3
    """Draws of `random`."""
    domains: tuple[str, ...] = ()
    """Texts in place of books: documentation, code, logs, json, tables, or UTF-8 files."""
    squality: Path | None = None
    """A folder with SQuALITY's dev.jsonl; its task is left out if not given."""


QUICK = Arguments(
    quick=True, compressors=("embedded+numbers", "llmlingua", "random"), ratios=(2.0,), contexts=1, words=40, after=16,
    seeds=1,
)  # fmt: skip


class Piece(NamedTuple):
    """What is read: `before`, the shortened `text`, `after`; then the tokens [n] whose loss counts."""

    before: str
    text: str
    after: str
    counted: np.ndarray


def continuations(args: Arguments, books: dict[str, str], tokenizer: Any) -> list[Piece]:
    """Pieces of books and what follows them, evenly spread over the books and over each.

    If they cannot be dealt evenly, the first books have one more.
    """
    found = []
    each, more = divmod(args.contexts, len(books))
    for number, text in enumerate(books.values()):
        words = words_of(text)
        count = each + (number < more)
        for at in np.linspace(0, max(len(words) - 2 * args.words, 0), count + 2).astype(int)[1:-1]:
            end = words[min(at + args.words, len(words) - 1)].start
            rest = tokenizer.encode(text[end : end + 12 * args.after].lstrip(), add_bos=False)[: args.after]
            found.append(Piece("", text[words[at].start : end].strip(), "\n", np.asarray(rest)))
    return found


def framed(tokenizer: Any) -> tuple[str, str]:
    """What stands before a user's message and between it and the answer."""
    if not tokenizer.has_chat_template:
        return "", "\n"
    before, _, after = tokenizer.apply_chat_template([dict(role="user", content="\x00")]).partition("\x00")
    return before, after


def needles(args: Arguments, books: dict[str, str], tokenizer: Any) -> list[Piece]:
    """Numbers hidden in the books' text, and the question for them (RULER's niah_single_2)."""
    task, (before, after) = get_task("niah_single_2"), framed(tokenizer)
    sources = Sources("\n\n".join(text[:200_000] for text in books.values()), args.words)

    def needle(index: int) -> Piece:
        sample = lambda size: task.make(size, random.Random(f"needle {index}"), sources)
        made = sample(largest(task.least, lambda size: len(sample(size).context.split()) <= max(args.words, 80)))
        asked = made.questions[0]
        answer = tokenizer.encode(" " + asked.answers[0], add_bos=False)
        return Piece(before, made.context, asked.text + after + asked.prefix, np.asarray(answer))

    return [needle(index) for index in range(args.contexts)]


def answers(args: Arguments, folder: Path, tokenizer: Any) -> list[Piece]:
    """The beginnings of stories and the first reference of a question about each."""
    before, after = framed(tokenizer)
    found = []
    for story in squality(folder, "dev"):
        words = words_of(story.text)
        text = story.text[: words[min(args.words, len(words)) - 1].end]
        question = story.questions[-1]
        counted = tokenizer.encode(question.references[0].strip(), add_bos=False)[: args.after]
        found.append(Piece(before, text, f"\n\nQuestion: {question.text}{after}", np.asarray(counted)))
        if len(found) == args.contexts:
            break
    return found


def shortener(name: str, reader: Reader, seed: int) -> tuple[Scorer, dict[str, Any]]:
    """What scores words, and the keywords of `keep`."""
    base, *options = name.split("+")
    if unknown := set(options) - set(OPTIONS):
        raise ValueError(f"unknown ablation {unknown.pop()!r} of {name}; known: {', '.join(OPTIONS)}")
    scorer = MADE[base](reader, seed) if base in MADE else Compressor.load(base, dtype="float32")
    given: dict[str, Any] = {}
    for option in options:
        given |= OPTIONS[option]
    return scorer, given


class Losses(NamedTuple):
    """Of one piece: the mean loss, whether every counted token was the likeliest, and the seconds of reading."""

    nats: float
    right: bool
    seconds: float


def read(loaded: Loaded[Any, Any, Any], piece: Piece, text: str) -> Losses:
    ids = loaded.tokenizer.encode(piece.before + text + piece.after, add_bos=not piece.before)
    tokens = np.concatenate([np.asarray(ids, np.int32), piece.counted.astype(np.int32)])
    width = -(-(len(tokens) - 1) // WIDTH) * WIDTH
    dtype = loaded.model.dtype
    state = init_state(loaded.model.config, Full(), width, batch=1, dtype=dtype)
    (done,) = predictions(loaded.model, tokens[None], state, Full(), [ReadCall(0, len(tokens) - 1, width, width)])
    n = len(piece.counted)
    return Losses(float(done.losses[0, -n:].mean()), bool(done.right[0, -n:].all()), done.seconds)


def plan(args: Arguments) -> Plan:
    loaded = args.load()
    tokenizer = loaded.tokenizer
    if args.domains and (args.texts or args.pg19):
        raise ValueError("--domains takes the place of books: give it without --texts and --pg19")
    tasks: dict[str, list[Piece]] = {}
    for name, texts in (domains_of(args.domains) or {"": dict(args.books())}).items():
        before = f"{name}: " if name else ""
        tasks[f"{before}{CONTINUATION}"] = continuations(args, texts, tokenizer)
        tasks[f"{before}{NEEDLE}"] = needles(args, texts, tokenizer)
    if args.squality is not None:
        tasks["squality"] = answers(args, args.squality, tokenizer)
    reader, counter = Reader(loaded.model, tokenizer, slots=512, segment=128), TokenizerCounter(tokenizer)
    make_cell = args.cells_of(EXPERIMENT, loaded.model, args.words)
    settings = dict(contexts=args.contexts, after=args.after)
    cells = (
        make_cell(task=task, policy=name, slots=round(args.words / ratio), seed=seed,
                  settings=settings | dict(ratio=ratio if ratio < math.inf else None))
        for name in (*BOUNDS, *args.compressors)
        for task in tasks
        for ratio in ((BOUNDS[name],) if name in BOUNDS else args.ratios)
        for seed in range(args.seeds if name == "random" else 1)
    )  # fmt: skip
    scored: dict[tuple[str, int, str], list[tuple[Any, float]]] = {}

    def shortened(cell: Cell) -> Iterator[tuple[str, float, int, int]]:
        """Each context's text, the seconds of scoring and choosing, and its tokens before and after."""
        scorer, given = shortener(cell.policy, reader, cell.seed)
        key = cell.policy.split("+")[0], cell.seed, cell.task
        if key not in scored:
            scored.clear()
            jax.clear_caches()  # programs of another compressor would only fill memory
            scorer(tasks[cell.task][0].text)  # compiles
            scored[key] = [timed(scorer, piece.text) for piece in tasks[cell.task]]
        for words, seconds in scored[key]:
            kept, more = timed(lambda words: keep(words, counter, rate=1 / cell.settings["ratio"], **given), words)
            yield kept.text, seconds + more, kept.tokens_before, kept.tokens_after

    def figures(cell: Cell) -> Iterator[Figure]:
        pieces = tasks[cell.task]
        if cell.policy in BOUNDS:
            texts = [(piece.text if cell.policy == "whole" else "", 0.0, 1, 1) for piece in pieces]
        else:
            texts = list(shortened(cell))
        found = [read(loaded, piece, text) for piece, (text, *_) in zip(pieces, texts, strict=True)]
        nats = [one.nats for one in found]
        facts: dict[str, Any] = dict(tokens=sum(len(one.counted) for one in pieces), samples=len(pieces), state_bytes=0)
        achieved = sum(before for _, _, before, _ in texts) / sum(after for *_, after in texts)
        error = statistics.stdev(nats) / len(nats) ** 0.5 if len(nats) > 1 else None
        yield Figure(metric=LOSS, value=statistics.mean(nats), spread=error, lower_is_better=True,
                     details=dict(each=nats, ratio=achieved), **facts)  # fmt: skip
        yield Figure(metric=RIGHT, value=100 * statistics.mean(one.right for one in found), **facts)
        yield Figure(metric=SHORTENING, value=statistics.median(seconds for _, seconds, *_ in texts),
                     lower_is_better=True, **facts)  # fmt: skip
        yield Figure(metric=READING, value=statistics.median(one.seconds for one in found), lower_is_better=True,
                     **facts)  # fmt: skip

    return of_texts(args, cells, figures, lambda cell: repr([piece[:3] for piece in tasks[cell.task]]))


def timed(what: Callable[[Any], Any], given: Any) -> tuple[Any, float]:
    begun = perf_counter()
    result = what(given)
    return result, perf_counter() - begun


def line(row: Row) -> str:
    cell, figure = row.cell, row.figure
    ratio = cell.settings["ratio"] or 0
    return f"{cell.task:14} {cell.policy:24} {ratio:4.1f} {cell.seed:3} {figure.metric:24} {figure.value:9.4f}"


Found = dict[tuple[str, str, Any, str], list[Figure]]
"""The figures of a task, compressor, ratio and metric, one for each seed."""


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: for each task a line for each compressor, a column for each ratio; for domains a column for each."""
    rows = of_experiment(rows, EXPERIMENT)
    found: Found = {}
    for row in rows:
        ratio = None if row.cell.policy in BOUNDS else row.cell.settings["ratio"]
        found.setdefault((row.cell.task, row.cell.policy, ratio, row.figure.metric), []).append(row.figure)
    lines = []
    tasks = dict.fromkeys(row.cell.task for row in rows)
    for task in tasks:
        if ": " not in task:
            lines += of_task(task, rows, found)
    for kind in (CONTINUATION, NEEDLE):
        if some := [task for task in tasks if task.endswith(f": {kind}")]:
            lines += of_domains(kind, some, rows, found)
    return lines or ["no rows"]


def lost(task: str, name: str, ratio: float, found: Found) -> str:
    """Over `whole`: mean and standard error over contexts, draws averaged; of needles the right answers beside it."""
    some, (whole,) = found.get((task, name, ratio, LOSS), []), found[task, "whole", None, LOSS]
    if not some:
        return ""
    each = np.mean([one.details["each"] for one in some], axis=0) - whole.details["each"]
    entry = spread(list(map(float, each)), ".3f")
    return f"{entry}; {right(task, name, ratio, found)}" if task.endswith(NEEDLE) else entry


def right(task: str, name: str, ratio: Any, found: Found) -> str:
    return f"{statistics.mean(one.value for one in found[task, name, ratio, RIGHT]):.0f} %"


def measured(rows: Sequence[Row]) -> tuple[list[str], list[float]]:
    """Names of compressors, and ratios."""
    mine = [row.cell for row in rows if row.cell.policy not in BOUNDS]
    return list(dict.fromkeys(cell.policy for cell in mine)), sorted({cell.settings["ratio"] for cell in mine})


def of_task(task: str, rows: Sequence[Row], found: Found) -> list[str]:
    mine = [row for row in rows if row.cell.task == task]
    names, ratios = measured(mine)
    whole, nothing = (found.get((task, name, None, LOSS), [None])[0] for name in BOUNDS)
    if whole is None or nothing is None:
        return [f"{task}: `whole` and `nothing` were not measured yet", ""]

    def seconds(name: str) -> str:
        some = [one.value for ratio in ratios for one in found.get((task, name, ratio, SHORTENING), [])]
        return f"{statistics.median(some):.3f}" if some else ""

    cell = mine[0].cell
    reading = {name: found[task, name, None, READING][0].value for name in BOUNDS}
    by_ratio = {
        ratio: statistics.median(one.value for name in names for one in found.get((task, name, ratio, READING), []))
        for ratio in ratios
    }
    said = f"**{task}**: {cell.model}, {cell.dtype}, {whole.samples} contexts of about {cell.context} words, "
    said += f"{whole.tokens:,} tokens counted. The whole context gives {whole.value:.3f} nats per token, none "
    said += f"{nothing.value:.3f}"
    if task.endswith(NEEDLE):
        said += f"; right answers {right(task, 'whole', None, found)} and {right(task, 'nothing', None, found)}"
    said += f". Reading takes {reading['whole']:.2f} s whole, and " + ", ".join(
        f"{value:.2f} s at {ratio:g} ×" for ratio, value in by_ratio.items()
    )
    return [
        f"{said}. Nats per token lost to the whole context, mean and standard error over contexts.",
        "",
        *markdown(
            ["compressor", *(f"{ratio:g} ×" for ratio in ratios), "seconds of shortening"],
            ([f"`{name}`", *(lost(task, name, ratio, found) for ratio in ratios), seconds(name)] for name in names),
        ),
        "",
    ]  # fmt: skip


def of_domains(kind: str, tasks: Sequence[str], rows: Sequence[Row], found: Found) -> list[str]:
    """One table for all domains of a kind: a line for each ratio and compressor."""
    tasks = [task for task in tasks if all((task, name, None, LOSS) in found for name in BOUNDS)]
    mine = [row for row in rows if row.cell.task in tasks]
    if not mine:
        return [f"{kind}: `whole` and `nothing` were not measured yet", ""]
    names, ratios = measured(mine)
    cell, samples = mine[0].cell, {row.figure.samples for row in mine}
    bound = lambda task, name: (
        f"{found[task, name, None, LOSS][0].value:.3f}"
        + (f"; {right(task, name, None, found)}" if kind == NEEDLE else "")
    )
    said = f"**{kind}**: {cell.model}, {cell.dtype}, {' or '.join(map(str, sorted(samples)))} contexts of about "
    said += f"{cell.context} words for each domain. Nats per token, and what is lost to the whole context, mean and "
    said += "standard error over contexts."
    return [
        said,
        "",
        *markdown(
            ["", *(task.removesuffix(f": {kind}") for task in tasks)],
            [
                *([f"{name} of the context", *(bound(task, name) for task in tasks)] for name in BOUNDS),
                *([f"`{name}`, {ratio:g} ×", *(lost(task, name, ratio, found) for task in tasks)]
                  for ratio in ratios for name in names),
            ],
        ),
        "",
    ]  # fmt: skip


if __name__ == "__main__":
    args = arguments(QUICK)
    run(args, lambda: plan(args), table, line, experiment=EXPERIMENT, apart=("ratio",))
