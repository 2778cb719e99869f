"""Summaries and questions over long documents, read in a fixed number of slots (TOVA paper, section 5.2).

    python experiments/tova_documents.py --model smollm2 --squality squality/ --out rows.jsonl
    python experiments/tova_documents.py --model smollm2 --qasper validation --out rows.jsonl
    python experiments/tova_documents.py --out rows.jsonl --table table.md     # only draws what the file holds

SQuALITY (Wang et al. 2022): stories, whose first question asks for the plot and the others for details, with several
reference answers. QASPER (Dasigi et al. 2021): questions over papers. A document is cut to what --context leaves beside
question and answer, and read token by token. Question and answer follow through the same slots. A cell is one document,
policy and size.

Two figures for each kind of question. The perplexity of the reference answers, given the bounded document, ranks
policies for every model. The score of greedy answers (ROUGE-1, -2 and -L by `rouge_score`, F1 of words for QASPER)
says something only if the model can answer with the full cache; --answer 0 leaves it out.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from command import arguments, need, stop
from paper_tables import OfTable, Plan, markdown, of_experiment, of_hub, run, spread

import jaxcompress as jc
from jaxcompress.embedded.corpus import held_out
from jaxcompress.evaluation.perplexity import predictions
from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.generation import DecodeState, GenerationConfig, decode, init_decode_state, prefill
from jaxcompress.inputs.text import json_lines
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.modes import calls

EXPERIMENT, LOSS = "tova_documents", "nats per token of the references"
QASPER = "allenai/qasper"
"""Its name on the hub."""
CONVERTED = "refs/convert/parquet"
"""The hub's own copy of a dataset as Parquet files; the dataset itself needs a script."""


@dataclass(frozen=True, kw_only=True)
class Arguments(OfTable):
    """Adds rows to the file for each document, policy and size, and prints the table."""

    squality: Path = Path("squality")
    """A folder with SQuALITY's files, such as dev.jsonl."""
    split: Literal["train", "dev", "test"] = "dev"
    """Of SQuALITY."""
    qasper: str | None = None
    """QASPER in place of SQuALITY: its own file, such as qasper-dev-v0.3.json, or a split such as `validation`, which
    needs `pip install "jaxcompress[data]"` and the hub."""
    documents: int | None = None
    """Documents, from the first on; all if not given."""
    questions: int | None = None
    """Questions of each document, from the first on; all if not given."""
    policies: tuple[str, ...] = ("full", "window", "window+4", "tova", "h2o", "snapkv+32/every32")
    slots: tuple[int, ...] = (512, 1024, 2048)
    context: int = 8192
    """Tokens of document, question and answer together."""
    answer: int = 256
    """Tokens of an answer, at most; 0: nothing is generated."""


QUICK = Arguments(quick=True, documents=1, policies=("full", "tova"), slots=(32,), context=128, answer=8)


class Question(NamedTuple):
    """A question and its reference answers."""

    kind: str
    text: str
    references: tuple[str, ...]


class Document(NamedTuple):
    """A document, and what is asked about it.

    Attributes:
      instruction: what stands before it.
    """

    name: str
    instruction: str
    text: str
    questions: tuple[Question, ...]


def squality(folder: Path, split: str) -> Iterator[Document]:
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        stop(
            f"SQuALITY was looked for as {path.absolute()}: give the folder of its files with --squality FOLDER; they "
            "are data/v1-3/txt of github.com/nyu-mll/SQuALITY"
        )
    for _, _, story in json_lines(path):
        asked = (
            Question(
                "summary" if one["question_number"] == 1 else "questions",
                one["question_text"],
                tuple(answer["response_text"] for answer in one["responses"]),
            )
            for one in story["questions"]
        )
        instruction = "You are given a story and a question. Answer the question in a paragraph."
        yield Document(f"squality {story['metadata']['passage_id']}", instruction, story["document"], tuple(asked))


def qasper(given: str) -> Iterator[Document]:
    instruction = (
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        'single phrase or sentence. If the article does not answer it, write "unanswerable".'
    )
    hub = lambda: of_hub(QASPER, "QASPER", "--qasper qasper-dev-v0.3.json", split=given, revision=CONVERTED)
    for paper in released(Path(given)) if Path(given).suffix == ".json" else hub():
        sections = zip(paper["full_text"]["section_name"], paper["full_text"]["paragraphs"], strict=True)
        text = "\n\n".join("\n".join([name or "", *paragraphs]) for name, paragraphs in sections)
        asked = (
            Question("questions", question, tuple(map(reference, answers["answer"])))
            for question, answers in zip(paper["qas"]["question"], paper["qas"]["answers"], strict=True)
        )
        yield Document(f"qasper {paper['id']}", instruction, f"{paper['title']}\n\n{text}", tuple(asked))


def released(path: Path) -> Iterator[dict[str, Any]]:
    """The papers of a file of QASPER's release (allenai.org/data/qasper), with columns as the hub has them."""
    if not path.is_file():
        stop(f"QASPER was looked for as {path.absolute()}: give its released file, or a split of the hub's copy")
    for name, paper in json.loads(path.read_text("utf-8")).items():
        column = lambda rows, key: [row[key] for row in rows]
        answers = [dict(answer=column(one["answers"], "answer")) for one in paper["qas"]]
        yield dict(
            id=name, title=paper["title"],
            full_text={key: column(paper["full_text"], key) for key in ("section_name", "paragraphs")},
            qas=dict(question=column(paper["qas"], "question"), answers=answers),
        )  # fmt: skip


def reference(answer: dict[str, Any]) -> str:
    """An annotator's answer as text, as QASPER's own evaluation spells it."""
    if answer["unanswerable"]:
        return "Unanswerable"
    if answer["extractive_spans"]:
        return ", ".join(answer["extractive_spans"])
    return answer["free_form_answer"] or ("Yes" if answer["yes_no"] else "No")


def continuations() -> Iterator[Document]:
    """Documents whose own next words are the answer, for --quick."""
    for document in held_out("topics/"):
        text, after = document.text[:2000], document.text[2000:2060]
        asked = Question("questions", "How does the text go on?", (after,))
        yield Document(document.name, "You are given a text and a question.", text, (asked,))


def documents(args: Arguments) -> list[Document]:
    if args.qasper is not None:
        found = qasper(args.qasper)
    elif args.quick and args.squality == QUICK.squality:
        found = continuations()
    else:
        found = squality(args.squality, args.split)
    answered = lambda one: tuple(question for question in one.questions if question.references)[: args.questions]
    with_questions = (one._replace(questions=asked) for one in found if (asked := answered(one)))
    return list(islice(with_questions, args.documents))


def rouge(references: Sequence[str], answer: str) -> dict[str, float]:
    """F1 of ROUGE in %; the best of the references."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score_multi(list(references), answer)
    return {f"ROUGE-{name.removeprefix('rouge')}": 100 * score.fmeasure for name, score in scores.items()}


def f1(references: Sequence[str], answer: str) -> dict[str, float]:
    """F1 of words in % without articles and punctuation, as SQuAD and QASPER count them; the best reference."""

    def words(text: str) -> list[str]:
        text = "".join(character for character in text.lower() if character not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    def one(reference: str) -> float:
        said, wanted = words(answer), words(reference)
        same = sum((Counter(said) & Counter(wanted)).values())
        return 200 * same / (len(said) + len(wanted)) if same else 0.0

    return {"F1": max(map(one, references))}


class Prompt(NamedTuple):
    """Token ids of a document [T], of each question after it up to the answer, and of its references."""

    document: np.ndarray
    asked: list[np.ndarray]
    references: list[list[np.ndarray]]


def prompt(document: Document, tokenizer: Any, context: int, answer: int) -> Prompt:
    """In the model's chat format if it has one. The document loses its end if it does not fit.

    Raises:
      ValueError: question and answer leave no token for the document.
    """
    mark, before, after = "\x00", "", "\n\nAnswer:"
    if tokenizer.has_chat_template:
        said = tokenizer.apply_chat_template([dict(role="user", content=mark)])
        before, _, after = said.partition(mark)
    piece = lambda text: np.asarray(tokenizer.encode(text, add_bos=False))
    start = tokenizer.encode(f"{before}{document.instruction}\n\n", add_bos=not before)
    asked = [piece(f"\n\nQuestion: {one.text}{after}") for one in document.questions]
    ahead = "" if after[-1:].isspace() else " "
    references = [[piece(ahead + text.strip()) for text in one.references] for one in document.questions]
    tails = [len(ask) + max(answer, *map(len, texts), 0) for ask, texts in zip(asked, references, strict=True)]
    room = context - len(start) - max(tails)
    if room < 1:
        raise ValueError(
            f"{document.name}: question and answer take {max(tails)} of {context} tokens, which leaves none for the "
            "document; give a larger --context"
        )
    return Prompt(np.concatenate([start, piece(document.text)[:room]]), asked, references)


def loss(model: Decoder, ask: np.ndarray, reference: np.ndarray, read: DecodeState) -> tuple[float, int]:
    """Summed loss of a reference answer after the document and the question, in nats; and its tokens."""
    tokens = np.concatenate([ask, reference])[None]
    plan = calls("streaming", tokens.shape[1] - 1, chunk=1, segment=512)
    parts = predictions(model, tokens, read.copy().kv, read.policy, plan)
    losses = np.concatenate([part.losses[0] for part in parts])[len(ask) - 1 :]
    return float(losses.sum()), len(losses)


def measure(model: Decoder, tokenizer: Any, document: Document, cell: Cell, policy: jc.Policy) -> Iterator[Figure]:
    """The figures of a cell: for each kind of question the loss of its references, and the scores of its answers."""
    most = cell.settings["answer"]
    given = prompt(document, tokenizer, cell.context, most)
    read = prefill(model, [given.document], init_decode_state(model, policy, cell.slots))
    facts: dict[str, Any] = dict(state_bytes=sum(part.nbytes for part in read.kv))
    score: Callable[..., dict[str, float]] = f1 if document.name.startswith("qasper") else rouge
    config = GenerationConfig(stop_token_ids=tuple(tokenizer.eos_ids))
    losses: dict[str, list[tuple[float, int]]] = {}
    answers: dict[str, list[tuple[str, dict[str, float]]]] = {}
    for question, ask, references in zip(document.questions, given.asked, given.references, strict=True):
        losses.setdefault(question.kind, []).extend(loss(model, ask, one, read) for one in references)
        if most:
            tokens, _ = decode(model, prefill(model, [ask], read.copy()), most, config)
            text = tokenizer.decode(tokens[0][tokens[0] >= 0]).strip()
            answers.setdefault(question.kind, []).append((text, score(question.references, text)))
    for kind, found in losses.items():
        total = sum(n for _, n in found)
        yield Figure(metric=f"{kind}: {LOSS}", value=sum(nats for nats, _ in found) / total, lower_is_better=True,
                     tokens=total, samples=len(found), details=dict(document=len(given.document)), **facts)  # fmt: skip
    for kind, said in answers.items():
        facts |= dict(samples=len(said), tokens=len(said) * most, details=[text for text, _ in said])
        for name in said[0][1]:
            value = float(np.mean([scores[name] for _, scores in said]))
            yield Figure(metric=f"{kind}: {name}, %", value=value, **facts)


def plan(args: Arguments) -> Plan:
    if args.answer and args.qasper is None:
        need("rouge_score", install='pip install "jaxcompress[lm-eval]"')
    found = {document.name: document for document in documents(args)}
    loaded = args.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    policies = {name: jc.get_policy(name) for name in args.policies}
    make_cell = args.cells_of(EXPERIMENT, model, args.context)
    cells = (
        make_cell(
            task=document,
            policy=name,
            slots=slots,
            settings=dict(answer=args.answer, questions=args.questions, mode="streaming"),
        )
        for name, policy in policies.items()
        for slots in (args.slots if policy.evicts else (args.context,))
        for document in found
    )
    compiled: list[tuple[Any, ...]] = []

    def figures(cell: Cell) -> list[Figure]:
        if compiled[-1:] != [(cell.policy, cell.slots)]:
            jax.clear_caches()  # programs of other sizes would only fill memory
            compiled.append((cell.policy, cell.slots))
        return list(measure(model, tokenizer, found[cell.task], cell, policies[cell.policy]))

    return cells, figures


def line(row: Row) -> str:
    cell = row.cell
    return f"{cell.task:20.20} {cell.policy:20} {cell.slots:6} {row.figure.metric:48} {row.figure.value:9.3f}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: a table for each data set, which is the first word of a task."""
    sets: dict[str, list[Row]] = {}
    for row in of_experiment(rows, EXPERIMENT):
        name, space, _ = row.cell.task.partition(" ")
        sets.setdefault(name if space else "", []).append(row)
    if not sets:
        return ["no rows"]
    first, *others = (table_of(rows) for rows in sets.values())
    return [*first, *(text for lines in others for text in ("", *lines))]


def table_of(rows: Sequence[Row]) -> list[str]:
    """A line for each policy and size. Documents that a line lacks are left out of all lines."""
    lines: dict[tuple[str, Any], dict[tuple[str, str], Figure]] = {}
    for row in rows:
        lines.setdefault((row.cell.policy, row.cell.slots), {})[row.cell.task, row.figure.metric] = row.figure
    shared = set.intersection(*({task for task, _ in found} for found in lines.values()))
    if not shared:
        return ["no document was measured in all lines yet"]
    metrics = list(dict.fromkeys(row.figure.metric for row in rows))

    def entry(found: dict[tuple[str, str], Figure], metric: str) -> str:
        mine = [figure for (task, name), figure in found.items() if name == metric and task in shared]
        if not metric.endswith(LOSS):
            return spread([one.value for one in mine], ".1f")
        return f"{math.exp(np.average([one.value for one in mine], weights=[one.tokens for one in mine])):.3f}"

    any_line, first = next(iter(lines.values())), rows[0].cell
    counted = [one for (task, name), one in any_line.items() if name.endswith(LOSS) and task in shared]
    head = [metric.replace(LOSS, "perplexity of the references") for metric in metrics]
    return [
        f"{first.model}, {first.dtype}, {len(shared)} documents cut to a context of {first.context:,} tokens, "
        f"{sum(one.samples for one in counted):,} reference answers of {sum(one.tokens for one in counted):,} tokens. "
        "Scores: means and standard errors over documents.",
        "",
        *markdown(
            ["policy", "slots", *head],
            ([f"`{policy}`", f"{slots:,}", *(entry(found, one) for one in metrics)]
             for (policy, slots), found in lines.items()),
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    args = arguments(QUICK)
    run(args, lambda: plan(args), table, line, experiment=EXPERIMENT)
