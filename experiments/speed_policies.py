"""What a decoding step of every policy costs, as a ratio to plain attention over as many fixed slots.

    python experiments/speed_policies.py

The plain side overwrites a ring of slots in turn: no scores, no eviction. Figures are medians of steps run alternately,
with a full state. Policies whose scores need a sort or another pass over the keys are shown with scores at every step
and at every 16th.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from command import Command, arguments
from speed_decode import decode, decode_plain, decoder_of_width, in_turn

import jaxcompress as jc
from jaxcompress.policies.names import get_policy

POLICIES = (
    "tova", "window+4", "streaming_llm+4", "random", "h2o", "h2o-layer", "tova-kv_head", "tova-query_head",
    "observed_attention", "knorm", "scissorhands", "scissorhands/every16", "tova/sampled4", "snapkv+16",
    "snapkv+16/every16", "snapkv+16/critical/every16", "snapkv+16-pool/adaptive/every16", "tova-pool/adaptive",
    "tova-pool/adaptive/every16", "nacl", "nacl/every16",
    "keydiff", "keydiff/every16", "lagkv+16", "lagkv+16/every16", "cur", "cur/every16",
    "expected_attention", "expected_attention/every16", "rkv", "rkv/every16", "rkv-sketch16/every16",
    "tova/merge_nearest", "tova/mean_slots4",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments(Command):
    """Prints a line per policy."""

    policies: tuple[str, ...] = POLICIES
    slots: int = 256
    batch: int = 1
    width: int = 256
    """Width of the model: 6 layers of random weights."""
    steps: int = 128
    repeats: int = 5
    out: Path | None = None
    """Also write the results here (JSON)."""


QUICK = Arguments(quick=True, policies=("tova", "h2o"), slots=16, width=64, steps=24, repeats=1)


def measured(
    args: Arguments, made: Callable[[str, jc.DecoderConfig], jc.Policy] = lambda name, config: get_policy(name)
) -> Iterator[dict[str, Any]]:
    """One row per policy: its name, the ratio to plain attention, microseconds of a step, KiB of the state per row.

    Args:
      made: makes the policy of a name, for a model of this shape.
    """
    model = decoder_of_width(args.width)
    for name in args.policies:
        policy = made(name, model.config)
        if policy.needs > args.slots:
            continue
        state = jc.init_state(model.config, policy, args.slots, batch=args.batch)
        state, _ = decode(model, state, policy, args.slots + 8)  # full
        seconds = in_turn(
            args.repeats,
            policy=lambda state=state, policy=policy: decode(model, state, policy, args.steps),
            plain=lambda: decode_plain(model, args.steps, args.slots + 1, args.batch),
        )
        ratio = seconds["policy"] / seconds["plain"]
        kib = sum(part.nbytes for part in state) / args.batch / 1024
        yield dict(policy=name, ratio=ratio, us=1e6 * seconds["policy"] / args.steps, kib=kib)


def main(args: Arguments) -> None:
    print(f"{jax.devices()[0].device_kind}, {args.slots} slots, batch {args.batch}, width {args.width}")
    table = []
    for row in measured(args):
        table.append(row)
        print(f"{row['policy']:34}{row['ratio']:7.2f}{row['us']:9.0f} us/step{row['kib']:9,.0f} KiB", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(dict(vars(args), out=str(args.out), table=table), indent=2) + "\n")


if __name__ == "__main__":
    main(arguments(QUICK))
