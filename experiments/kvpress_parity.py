"""kvpress beside this library on one model: what each keeps of a prompt, what that costs in loss, time and memory.

    pip install "torch==2.13.0" transformers "kvpress==0.5.5"
    python experiments/kvpress_parity.py --model smollm2 --texts books/ --out rows.jsonl
    python experiments/kvpress_parity.py --out rows.jsonl --table table.md      # only draws what the file holds

A cell is one prompt, method and size. Both sides read the same tokens with the same float32 weights at once, reduce
them once to the same number of tokens per head, and then read what follows, from which nothing is evicted: the next
tokens of a book, or the question and the answer of a RULER sample, of which the answer counts. Each side and method
runs in a process of its own, whose peak memory is its own. The sides take turns. Seconds are the median over the turns,
after one that is not counted.

Where the sides keep different tokens, the row says how far from the edge these are: the largest difference between the
score of such a token and the smallest score that was kept, both by kvpress, relative to the latter. Rounding explains
1e-5; a larger one has another cause.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np
from command import arguments, need
from paper_tables import OfBooks, Plan, markdown, of_experiment, of_texts, run

import jaxcompress as jc
from jaxcompress.budgets import pyramid_even
from jaxcompress.checkpoints import save
from jaxcompress.cli.runtime import peak_memory
from jaxcompress.evaluation import rows_of_text
from jaxcompress.evaluation.perplexity import predictions
from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.evaluation.ruler.prompts import REST, Prompt, fitted
from jaxcompress.evaluation.ruler.sample import Sources
from jaxcompress.generation import DecodeState, init_decode_state, prefill
from jaxcompress.models.modes import ReadCall
from jaxcompress.policies import once, per_layer

EXPERIMENT = "kvpress_parity"
SIDES = ("jaxcompress", "kvpress")
HALF = 0.5
"""kvpress rounds down what stays of a ratio: half a token more than is wanted is asked for."""
INSTALL = 'pip install "torch==2.13.0" transformers "kvpress==0.5.5"'


class Method(NamedTuple):
    """The same method on both sides.

    Attributes:
      policy: an expression of this library.
      press: kvpress's module and a compression ratio -> its press; None: nothing is dropped.
      attention: what transformers computes attention with.
    """

    policy: str
    press: Callable[[Any, float], Any] | None
    attention: str = "sdpa"


METHODS = {
    "full": Method("full", None),
    "TOVAPress": Method("tova/protect-recent1", lambda k, r: k.TOVAPress(r)),
    "SnapKVPress": Method("snapkv+64", lambda k, r: k.SnapKVPress(r)),
    "PyramidKVPress": Method("snapkv+64", lambda k, r: k.PyramidKVPress(r)),
    "KnormPress": Method("knorm", lambda k, r: k.KnormPress(r)),
    "KeyDiffPress": Method("keydiff", lambda k, r: k.KeyDiffPress(r)),
    "LagKVPress(lag 64)": Method("lagkv+64", lambda k, r: k.LagKVPress(r, lag_size=64)),
    "CURPress": Method("cur", lambda k, r: k.CURPress(r)),
    "StreamingLLMPress": Method("window+4", lambda k, r: k.StreamingLLMPress(r)),
    "ExpectedAttentionPress": Method("expected_attention", lambda k, r: k.ExpectedAttentionPress(r)),
    "ObservedAttentionPress": Method("observed_attention", lambda k, r: k.ObservedAttentionPress(r), "eager"),
    "CriticalKVPress(SnapKV)": Method("snapkv+64/critical", lambda k, r: k.CriticalKVPress(k.SnapKVPress(r))),
    "AdaKVPress(SnapKV)": Method("snapkv+64-pool/adaptive", lambda k, r: k.AdaKVPress(k.SnapKVPress(r))),
    "ChunkKVPress(SnapKV)": Method("snapkv+64-layer/by_chunks20", lambda k, r: k.ChunkKVPress(k.SnapKVPress(r))),
    "ChunkPress(Knorm)": Method("knorm/within_chunks1024", lambda k, r: k.ChunkPress(k.KnormPress(r))),
    "MergingPress(Knorm)": Method("knorm/merge_nearest", lambda k, r: k.MergingPress(k.KnormPress(r))),
    "RandomPress": Method("random-kv_head", lambda k, r: k.RandomPress(r, seed=0)),
}
"""The presses of kvpress 0.5.5 that drop tokens of a prompt once and need no training, and that this library has.
RandomPress draws other numbers: it tells what agreement chance gives."""


@dataclass(frozen=True, kw_only=True)
class Arguments(OfBooks):
    """Adds rows to the file for each prompt, method and size, and prints the table."""

    methods: tuple[str, ...] = tuple(METHODS)
    context: int = 2048
    """Tokens of a prompt."""
    after: int = 128
    """Tokens that are read after it, at most."""
    fractions: tuple[int, ...] = (4, 8)
    """The context divided by the number of tokens that stay in each head."""
    rows: int = 2
    """Prompts from books, each of another book while there are some."""
    tasks: tuple[str, ...] = ("niah_single_2", "niah_multikey_1")
    """Tasks of RULER, a prompt of each."""
    turns: int = 3
    worker: str = ""
    """Used by the script itself: the side that this process is."""
    folder: str = ""
    """Used by the script itself: the model's folder."""


QUICK = Arguments(
    quick=True, methods=("full", "TOVAPress", "SnapKVPress", "AdaKVPress(SnapKV)"), context=256, after=16,
    fractions=(2,), rows=1, tasks=(), turns=1,
)  # fmt: skip


class Task(NamedTuple):
    """A prompt.

    Attributes:
      prompt: [T] token ids.
      after: [m] what follows.
      counted: the predictions of the last so many of `after` count.
    """

    prompt: np.ndarray
    after: np.ndarray
    counted: int


class Asked(NamedTuple):
    """What is asked of a side.

    Attributes:
      keep: tokens that stay in each head.
      room: for what follows, in tokens.
      pyramid: whether layers get different numbers, `keep` on average.
    """

    keep: int
    room: int
    pyramid: bool


class Read(NamedTuple):
    """What a side made of a prompt.

    Attributes:
      losses: [m - 1] of what follows, from its second token on, in nats.
      right: [m - 1], whether each was the likeliest token.
      kept: [L, K, T], which tokens each kv head kept.
      scores: [L, K, T], by kvpress; empty if the press has none.
      state_bytes: of the keys, the values and a policy's own numbers, before anything follows.
    """

    losses: np.ndarray
    right: np.ndarray
    kept: np.ndarray
    scores: np.ndarray
    state_bytes: int


class Library:
    """This library as a side."""

    def __init__(self, folder: str, method: Method) -> None:
        self.model, self.method = jc.load(folder, dtype="float32").model, method

    def _prefill(self, task: Task, asked: Asked) -> DecodeState:
        policy, slots = jc.get_policy(self.method.policy), len(task.prompt) + asked.room
        if asked.pyramid:
            each = pyramid_even(asked.keep + HALF, self.model.config.num_layers, len(task.prompt))
            policy, slots = per_layer(*(once(policy, n) for n in each)), tuple(n + asked.room for n in each)
        elif policy.evicts:
            policy, slots = once(policy, asked.keep), asked.keep + asked.room
        state = prefill(self.model, [task.prompt], init_decode_state(self.model, policy, slots), mode="oneshot")
        return jax.block_until_ready(state)

    def seconds(self, task: Task, asked: Asked) -> float:
        begun = perf_counter()
        self._prefill(task, asked)
        return perf_counter() - begun

    def read(self, task: Task, asked: Asked) -> Read:
        state = self._prefill(task, asked)
        kept = kept_positions(state.kv, len(task.prompt), self.model.config.num_kv_heads)
        nbytes = sum(part.nbytes for part in state.kv)
        plan = [ReadCall(0, len(task.after) - 1, asked.room, asked.room)]
        (done,) = predictions(self.model, task.after[None], state.kv, state.policy, plan)
        return Read(done.losses[0], done.right[0], kept, np.zeros(0), nbytes)


def kept_positions(state: Any, tokens: int, heads: int) -> np.ndarray:
    """[L, heads, tokens] bool."""
    kept = []
    for part in state:
        for layer in range(part.positions.shape[0]):
            here = np.zeros((heads, tokens), bool)
            for head in range(heads):
                positions = np.asarray(part.positions[layer, 0, head if part.positions.shape[2] > 1 else 0])
                mine = positions >= 0
                if part.owner is not None:
                    mine &= np.asarray(part.owner[layer, 0, 0]) == head
                here[head, positions[mine]] = True
            kept.append(here)
    return np.stack(kept)


class Peer:
    """transformers with a press of kvpress as a side."""

    def __init__(self, folder: str, method: Method) -> None:
        import kvpress  # type: ignore[import-not-found]
        import torch  # type: ignore[import-not-found]
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.torch, self.kvpress, self.method = torch, kvpress, method
        load = AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=torch.float32, attn_implementation=method.attention).eval()

    def _press(self, task: Task, asked: Asked) -> Any:
        if self.method.press is None:
            return None
        return self.method.press(self.kvpress, 1 - (asked.keep + HALF) / len(task.prompt))

    def _prefill(self, task: Task, press: Any) -> Any:
        from contextlib import nullcontext

        from transformers import DynamicCache

        cache = DynamicCache()
        ids = self.torch.tensor(task.prompt[None].astype(np.int64))
        with self.torch.no_grad(), nullcontext() if press is None else press(self.model):
            self.model(ids, past_key_values=cache, logits_to_keep=1, use_cache=True)
        return cache

    def seconds(self, task: Task, asked: Asked) -> float:
        press, begun = self._press(task, asked), perf_counter()
        self._prefill(task, press)
        return perf_counter() - begun

    def read(self, task: Task, asked: Asked) -> Read:
        press, watched = self._press(task, asked), Watched([], [])
        if press is not None:
            watch(press, watched)
        cache = self._prefill(task, press)
        logits = self._after(task, cache)
        target = self.torch.tensor(task.after[1:].astype(np.int64))
        losses = self.torch.nn.functional.cross_entropy(logits, target, reduction="none")
        config = self.model.config
        shape = config.num_hidden_layers, config.num_key_value_heads, len(task.prompt)
        kept = np.stack(watched.kept) if watched.kept else np.ones(shape, bool)
        scores = np.stack(watched.scores) if len(watched.scores) == len(kept) else np.zeros(0)
        nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        right = (logits.argmax(-1) == target).numpy()
        return Read(losses.numpy().astype(np.float64), right, kept, scores, nbytes)

    def _after(self, task: Task, cache: Any) -> Any:
        """Logits [m - 1, V] of what follows."""
        # One mask serves all layers of a call, so layers of different length are read one token at a time.
        several = len({layer.keys.shape[2] for layer in cache.layers}) > 1
        tokens = self.torch.tensor(task.after[None, :-1].astype(np.int64))
        logits = []
        with self.torch.no_grad():
            for at, part in enumerate(tokens.split(1, dim=1) if several else [tokens]):
                places = len(task.prompt) + at + self.torch.arange(part.shape[1])[None]
                out = self.model(part, past_key_values=cache, use_cache=True, position_ids=places)
                logits.append(out.logits[0])
        return self.torch.cat(logits)


class Watched(NamedTuple):
    """What a press did, layer by layer: kept [K, T], and scores [K, T] of those that score all tokens at once."""

    kept: list[np.ndarray]
    scores: list[np.ndarray]


def watch(press: Any, watched: Watched) -> None:
    """Lets a press tell what it keeps. It gathers keys without saying which: they are found again by their bits."""
    scorer = press if hasattr(press, "score") else press.press
    score, compress = scorer.score, press.compress

    def scored(module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        scores = score(module, hidden, keys, values, attentions, kwargs)
        if hidden.shape[1] == kwargs["hidden_states"].shape[1]:
            watched.scores.append(scores[0].numpy().copy())
        return scores

    def compressed(module: Any, hidden: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        less = compress(module, hidden, keys, values, attentions, kwargs)
        masked = getattr(module, "masked_key_indices", None)
        if masked is None:
            kept = np.stack([same_rows(*pair) for pair in zip(keys[0].numpy(), less[0][0].numpy(), strict=True)])
        else:
            kept = np.ones(keys.shape[1:3], bool)
            kept[masked[1].numpy(), masked[2].numpy()] = False
        watched.kept.append(kept)
        return less

    scorer.score, press.compress = scored, compressed


def same_rows(all_rows: np.ndarray, some: np.ndarray) -> np.ndarray:
    """Which rows [T, D] are among some [n, D]: [T] bool."""
    wanted = {row.tobytes() for row in some}
    found = np.array([row.tobytes() in wanted for row in all_rows])
    assert found.sum() == len(some), "equal keys cannot be told apart"
    return found


def work(args: Arguments) -> None:
    """A side: answers each line on standard input."""
    side = (Library if args.worker == "jaxcompress" else Peer)(args.folder, METHODS[args.methods[0]])
    for line in sys.stdin:
        given = json.loads(line)
        with np.load(given["task"]) as z:
            task = Task(z["prompt"], z["after"], int(z["counted"]))
        asked = Asked(given["keep"], given["room"], args.methods[0] == "PyramidKVPress")
        if given["to"] is None:
            said = side.seconds(task, asked)
        else:
            np.savez(given["to"], **side.read(task, asked)._asdict())
            said = None
        print(json.dumps([said, peak_memory()]), flush=True)


class Pair:
    """The processes of both sides for one method."""

    def __init__(self, args: Arguments, folder: Path, method: str) -> None:
        command = [sys.executable, __file__, "--folder", str(folder / "model"), "--methods", method]
        self.folder, self.method, self.room = folder, method, args.after
        self.processes = {
            side: subprocess.Popen([*command, "--worker", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   text=True)
            for side in SIDES
        }  # fmt: skip

    def ask(self, side: str, task: Path, keep: int, to: Path | None) -> tuple[float, int]:
        """The seconds if nothing is to be written, and the peak of the process in bytes."""
        process = self.processes[side]
        given = dict(task=str(task), keep=keep, room=self.room, to=None if to is None else str(to))
        print(json.dumps(given), file=process.stdin, flush=True)
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise RuntimeError(f"the process of {side} ended; its message is above")
        seconds, peak = json.loads(line)
        return seconds, peak

    def measure(self, task: Path, keep: int, turns: int) -> tuple[dict[str, Read], dict[str, float], dict[str, int]]:
        """What each side read, its seconds and its peak."""
        reads, times, peaks = {}, {side: [] for side in SIDES}, {}
        for side in SIDES:
            to = self.folder / f"{side}.npz"
            self.ask(side, task, keep, to)
            with np.load(to) as z:
                reads[side] = Read(**{name: z[name] for name in Read._fields})
        for _ in range(turns):
            for side in SIDES:
                seconds, peaks[side] = self.ask(side, task, keep, None)
                times[side].append(seconds)
        return reads, {side: statistics.median(some) for side, some in times.items()}, peaks

    def close(self) -> None:
        for process in self.processes.values():
            process.communicate()


def tasks_of(args: Arguments, tokenizer: Any) -> Iterator[tuple[str, Task]]:
    """Names and prompts."""
    books = dict(args.books())
    names = list(books)
    for row in range(args.rows):
        name = names[row % len(names)]
        ids = np.asarray(tokenizer.encode(books[name], add_bos=False))
        cut = rows_of_text(ids, args.context + args.after, None, tokenizer.bos_id)
        tokens = cut[len(cut) // 2 if row < len(names) else row % len(cut)]
        yield f"book {name} {row}", Task(tokens[: args.context], tokens[args.context :], args.after - 1)
    form = "chat" if tokenizer.has_chat_template else "plain"
    for task in args.tasks:
        sources = Sources(books[names[0]], args.context + REST)
        yield f"ruler {task}", asked_of(fitted(task, args.context + REST, 0, 0, tokenizer, sources, form), tokenizer)


def asked_of(prompt: Prompt, tokenizer: Any) -> Task:
    """A sample of RULER: its context, then question and answer, of which the answer counts."""
    answer = tokenizer.encode(" " + prompt.questions[0].answers[0], add_bos=False)
    return Task(prompt.context, np.concatenate([prompt.asked[0], prompt.closing[0], answer]), len(answer))


def edge(ours: np.ndarray, theirs: np.ndarray, scores: np.ndarray) -> float | None:
    """How far from the edge tokens are that only one side keeps, by kvpress's scores [L, K, T] and relative to the
    edge; 0 if there are none, None without scores."""
    if not scores.size:
        return None
    least = np.where(theirs, scores, np.inf).min(-1, keepdims=True)
    away = np.where(ours ^ theirs, np.abs(scores - least) / np.maximum(np.abs(least), 1e-30), 0)
    return float(away.max())


def figures_of(task: Task, reads: dict[str, Read], seconds: dict[str, float], peaks: dict[str, int]) -> list[Figure]:
    ours, theirs = (reads[side] for side in SIDES)
    both, each = (ours.kept & theirs.kept).sum(-1), np.maximum(ours.kept.sum(-1), theirs.kept.sum(-1))
    share, away = 100 * both / each, edge(ours.kept, theirs.kept, theirs.scores)
    facts: dict[str, Any] = dict(tokens=task.counted, samples=1)
    sides: dict[str, dict[str, Any]] = {side: dict(state_bytes=int(reads[side].state_bytes)) for side in SIDES}
    kept = dict(
        least=float(share.min()), heads=int(share.size), equal=int((share == 100).sum()), edge=away,
        ours=int(ours.kept.sum()), theirs=int(theirs.kept.sum()),
    )  # fmt: skip
    found = [Figure(metric="kept by both, %", value=float(100 * both.sum() / each.sum()), details=kept,
                    **facts, **sides["jaxcompress"])]  # fmt: skip
    for side in SIDES:
        losses, right = reads[side].losses[-task.counted :], reads[side].right[-task.counted :]
        found.append(Figure(
            metric=f"{side}: nats per token", value=float(losses.mean()), lower_is_better=True,
            details=dict(all_right=bool(right.all())), **facts, **sides[side],
        ))  # fmt: skip
        found.append(Figure(metric=f"{side}: seconds", value=seconds[side], lower_is_better=True, **facts,
                            **sides[side]))  # fmt: skip
        found.append(Figure(metric=f"{side}: peak MiB", value=peaks[side] / 2**20, lower_is_better=True, **facts,
                            **sides[side]))  # fmt: skip
    return found


def plan(args: Arguments, folder: Path) -> Plan:
    need("torch", "transformers", "kvpress", install=INSTALL)
    loaded = args.load()
    tasks = dict(tasks_of(args, loaded.tokenizer))
    for number, task in enumerate(tasks.values()):
        np.savez(folder / f"{number}.npz", **task._asdict())
    paths = {name: folder / f"{number}.npz" for number, name in enumerate(tasks)}
    save(loaded.model, folder / "model", tokenizer_from=loaded.folder)
    make_cell = args.cells_of(EXPERIMENT, loaded.model, args.context)
    del loaded
    cells = (
        make_cell(
            task=name, policy=METHODS[method].policy, slots=slots,
            settings=dict(press=method, turns=args.turns, after=args.after),
        )
        for method in args.methods
        for slots in ([args.context] if METHODS[method].press is None else [args.context // n for n in args.fractions])
        for name in tasks
    )  # fmt: skip
    running: list[Pair] = []

    def figures(cell: Cell) -> list[Figure]:
        if not running or running[0].method != cell.settings["press"]:
            while running:
                running.pop().close()
            running.append(Pair(args, folder, cell.settings["press"]))
        assert isinstance(cell.slots, int)
        return figures_of(tasks[cell.task], *running[0].measure(paths[cell.task], cell.slots, args.turns))

    return of_texts(args, cells, figures, lambda cell: tasks[cell.task].prompt.tobytes().hex())


def line(row: Row) -> str:
    cell, figure = row.cell, row.figure
    return f"{cell.settings['press']:24} {cell.slots!s:>6} {cell.task:28.28} {figure.metric:26} {figure.value:9.4f}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: a line for each method and size, means over prompts."""
    rows = of_experiment(rows, EXPERIMENT)
    lines: dict[tuple[str, str, Any], dict[str, list[Figure]]] = {}
    for row in rows:
        key = row.cell.settings["press"], row.cell.policy, row.cell.slots
        lines.setdefault(key, {}).setdefault(row.figure.metric, []).append(row.figure)
    if not lines:
        return ["no rows"]

    def entries(found: dict[str, list[Figure]]) -> Iterator[str]:
        kept = found["kept by both, %"]
        mean = lambda metric: statistics.mean(one.value for one in found[metric])
        edges = [one.details["edge"] for one in kept if one.details["edge"] is not None]
        heads, equal = (sum(one.details[name] for one in kept) for name in ("heads", "equal"))
        yield f"{statistics.mean(one.value for one in kept):.3f}"
        yield f"{equal:,} of {heads:,}"
        yield f"{max(edges):.0e}" if edges and max(edges) else "-"
        ours, theirs = (found[f"{side}: nats per token"] for side in SIDES)
        yield f"{statistics.mean(one.value for one in ours):.4f}"
        yield f"{max(abs(a.value - b.value) for a, b in zip(ours, theirs, strict=True)):.0e}"
        yield f"{mean('jaxcompress: seconds') / mean('kvpress: seconds'):.2f}"
        yield f"{mean('jaxcompress: peak MiB'):,.0f} / {mean('kvpress: peak MiB'):,.0f}"

    first, any_line = rows[0].cell, next(iter(lines.values()))
    prompts = any_line["kept by both, %"]
    return [
        f"{first.model}, {first.dtype}, {len(prompts)} prompts of {first.context:,} tokens "
        f"({', '.join(sorted({row.cell.task for row in rows}))}), {sum(one.tokens for one in prompts):,} predictions "
        f"for each line. On {rows[0].made.device}.",
        "",
        *markdown(
            ["press", "policy", "tokens kept per head", "kept by both, %", "heads with equal sets",
             "farthest from the edge", "nats per token", "largest difference to kvpress's", "time / kvpress's",
             "peak MiB, ours / theirs"],
            ([key[0], f"`{key[1]}`", f"{key[2]:,}", *entries(found)] for key, found in lines.items()),
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    args = arguments(QUICK)
    if args.worker:
        work(args)
    else:
        with TemporaryDirectory() as folder:
            run(args, lambda: plan(args, Path(folder)), table, line, experiment=EXPERIMENT, apart=("press",))
