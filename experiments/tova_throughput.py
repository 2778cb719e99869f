"""State size against memory, largest batch and speed of decoding (TOVA paper, section 7.1).

    python experiments/tova_throughput.py --model smollm2 --memory 8 --out rows.jsonl
    python experiments/tova_throughput.py --out rows.jsonl --table table.md    # only draws what the file holds

The bytes of a state are those of its arrays' shapes; nothing is allocated for them. The largest batch is the number of
rows whose states fit into --memory (GiB) beside the weights; what a step computes comes on top. Speed is that of greedy
decoding with a state that is full. The full cache has room for `context` tokens and stands at its last `steps`. It is
measured beside every bounded state, in turns within one run, if both fit; medians of the turns are told. A measurement
holds both states and a copy of one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from command import arguments
from flax import nnx
from paper_tables import OfTable, Plan, markdown, of_experiment, run
from speed_decode import decode, in_turn

import jaxcompress as jc
from jaxcompress.evaluation.provenance import device
from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.modes import calls

EXPERIMENT, MEMORY = "tova_throughput", "memory"
BATCH, SPEED, FULL, RATIO = (
    "largest batch",
    "tokens/s",
    "tokens/s of the full cache beside it",
    "ratio to the full cache",
)


@dataclass(frozen=True, kw_only=True)
class Arguments(OfTable):
    """Adds rows to the file for each size and batch, and prints the table."""

    policy: str = "tova"
    slots: tuple[int, ...] = (256, 512, 1024)
    context: int = 4096
    """Tokens that the full cache holds."""
    memory: float = 8.0
    """GiB for weights and states."""
    batches: tuple[int, ...] = (1, 4)
    steps: int = 64
    """Tokens of each row in a turn."""
    repeats: int = 5
    """Turns that count; one more comes before them."""


QUICK = Arguments(quick=True, slots=(16,), context=64, memory=0.1, batches=(2,), steps=8, repeats=1)


def state_bytes(model: Decoder, policy: jc.Policy, slots: int, batch: int) -> int:
    """Bytes of a state of so many rows, which is not made."""
    stored = model.dtype
    state = jax.eval_shape(lambda: jc.init_state(model.config, policy, slots, batch=batch, dtype=stored))
    return sum(part.nbytes for part in state)


def per_row(model: Decoder, policy: jc.Policy, slots: int) -> int:
    """Bytes that one row more takes."""
    return state_bytes(model, policy, slots, 2) - state_bytes(model, policy, slots, 1)


def weight_bytes(model: Decoder) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))


def largest_batch(model: Decoder, policy: jc.Policy, slots: int, limit: int) -> int:
    """Rows whose states fit beside the weights."""
    row = per_row(model, policy, slots)
    shared = state_bytes(model, policy, slots, 1) - row
    return max((limit - weight_bytes(model) - shared) // row, 0)


@jax.jit
def read_block(model: Decoder, ids: jax.Array, state: jc.State, policy: jc.Policy) -> jc.State:
    return jc.read(model, ids, state, policy, chunk=ids.shape[1]).state


def filled(model: Decoder, policy: jc.Policy, slots: int, batch: int, tokens: int) -> jc.State:
    """A state after so many random tokens."""
    state = jc.init_state(model.config, policy, slots, batch=batch, dtype=model.dtype)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, tokens), np.int32)
    for start, stop, _, _ in calls("chunked", tokens, chunk=128, segment=128):
        state = read_block(model, jnp.asarray(ids[:, start:stop]), state, policy)
    return state


def speeds(model: Decoder, policy: jc.Policy, slots: int, batch: int, args: Arguments) -> dict[str, float]:
    """Tokens per second of all rows together: of the bounded state, and of the full cache if it fits."""
    states: dict[str, Any] = {SPEED: (policy, filled(model, policy, slots, batch, slots))}
    full = jc.get_policy("full")
    if batch <= largest_batch(model, full, args.context, int(args.memory * 2**30)):
        states[FULL] = (full, filled(model, full, args.context, batch, args.context - args.steps))
    runs = {name: lambda one=one: decode(model, one[1], one[0], args.steps) for name, one in states.items()}
    return {name: batch * args.steps / seconds for name, seconds in in_turn(args.repeats, **runs).items()}


def plan(args: Arguments) -> Plan:
    model = args.load().model
    policies = {name: jc.get_policy(name) for name in ("full", args.policy)}
    limit = int(args.memory * 2**30)
    sizes = [("full", args.context), *((args.policy, slots) for slots in args.slots)]
    make_cell = args.cells_of(EXPERIMENT, model, args.context)
    made = lambda task, name, slots, settings: make_cell(
        task=task, policy=name, slots=slots, settings=settings | dict(memory=args.memory)
    )
    measured = dict(steps=args.steps, repeats=args.repeats, device=device())
    cells = [made(MEMORY, name, slots, {}) for name, slots in sizes]
    cells += [
        made(f"batch {batch}", args.policy, slots, measured | dict(batch=batch))
        for batch in args.batches
        for slots in args.slots
    ]

    def figures(cell: Cell) -> Iterator[Figure]:
        policy, slots = policies[cell.policy], args.context if cell.policy == "full" else int(np.max(cell.slots))
        facts: dict[str, Any] = dict(state_bytes=per_row(model, policy, slots))
        if cell.task == MEMORY:
            rows = largest_batch(model, policy, slots, limit)
            weights = dict(weight_bytes=weight_bytes(model))
            yield Figure(metric=BATCH, value=float(rows), tokens=slots, samples=1, details=weights, **facts)
            return
        batch = cell.settings["batch"]
        if batch > (most := largest_batch(model, policy, slots, limit)):
            raise ValueError(f"{batch} rows do not fit into {args.memory} GiB, {most} do; give more --memory")
        found = speeds(model, policy, slots, batch, args)
        jax.clear_caches()  # programs of other sizes would only fill memory
        facts |= dict(samples=args.repeats, tokens=batch * args.steps * args.repeats, tokens_per_second=found[SPEED])
        if FULL in found:
            found[RATIO] = found[SPEED] / found[FULL]
        yield from (Figure(metric=metric, value=value, **facts) for metric, value in found.items())

    return cells, figures


def line(row: Row) -> str:
    return f"{row.cell.task:12} {row.cell.policy:12} {row.cell.slots:6} {row.figure.metric:40} {row.figure.value:10.2f}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: a line for each size of the state."""
    rows = of_experiment(rows, EXPERIMENT)
    if not rows:
        return ["no rows"]
    sizes = list(dict.fromkeys((row.cell.policy, row.cell.slots) for row in rows))
    batches = sorted({row.cell.settings["batch"] for row in rows if "batch" in row.cell.settings})
    found = {(row.cell.policy, row.cell.slots, row.cell.settings.get("batch"), row.figure.metric): row for row in rows}
    sized = {size: next(row for row in rows if (row.cell.policy, row.cell.slots) == size) for size in sizes}
    whole = {
        batch: [row.figure.value for row in rows if row.figure.metric == FULL and row.cell.settings["batch"] == batch]
        for batch in batches
    }

    def speed(policy: str, slots: Any, batch: int) -> str:
        if policy == "full":
            return f"{statistics.median(whole[batch]):,.0f}" if whole[batch] else "does not fit"
        mine, over = (found.get((policy, slots, batch, metric)) for metric in (SPEED, RATIO))
        if mine is None:
            return ""
        return f"{mine.figure.value:,.0f}" + ("" if over is None else f" ({over.figure.value:.2f} ×)")

    def entries(policy: str, slots: Any) -> list[str]:
        largest = found.get((policy, slots, None, BATCH))
        return [
            f"`{policy}`", f"{slots:,}", f"{sized[policy, slots].figure.state_bytes / 2**20:,.2f}",
            "" if largest is None else f"{largest.figure.value:,.0f}", *(speed(policy, slots, n) for n in batches),
        ]  # fmt: skip

    first = rows[0].cell
    devices = sorted({row.cell.settings["device"] for row in rows if "device" in row.cell.settings})
    return [
        f"{first.model}, {first.dtype}, {'; '.join(devices)}. The full cache holds {first.context:,} tokens. Largest "
        f"batch in {first.settings['memory']:g} GiB, weights included. Tokens per second of decoding, all rows "
        "together, medians; in brackets the ratio to the full cache in the same run.",
        "",
        *markdown(
            ["policy", "slots", "MiB of a row", BATCH, *(f"tokens/s, batch {batch}" for batch in batches)],
            (entries(*size) for size in sizes),
        ),
    ]


if __name__ == "__main__":
    args = arguments(QUICK)
    run(args, lambda: plan(args), table, line, experiment=EXPERIMENT, apart=("batch",))
