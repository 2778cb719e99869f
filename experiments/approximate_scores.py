"""What approximate scores lose: unobserved queries, sketched keys, and scores computed every n-th step.

    python experiments/approximate_scores.py

Every approximation reads the same held-out text as its exact policy, token by token. Each holds the tokens that it
chose itself, so differences add up over the text. From the first full state on, `held` is how many tokens a query of
the approximation sees, and `in both` the share of these that the exact policy holds too. `window+4`, which uses no
attention, is there for scale. +- is the standard error of the mean difference over tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from command import OfModel, arguments

import jaxcompress as jc
from jaxcompress.embedded.corpus import held_out
from jaxcompress.evaluation import rows_of_text
from jaxcompress.evaluation.lifetimes import occupancy
from jaxcompress.policies.names import get_policy

APPROXIMATIONS = {
    "tova": tuple(f"tova/sampled{n}" for n in (2, 4, 8, 16)),
    "h2o": tuple(f"h2o/sampled{n}" for n in (2, 4, 8, 16)),
    "rkv/every16": tuple(f"rkv-sketch{n}/every16" for n in (4, 8, 16)),
    "snapkv+16": tuple(f"snapkv+16/every{n}" for n in (4, 16, 64)),
}
NOTHING = "window+4"


@dataclass(frozen=True)
class Arguments(OfModel):
    """Prints a line per policy."""

    policies: tuple[str, ...] = tuple(APPROXIMATIONS)
    """Exact policies; each is run with its approximations."""
    slots: int = 128
    context: int = 1024
    rows: int = 8
    out: Path | None = None
    """Also write the results here (JSON)."""


QUICK = Arguments(quick=True, policies=("snapkv+16",), slots=80, context=112, rows=1)


def main(args: Arguments) -> None:
    loaded = args.load()
    model, tokenizer = loaded.model, loaded.tokenizer
    text = np.concatenate([tokenizer.encode(document.text, add_bos=False) for document in held_out()])
    rows, table = rows_of_text(text, args.context, args.rows, tokenizer.bos_id), []

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        """Death times [L, B, P, T] and losses [T', B] of the tokens that meet a full state."""
        trace = jc.trace(model, rows, get_policy(name), args.slots)
        logits = trace.logits[args.slots - 1 : -1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        target = np.take_along_axis(logits, rows.T[args.slots :, :, None], axis=-1)[..., 0]
        return trace.death, np.log(np.exp(logits).sum(-1)) - target

    print(f"{args.slots} slots, {args.rows} rows of {args.context} tokens")
    print(f"{'exact':14}{'approximate':24}{'held':>7}{'in both':>9}{'nats':>8}{'exact':>8}{'more':>9}{'+-':>8}")
    nothing = read(NOTHING)
    for exact in args.policies:
        want, best = read(exact)
        for name in (*APPROXIMATIONS[exact], NOTHING):
            death, losses = nothing if name == NOTHING else read(name)
            held = occupancy(np.broadcast_to(death, want.shape))
            both, more = occupancy(np.minimum(death, want)) / held, losses - best
            row = dict(
                exact=exact, approximate=name, held=held[..., args.slots :].mean(), both=both[..., args.slots :].mean(),
                nats=losses.mean(), exact_nats=best.mean(), more=more.mean(), error=more.std(ddof=1) / more.size**0.5,
            )  # fmt: skip
            table.append({key: x if isinstance(x, str) else float(x) for key, x in row.items()})
            print(
                f"{exact:14}{name:24}{row['held']:7.1f}{row['both']:9.1%}{row['nats']:8.4f}{row['exact_nats']:8.4f}"
                f"{row['more']:+9.4f}{row['error']:8.4f}", flush=True,
            )  # fmt: skip
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(arguments(QUICK))
