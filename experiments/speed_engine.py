"""What continuous batching gains and costs, measured in one run.

  python experiments/speed_engine.py --model smollm2

rate       tokens a second with so many requests at once / with one after another, by `generate`; and by transformers
           in batches with a full cache, where torch and transformers are installed
first      time to the first token of short requests while a long prompt is being read, 50th and 99th percentile
admission  milliseconds to write a fresh row, and a prefix's row
prefix     a prompt whose prefix is known / the same prompt read again
memory     bytes of all rows
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from command import OfModel, arguments

import jaxcompress as jc
from jaxcompress.generation import generate
from jaxcompress.generation.sampling import row_keys
from jaxcompress.models.modes import calls
from jaxcompress.serving import Engine, PoolSpec, PrefixLimits, Request
from jaxcompress.serving.pool import Pool


@dataclass(frozen=True)
class Arguments(OfModel):
    """Prints the results as JSON lines."""

    policy: str = "tova"
    slots: int = 256
    rows: int = 32
    concurrent: tuple[int, ...] = (1, 8, 32)
    requests: int = 32
    """Requests of `rate`."""
    prompts: tuple[int, int] = (1000, 4000)
    """Shortest and longest prompt of `rate`, in tokens."""
    written: int = 256
    """Tokens of each answer."""
    long: int = 30_000
    """Tokens of the long prompt of `first`."""
    shorts: int = 50
    """Short requests that come while it is read."""
    segment: int = 128
    group: int = 8
    parts: tuple[str, ...] = ("rate", "first", "admission", "prefix")
    out: Path | None = None
    """Also write the results here (JSON)."""


QUICK = Arguments(
    quick=True, slots=16, rows=4, concurrent=(1, 4), requests=4, prompts=(20, 60), written=8, long=600, shorts=4,
    segment=32,
)  # fmt: skip


def timed(run: Any) -> tuple[float, Any]:
    begun = time.perf_counter()
    found = jax.block_until_ready(run())
    return time.perf_counter() - begun, found


def prompts_of(args: Arguments, vocabulary: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    lengths = np.linspace(*args.prompts, args.requests).astype(int)
    return [draw.integers(0, vocabulary, length).astype(np.int32) for length in lengths]


def of_each_width(prompts: list[np.ndarray], segment: int) -> list[np.ndarray]:
    """The beginnings of prompts, enough for every program that reading all of them takes.

    `generate` pads the last piece of a prompt to a width, and reads those before it in pieces of `segment`.
    """
    found = {}
    for prompt in prompts:
        size = len(prompt) if len(prompt) <= segment else segment + (len(prompt) - 1) % segment + 1
        found.setdefault(
            tuple(call.width for call in calls("streaming", size, chunk=1, segment=segment)), prompt[:size]
        )
    return list(found.values())


def measure_rate(
    engine: Engine, spec: PoolSpec, prompts: list[np.ndarray], args: Arguments
) -> Iterator[dict[str, Any]]:
    def alone(prompts: list[np.ndarray]) -> None:
        for prompt in prompts:
            for _ in generate(
                spec.model, [prompt], spec.policy, spec.slots, max_new_tokens=args.written, segment=args.segment
            ):
                pass

    def together(most: int) -> None:
        waiting, running = list(prompts), []
        while waiting or running:
            while waiting and len(running) < most:
                running.append(engine.submit(Request(waiting.pop(), args.written)))
            running.pop(0).answer()

    alone(of_each_width(prompts, args.segment))  # compiles
    total = len(prompts) * args.written
    base, _ = timed(lambda: alone(prompts))
    yield dict(part="rate", what="one after another by generate", tokens_s=total / base, ratio=1.0)
    for most in args.concurrent:
        seconds, _ = timed(lambda most=most: together(most))
        yield dict(part="rate", what=f"{most} at once", tokens_s=total / seconds, ratio=base / seconds)
    if find_spec("torch") is None:
        print("transformers is left out: torch is not installed", file=sys.stderr)
        return
    peer = peer_of(spec.model)
    for most in args.concurrent:
        seconds, _ = timed(
            lambda most=most: [peer(prompts[at : at + most], args.written) for at in range(0, len(prompts), most)]
        )
        what = f"transformers, batches of {most}"
        yield dict(part="rate", what=what, tokens_s=total / seconds, ratio=base / seconds)


def peer_of(model: jc.Decoder) -> Callable[[list[np.ndarray], int], None]:
    """transformers' `generate` on the same weights: (prompts, tokens to write) -> nothing."""
    import torch  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        theirs = AutoModelForCausalLM.from_pretrained(jc.save(model, folder), dtype=torch.float32).eval()

    def write(prompts: list[np.ndarray], tokens: int) -> None:
        longest = max(map(len, prompts))
        rows = torch.tensor(
            np.stack([np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]).astype(np.int64)
        )
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad():
            theirs.generate(
                rows, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )

    return write


def measure_first(engine: Engine, prompts: list[np.ndarray], args: Arguments) -> list[dict[str, Any]]:
    long = np.resize(np.concatenate(prompts), args.long)
    quiet, busy = [], []
    short = lambda: Request(prompts[0][: args.segment], 4)
    for times in (quiet, busy):
        reading = engine.submit(Request(long, 1)) if times is busy else None
        for _ in range(args.shorts):
            ticket = engine.submit(short())
            ticket.answer()
            assert ticket.times.first is not None
            times.append(ticket.times.first - ticket.times.submitted)
        if reading is not None:
            during = reading.times.first is None
            reading.cancel()
            reading.answer()
            if not during:
                print("the long prompt was read before all short requests were sent", flush=True)
    rows = []
    for name, times in (("nothing else", quiet), (f"beside a prompt of {args.long:,} tokens", busy)):
        p50, p99 = np.percentile(times, (50, 99))
        rows.append(dict(part="first", what=name, p50_ms=1e3 * p50, p99_ms=1e3 * p99))
    return rows


def measure_admission(spec: PoolSpec) -> list[dict[str, Any]]:
    pool, keys = Pool(spec), row_keys([0])
    pool.warm_up()
    known = jax.device_get(pool.take(0)._replace(keys=None))._replace(keys=keys)  # type: ignore[arg-type]

    def admit(row: Any) -> float:
        seconds = []
        for n in range(21):
            begun = time.perf_counter()
            pool.admit(n % spec.rows, keys, row)
            jax.block_until_ready(pool._arrays)
            seconds.append(time.perf_counter() - begun)
        return 1e3 * statistics.median(seconds[1:])

    fresh, prefix = admit(None), admit(known)
    one = pool.nbytes / spec.rows
    return [dict(part="admission", fresh_ms=fresh, prefix_ms=prefix, row_mib=one / 2**20, pool_mib=pool.nbytes / 2**20)]


def measure_prefix(spec: PoolSpec, prompts: list[np.ndarray], args: Arguments) -> list[dict[str, Any]]:
    prompt = prompts[-1]
    with Engine({"one": spec}, prefixes=PrefixLimits()) as engine:
        engine.submit(Request(prompts[0], 1)).answer()
        first = engine.submit(Request(prompt, 1))
        again, _ = timed(lambda: first.answer())
        second = engine.submit(Request(prompt, 1))
        known, answer = timed(lambda: second.answer())
    return [
        dict(
            part="prefix",
            tokens=len(prompt),
            known=answer.known_tokens,
            read_s=again,
            known_s=known,
            ratio=again / known,
        )
    ]


def main(args: Arguments) -> None:
    loaded = args.load()
    spec = PoolSpec(
        loaded.model, jc.get_policy(args.policy), args.slots, args.rows, segment=args.segment, group=args.group
    )
    prompts, rows = prompts_of(args, loaded.model.config.vocab_size), []
    engine = Engine({"one": spec})
    begun = time.perf_counter()
    with engine:
        print(json.dumps(dict(part="start", seconds=round(time.perf_counter() - begun, 1))), flush=True)
        for part in args.parts:
            found = {
                "rate": lambda: measure_rate(engine, spec, prompts, args),
                "first": lambda: measure_first(engine, prompts, args),
                "admission": lambda: measure_admission(spec),
                "prefix": lambda: measure_prefix(spec, prompts, args),
            }[part]()
            for row in found:
                rows.append(row)
                shown = {name: round(x, 3) if isinstance(x, float) else x for name, x in row.items()}
                print(json.dumps(shown), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(arguments(QUICK))
