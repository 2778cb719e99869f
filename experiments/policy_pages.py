"""What the documentation's page of each policy shows: what it keeps of one text, and what a step of it costs.

    python experiments/policy_pages.py --out docs/making/policies.json

The text is a held-out one, read token by token by the embedded model. A token's lifetimes in the layers and heads are
cut down to a few quantiles. Costs are those of `speed_policies.py`, on a model of random weights. Networks of policies
that are learned are fresh there. What the untrained ones of `dms` and `dmc` keep says nothing, so it is not shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from command import Command, arguments
from speed_policies import Arguments as Speed
from speed_policies import measured

import jaxcompress as jc
from jaxcompress.embedded.corpus import held_out
from jaxcompress.evaluation import token_texts
from jaxcompress.policies.names import get_policy
from jaxcompress.training import init_dms, init_gates, init_retention

POLICIES = (
    "window", "window+4", "streaming_llm+4", "tova", "h2o", "observed_attention", "scissorhands-recent8", "snapkv+8",
    "nacl", "rkv", "expected_attention", "knorm", "keydiff", "lagkv+8", "cur", "random", "full", "learned", "dms",
    "dmc",
)  # fmt: skip
FRESH: dict[str, Callable[[jc.DecoderConfig, jax.Array], jc.Policy]] = {
    "learned": lambda config, key: jc.policies.Retention(init_retention(config, key)),
    "dms": lambda config, key: jc.policies.DMS(init_dms(config, key), window=16),
    "dmc": lambda config, key: jc.policies.dmc(init_gates(config, key)),
}
"""Makes the policies that are learned, before training."""
QUANTILES = 5
DRAWN, DRAWN_SLOTS, DRAWN_LAYER = "tova", 5, 2


@dataclass(frozen=True)
class Arguments(Command):
    """Prints a line per policy."""

    policies: tuple[str, ...] = POLICIES
    text: str = "topics/raise"
    """Name of a held-out document of the embedded model."""
    start: int = 0
    """The token at which the text begins."""
    tokens: int = 192
    slots: int = 48
    """Of the state that reads the text."""
    sentence: str = "The value is a string that the function returns to the object of the module."
    """Is read for the drawing of a state over time."""
    speed: Speed = Speed(steps=32, repeats=15)
    """How steps are timed; its list of policies is this one's."""
    out: Path | None = None
    """Also write the results here (JSON)."""


QUICK = Arguments(
    quick=True, policies=("window", "full", "dmc"), tokens=32, slots=8,
    speed=Speed(quick=True, slots=16, width=64, steps=24, repeats=1),
)  # fmt: skip


def main(args: Arguments) -> None:
    loaded = jc.load_embedded()
    ids = loaded.tokenizer.encode(held_out(args.text)[0].text)[args.start :][: args.tokens]
    timed = replace(args.speed, policies=tuple(name for name in args.policies if name != "full"))
    speed = {row["policy"]: row for row in measured(timed, fresh)}
    shown = []
    for name in args.policies:
        costs = {key: speed.get(name, {}).get(key) for key in COSTS}
        if name in ("dms", "dmc"):
            shown.append(dict(policy=name, of=dict(dms="DMS", dmc="dmc")[name], **costs, deaths=None))
            print(f"{name:24}{'not trained':30}{costs['ratio']:.2f} of plain attention", flush=True)
            continue
        policy = get_policy(name, loaded.policy)
        slots = args.slots if policy.forgets else args.tokens
        death = jc.trace(loaded.model, ids[None], policy, slots).death[:, 0]  # [L, P, T]
        lives = np.quantile(death.reshape(-1, len(ids)), np.linspace(0, 1, QUANTILES), axis=0, method="nearest")
        row = dict(policy=name, of=type(policy).__name__, **costs)
        shown.append(row | dict(deaths=lives.astype(int).tolist()))
        ratio = f"{row['ratio']:.2f} of plain attention" if row["ratio"] else "not timed"
        print(f"{name:24}{(death == len(ids)).sum(-1).mean():6.1f} of {len(ids)} tokens held   {ratio}", flush=True)
    if args.out is not None:
        settings = dict(text=args.text, start=args.start, slots=args.slots, timed_slots=timed.slots)
        drawn = dict(policy=DRAWN, held=occupancy(loaded, args.sentence), tokens=texts_of(loaded, args.sentence))
        shown = dict(settings, tokens=token_texts(loaded.tokenizer, ids), state=drawn, policies=shown)
        args.out.write_text(json.dumps(shown, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")


def fresh(name: str, config: jc.DecoderConfig) -> jc.Policy:
    """The policy of a name; a learned one with a network as before training."""
    return FRESH[name](config, jax.random.key(0)) if name in FRESH else get_policy(name)


def occupancy(loaded: jc.Loaded, sentence: str) -> list[list[int]]:
    """What each slot held after each token, in the layer drawn: positions [step, slot], -1 where it was free."""
    ids = loaded.tokenizer.encode(sentence, add_bos=False)
    held = jc.trace(loaded.model, ids[None], get_policy(DRAWN), DRAWN_SLOTS).positions
    return held[DRAWN_LAYER, :, 0, 0].tolist()


def texts_of(loaded: jc.Loaded, sentence: str) -> list[str]:
    return token_texts(loaded.tokenizer, loaded.tokenizer.encode(sentence, add_bos=False))


COSTS = ("ratio", "kib")

if __name__ == "__main__":
    main(arguments(QUICK))
