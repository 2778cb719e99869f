"""What an uneven allocation of slots to layers and heads gains, at equal totals, on the embedded model.

    python experiments/slot_sharing.py --out runs/slot_sharing.json

Heads are measured on held-out documents that are not used in the evaluation. Every line of the table has the same total
number of slots; its bytes are measured.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from command import OfModel, arguments

import jaxcompress as jc
from jaxcompress.budgets.allocate import proportional, pyramid, retrieval_split, total
from jaxcompress.budgets.calibration import attention_spread, retrieval_heads
from jaxcompress.embedded.corpus import held_out
from jaxcompress.evaluation import answers, exam, perplexity, rows_of_text, wording
from jaxcompress.policies import H2O, TOVA, Full, Window


@dataclass(frozen=True)
class Arguments(OfModel):
    """Measures heads, shares slots by what was found, and reads text and recall tasks with them."""

    out: Path = Path("runs/slot_sharing.json")
    context: int = 2048
    """Tokens of a row."""
    questions: int = 8
    """Facts in each row, approximately."""
    rows: int = 4
    """Rows of text, and rows of recall tasks."""
    slots: tuple[int, ...] = (64, 128, 256)
    """Mean capacities of the bounded lines."""
    streaming: int = 36
    """Slots of a head that is not a retrieval head (4 sinks and 32 recent tokens)."""
    lessons: int = 8
    """Rows of recall tasks by which heads are measured."""
    near: int = 64
    """Recent tokens that streaming heads see while retrieval heads are looked for."""
    every: int = 1
    """Take only every n-th line of the table."""


QUICK = Arguments(
    quick=True,
    out=Path("runs/quick/slot_sharing.json"),
    rows=1,
    questions=2,
    lessons=1,
    context=256,
    slots=(64,),
    near=16,
    streaming=12,
    every=12,
)


def main(args: Arguments) -> None:
    loaded = args.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    context, bos = args.context, tokenizer.bos_id
    encode = lambda text: tokenizer.encode(text, add_bos=False).tolist()
    text = np.concatenate([encode(document.text) for document in held_out()])
    spare, text = text[: len(text) // 4], text[len(text) // 4 :]
    words = wording(tokenizer.vocabulary(), encode)
    say = lambda *what: print(*what, flush=True)

    begun = time.perf_counter()
    spread = np.asarray(attention_spread(model, jnp.asarray(rows_of_text(spare, 1024, 4, bos))))
    say(f"spread of attention, layers by kv heads ({time.perf_counter() - begun:.0f} s):\n{spread.round(1)}")
    begun = time.perf_counter()
    lessons = exam(spare, words, rows=args.lessons, length=512, notes=4, questions=4, bos=bos)
    found = retrieval_heads(
        model, np.stack([x.tokens for x in lessons]), np.stack([x.asked for x in lessons]), recent=args.near
    )
    say(f"gates ({time.perf_counter() - begun:.0f} s):\n{found.gates.round(2)}")

    rows = rows_of_text(text, context, args.rows, bos)
    tasks = exam(text, words, rows=args.rows, length=context, notes=args.questions, questions=args.questions, bos=bos)
    heads, table, number = spread.size, [], count()
    say(f"\n{'policy':18}{'shared':16}{'slots':>8}{'KiB':>7}{'perplexity':>12}{'with facts':>12}{'recall':>8}")

    def line(policy: jc.Policy, shared: str, slots: Any) -> None:
        if next(number) % args.every:
            return
        read = perplexity(model, rows, policy, slots)
        given = answers(model, tasks, policy, slots)
        mean, kib = float(np.mean(slots)), read.state_bytes / len(rows) / 1024
        with_facts = math.exp(np.mean(given.nats))
        row = dict(
            policy=policy.name, shared=shared, slots=slots, mean=mean, kib=kib,
            perplexity=read.perplexity, with_facts=with_facts, recall=given.accuracy,
        )  # fmt: skip
        table.append(row)
        say(
            f"{policy.name:18}{shared:16}{mean:8.1f}{kib:7.0f}{read.perplexity:12.2f}"
            f"{with_facts:12.2f}{given.accuracy:8.0%}"
        )
        result = dict(
            spread=spread.tolist(), gates=found.gates.tolist(), retrieval=found.retrieval.tolist(), table=table
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1))

    # DuoAttention: retrieval heads hold everything, the others sinks and recent tokens.
    near = args.near + 4
    duo = retrieval_split(found.retrieval, context, near)
    mean = total(duo) // heads
    line(Full(), "", context)
    line(Window(4, scope="kv_head"), "retrieval", duo)
    line(Window(4, scope="kv_head"), "not retrieval", retrieval_split(~found.retrieval, context, near))
    line(Window(4, scope="kv_head"), "uniform", mean)
    line(TOVA("kv_head"), "uniform", mean)
    for mean in args.slots:
        retrieval = found.retrieval.sum()
        rest = mean * heads - (heads - retrieval) * args.streaming
        shares: dict[str, Any] = {
            "uniform": mean,
            "pyramid": pyramid(mean, model.config.num_layers),
            "spread": proportional(spread, mean, least=8),
            "gates": proportional(found.gates, mean, least=args.streaming),
            "retrieval": retrieval_split(found.retrieval, int(rest // retrieval), args.streaming),
        }
        for shared, slots in shares.items():
            line(TOVA("kv_head"), shared, slots)
        line(TOVA(), "uniform", mean)
        line(TOVA(), "pyramid", shares["pyramid"])
        line(TOVA(), "gates", proportional(found.gates.sum(1), mean, least=args.streaming))  # of each layer
        for policy in (H2O(0.5, "kv_head"), Window(4, scope="kv_head")):
            for shared in ("uniform", "gates"):
                line(policy, shared, shares[shared])


if __name__ == "__main__":
    main(arguments(QUICK))
