"""What a fixed memory costs and saves, as ratios measured in one run (medians, with both sides run alternately).

    python experiments/speed_decode.py

  step     a TOVA decoding step / a step of plain attention over as many fixed slots
  flat     seconds per token at token 100,000 / at token 1,000, and peak memory likewise
  read     an exact streaming read of a prompt / the same token by token through the whole model / plain full attention
  start    seconds from starting `jaxcompress generate` to its first text, compilation cache warm

"Plain full attention" is `jax.nn.dot_product_attention`, JAX's own. The library's `causal_attention`, which skips
blocks above the diagonal and is faster on a CPU, is reported beside it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from command import Command, arguments
from flax import nnx

import jaxcompress as jc
from jaxcompress.cli.runtime import peak_memory
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.rope import rotate
from jaxcompress.recurrence.attention import slot_attention
from jaxcompress.recurrence.block_attention import causal_attention


@dataclass(frozen=True)
class Arguments(Command):
    """Prints the ratios as JSON lines."""

    slots: int = 128
    prompt: int = 2048
    long: int = 100_000
    """Second point of `flat`, in tokens."""
    batches: tuple[int, ...] = (1, 8)
    """Rows of `step`."""
    steps: int = 256
    """Timed steps of `step`."""
    widths: tuple[int, ...] = (256, 512)
    """Widths of the models of random weights on which `read` runs beside the embedded model."""
    starts: int = 3
    """Timed starts of the program; one start before them fills the cache."""
    repeats: int = 7
    parts: tuple[str, ...] = ("step", "flat", "read", "start")
    out: Path | None = None
    """Also write the results here (JSON)."""


QUICK = Arguments(quick=True, slots=16, prompt=64, long=7000, batches=(2,), steps=24, repeats=1, widths=(), starts=1)


def decoder_of_width(width: int) -> Decoder:
    """Six layers of random weights, heads of 32 in pairs."""
    heads = width // 32
    config = DecoderConfig(2048, width, 3 * width, 6, heads, heads // 2, 32, tied=True)
    return Decoder(config, rngs=nnx.Rngs(0))


def in_turn(repeats: int, **runs: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each function. All run once per round; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


@partial(jax.jit, static_argnames="steps")
def decode(model: Decoder, state: jc.State, policy: jc.Policy, steps: int):
    """Greedy decoding, `steps` tokens."""

    def step(loop, _):
        state, token = loop
        done = jc.read(model, token, state, policy)
        return (done.state, model.logits(done.hidden).argmax(-1).astype(jnp.int32)), None

    batch = state[0].seen.shape[0]
    return jax.lax.scan(step, (state, jnp.zeros((batch, 1), jnp.int32)), length=steps)[0]


@partial(jax.jit, static_argnames=("steps", "slots", "batch"))
def decode_plain(model: Decoder, steps: int, slots: int, batch: int):
    """The same with a ring of fixed slots that are overwritten in turn: no scores, no eviction."""
    config = model.config
    ring = jnp.zeros((2, config.num_layers, batch, config.num_kv_heads, slots, config.head_dim))
    everything, present = jnp.ones((1, 1, 1, slots), bool), jnp.ones(batch, bool)

    def step(loop, now):
        keys, values, token = loop

        def attend(q, k, v, positions, layer, index, carry, xs):
            keys, values = carry
            at = positions[..., None]
            q, k = rotate(q, at, config.rope), rotate(k, at, config.rope)
            keys = keys.at[index, :, :, now % slots].set(k[:, 0])
            values = values.at[index, :, :, now % slots].set(v[:, 0])
            q = q[:, 0].reshape(batch, config.num_kv_heads, -1, config.head_dim)
            out, _ = slot_attention(q, keys[index], values[index], everything, present)
            return out.reshape(batch, 1, config.num_heads, config.head_dim), (keys, values), xs

        positions = jnp.full((batch, 1), now, jnp.int32)
        x, (keys, values), _ = model.run_layers(model.embed(token), positions, attend, (keys, values))
        token = model.logits(model.norm(x)).argmax(-1).astype(jnp.int32)
        return (keys, values, token), None

    return jax.lax.scan(step, (ring[0], ring[1], jnp.zeros((batch, 1), jnp.int32)), jnp.arange(steps))[0]


def measure_step(model: Decoder, args: Arguments) -> list[dict[str, Any]]:
    rows, steps, tova = [], args.steps, jc.get_policy("tova")
    for batch in args.batches:
        for slots in (args.slots, 8 * args.slots):
            state, _ = decode(model, jc.init_state(model.config, tova, slots, batch=batch), tova, slots + 8)  # full
            seconds = in_turn(
                args.repeats,
                tova=lambda state=state: decode(model, state, tova, steps),
                plain=lambda slots=slots, batch=batch: decode_plain(model, steps, slots + 1, batch),
            )
            ratio = seconds["tova"] / seconds["plain"]
            rows.append(dict(part="step", batch=batch, slots=slots, ratio=ratio, us=1e6 * seconds["tova"] / steps))
    return rows


def measure_flat(model: Decoder, args: Arguments) -> list[dict[str, Any]]:
    tova, block = jc.get_policy("tova"), 500
    state = jc.init_state(model.config, tova, args.slots)
    seconds, memory, at = {}, {}, 0
    jax.block_until_ready(decode(model, state, tova, block))
    early, late = range(1000, 6000), range(args.long - 5000, args.long)
    while at < args.long:
        begun = time.perf_counter()
        state, _ = jax.block_until_ready(decode(model, state, tova, block))
        for name, part in (("early", early), ("late", late)):
            if at in part:
                seconds.setdefault(name, []).append((time.perf_counter() - begun) / block)
                memory[name] = peak_memory()
        at += block
    early_s, late_s = (statistics.median(seconds[name]) for name in ("early", "late"))
    return [
        dict(part="flat", what="seconds per token", ratio=late_s / early_s, us=1e6 * late_s, at=args.long),
        dict(part="flat", what="peak memory", ratio=memory["late"] / memory["early"], mib=memory["late"] / 2**20),
    ]


@jax.jit
def stream(model: Decoder, ids: Any, state: jc.State, policy: jc.Policy):
    done = jc.read(model, ids, state, policy)
    return model.logits(done.hidden[:, -1:]), done.state


@jax.jit
def one_by_one(model: Decoder, ids: Any, state: jc.State, policy: jc.Policy):
    def step(state, token):
        done = jc.read(model, token[None, None], state, policy)
        return done.state, model.logits(done.hidden)[0, 0].max()

    return jax.lax.scan(step, state, ids[0])


@partial(jax.jit, static_argnames="attention")
def full(model: Decoder, ids: Any, attention: Callable[..., Any]):
    """The whole prompt at once; `attention` takes rotated q, k and v, and positions."""
    positions = jnp.arange(ids.shape[1], dtype=jnp.int32)[None]

    def attend(q, k, v, positions, layer, index, carry, xs):
        q, k = (rotate(x, positions[..., None], model.config.rope) for x in (q, k))
        return attention(q, k, v, positions), carry, xs

    x, _, _ = model.run_layers(model.embed(ids), positions, attend)
    return model.logits(model.norm(x[:, -1:]))


def jax_attention(q: Any, k: Any, v: Any, positions: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def measure_read(models: dict[str, Decoder], args: Arguments) -> list[dict[str, Any]]:
    rows, tova = [], jc.get_policy("tova")
    for name, model in models.items():
        ids = jax.random.randint(jax.random.key(0), (1, args.prompt), 0, model.config.vocab_size)
        state = jc.init_state(model.config, tova, args.slots)
        seconds = in_turn(
            max(args.repeats // 2, 3),
            stream=lambda model=model, ids=ids, state=state: stream(model, ids, state, tova),
            token=lambda model=model, ids=ids, state=state: one_by_one(model, ids, state, tova),
            jax=lambda model=model, ids=ids: full(model, ids, jax_attention),
            full=lambda model=model, ids=ids: full(model, ids, causal_attention),
        )
        us = 1e6 * seconds["stream"] / args.prompt
        for other, what in (("token", "token by token"), ("jax", "plain full attention"), ("full", "causal_attention")):
            ratio = seconds["stream"] / seconds[other]
            rows.append(dict(part="read", model=name, prompt=args.prompt, against=what, ratio=ratio, us=us))
    return rows


def measure_start(args: Arguments) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "jaxcompress.cli", "generate", "--prompt", "def main(", "--steps", "16"]
    seconds = []
    for _ in range(args.starts + 1):
        begun = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds.append(time.perf_counter() - begun)
    return [dict(part="start", seconds=statistics.median(seconds[1:]))]  # the first fills the cache


def main(args: Arguments) -> None:
    embedded = jc.load_embedded().model
    rows = []
    for part in args.parts:
        if part == "step":
            rows += measure_step(embedded, args)
        elif part == "flat":
            rows += measure_flat(embedded, args)
        elif part == "read":
            wider = {f"6 layers, width {width}": decoder_of_width(width) for width in args.widths}
            rows += measure_read({"embedded (4 layers, width 192)": embedded, **wider}, args)
        elif part == "start":
            rows += measure_start(args)
        else:
            raise SystemExit(f"unknown part {part!r}; known: step, flat, read, start")
        for row in rows:
            if row["part"] == part:
                print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(arguments(QUICK))
