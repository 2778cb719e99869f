"""Finds the fastest block sizes of a kernel on this machine's device, and saves them where kernels look for them.

python experiments/tune_kernels.py --slots 512 --batch 8
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from command import Command, arguments, stop

from jaxcompress.pallas_kernels import tuning
from jaxcompress.pallas_kernels.dispatch import LIMITS, check_device, kernels
from jaxcompress.pallas_kernels.types import KernelCall, Name, Op
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.storage import store_vectors, zeros


@dataclass(frozen=True)
class Arguments(Command):
    """Times every size that fits, for each operation."""

    backend: Literal["tpu", "gpu", "tpu-interpret", "gpu-interpret"] = "tpu"
    ops: tuple[Literal["step", "step_evict", "segment", "block"], ...] = ("step", "step_evict", "segment", "block")
    slots: int = 512
    """Slots of the state: capacity + 1."""
    batch: int = 8
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    sets: Literal["shared", "per head"] = "shared"
    dtype: str = "bfloat16"
    """Dtype of the state. Queries are bfloat16, or float32 if the state is float32."""
    tokens: int = 512
    """Tokens of a segment and of a block."""
    repeats: int = 20


QUICK = Arguments(
    quick=True, backend="tpu-interpret", ops=("step",), slots=16, batch=1, kv_heads=2, group=1, tokens=8, repeats=1
)


def main(args: Arguments) -> None:
    if args.quick:  # sizes for so small a call are of no use
        os.environ["XDG_CACHE_HOME"] = "runs/quick/cache"
    if not args.backend.endswith("interpret"):
        try:
            check_device(cast(Name, args.backend))
        except ValueError as error:
            stop(str(error))
    name = cast(Name, args.backend)
    limits: Any = LIMITS[name.removesuffix("-interpret")]
    for op in args.ops:
        call, (arrays, static) = example(args, op)
        why = limits.declines(op, call)
        if why:
            print(f"{op}: {why}")
            continue
        kernel = partial(getattr(kernels(name), op), interpret=args.backend.endswith("interpret"), **static)
        compiled: dict[str, Any] = {}

        def measure(size: tuning.Sizes, kernel: Any = kernel, arrays: Any = arrays, compiled: Any = compiled) -> Any:
            if str(size) not in compiled:
                compiled[str(size)] = jax.jit(lambda *args: kernel(*args)).lower(*arrays).compile()
            return compiled[str(size)](*arrays)

        best = tuning.tune(op, call, limits.candidates(op, call), measure, repeats=args.repeats)
        print(f"{op}: {best}, of {len(limits.candidates(op, call))}; kept in {tuning.path()}")


def example(args: Arguments, op: Op) -> tuple[KernelCall, Any]:
    """A call in the middle of a sequence, and its arguments."""
    b, k, g, s, d = args.batch, args.kv_heads, args.group, args.slots, args.head_dim
    sets, many = (1 if args.sets == "shared" else k), op in ("segment", "block")
    t = args.tokens if many else 1
    query = "float32" if args.dtype == "float32" else "bfloat16"
    rule = EvictionRule("last") if op in ("step_evict", "segment") else None
    n = s + t if op == "block" else s
    call = KernelCall(b, k, g, n, d, sets, t, args.dtype, query, rule)
    like = zeros((1, d), args.dtype)
    normal = lambda *shape: jax.random.normal(jax.random.key(0), shape)
    vectors = lambda *shape: (store_vectors(normal(*shape, d), like), store_vectors(normal(*shape, d), like))
    held = jnp.broadcast_to(jnp.arange(n), (b, sets, n))
    numbers, there = jnp.ones((b, sets, s)), jnp.ones(b, bool)
    if op == "block":
        at = jnp.broadcast_to(s + jnp.arange(t), (b, t))
        return call, ((normal(b, t, k, g, d).astype(query), at, *vectors(b, k, n), held, None), {})
    stored, layer = vectors(1, b, k, s), jnp.int32(0)
    if op == "segment":
        free = held.at[:, :, -1].set(-1)
        at = jnp.broadcast_to(s + jnp.arange(t), (b, t))
        q = normal(b, t, k, g, d).astype(query)
        return call, ((q, vectors(b, t, k), stored, layer, at, free, numbers, None), dict(rule=rule))
    q, index = normal(b, k, g, d).astype(query), jnp.full((b, sets), s - 1, jnp.int32)
    if op == "step":
        return call, ((q, vectors(b, k), stored, layer, index, held >= 0, there), {})
    return call, ((q, vectors(b, k), stored, layer, index, held, numbers, there), dict(rule=rule))


if __name__ == "__main__":
    main(arguments(QUICK))
