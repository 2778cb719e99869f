"""What a state costs and loses when keys and values are stored in fewer bits.

    python experiments/storage.py

For every dtype: bytes of a token's key in one head, loss and recall of the embedded model on held-out rows with facts,
and a decoding step's time as a ratio to the first dtype's, float32 (medians of steps taken in turn, a model of random
weights, the state full).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from command import OfModel, arguments
from speed_decode import decode, decoder_of_width, in_turn

import jaxcompress as jc
from jaxcompress.embedded.corpus import held_out
from jaxcompress.evaluation.recall import answers, exam, wording
from jaxcompress.policies.names import get_policy
from jaxcompress.state.storage import DTYPES, vector_bytes


@dataclass(frozen=True)
class Arguments(OfModel):
    """Prints a line per dtype."""

    policy: str = "tova"
    slots: int = 128
    context: int = 1024
    rows: int = 8
    questions: int = 8
    """Facts in each row, approximately."""
    dtypes: tuple[str, ...] = DTYPES
    wide: int = 1024
    """Slots of the state whose steps are timed."""
    batch: int = 8
    """Rows of the state whose steps are timed."""
    steps: int = 64
    repeats: int = 5
    out: Path | None = None
    """Also write the results here (JSON)."""


QUICK = Arguments(
    quick=True,
    slots=16,
    context=96,
    rows=1,
    questions=2,
    dtypes=("float32", "int8"),
    wide=16,
    batch=1,
    steps=24,
    repeats=1,
)


def main(args: Arguments) -> None:
    loaded = args.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    encode = lambda text: tokenizer.encode(text, add_bos=False)
    text = np.concatenate([encode(document.text) for document in held_out()])
    words = wording(tokenizer.vocabulary(), lambda text: encode(text).tolist())
    tasks = exam(
        text,
        words,
        rows=args.rows,
        length=args.context,
        notes=args.questions,
        questions=args.questions,
        bos=tokenizer.bos_id,
    )
    policy, table = get_policy(args.policy), []
    wide = decoder_of_width(256)
    states = {}
    for dtype in args.dtypes:
        state = jc.init_state(wide.config, policy, args.wide, batch=args.batch, dtype=dtype)
        states[dtype], _ = decode(wide, state, policy, args.wide + 8)
    seconds = in_turn(
        args.repeats,
        **{name: lambda state=state: decode(wide, state, policy, args.steps) for name, state in states.items()},
    )
    print(f"{jax.devices()[0].device_kind}, {args.policy}, {args.slots} slots of {args.context}, {args.rows} rows")
    for dtype in args.dtypes:
        given = answers(model, tasks, policy, args.slots, dtype=dtype)
        row = dict(
            dtype=dtype, vector_bytes=vector_bytes(model.config.head_dim, dtype), state_bytes=given.state_bytes,
            nats=float(given.nats.mean()), recall=given.accuracy, step=seconds[dtype] / seconds[args.dtypes[0]],
        )  # fmt: skip
        table.append(row)
        print(f"{dtype:15}{row['vector_bytes']:5} bytes{given.state_bytes / 1024:9,.0f} KiB{row['nats']:8.4f} nats"
              f"{given.accuracy:7.0%}{row['step']:7.2f}", flush=True)  # fmt: skip
    if args.out is not None:
        args.out.write_text(json.dumps(dict(vars(args), out=str(args.out), table=table), indent=2) + "\n")


if __name__ == "__main__":
    main(arguments(QUICK))
