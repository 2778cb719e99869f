"""Finds the fastest sizes of a kernel's blocks on the device at hand, and keeps them where kernels look for them.

python experiments/tune_kernels.py --slots 512 --batch 8
python experiments/tune_kernels.py --backend tpu-interpret --slots 16 --batch 1 --kv-heads 2 --tokens 8 --repeats 1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import tyro

from jaxcompress.pallas_kernels import tuning
from jaxcompress.pallas_kernels.contract import Call, Name, Op, Rule, check_device, load
from jaxcompress.storage import store, zeros


@dataclass(frozen=True)
class Tune:
    """Times every size that fits, for each operation."""

    backend: Literal["tpu", "gpu", "tpu-interpret", "gpu-interpret"] = "tpu"
    ops: tuple[Literal["step", "step_evict", "segment", "block"], ...] = ("step", "step_evict", "segment", "block")
    slots: int = 512
    """Slots of the state, capacity and 1."""
    batch: int = 8
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    sets: Literal["shared", "per head"] = "shared"
    dtype: str = "bfloat16"
    """Of the state; queries are bfloat16, or float32 with a state of float32."""
    tokens: int = 512
    """Of a segment and of a block."""
    repeats: int = 20

    def run(self) -> None:
        if not self.backend.endswith("interpret"):
            check_device(cast(Name, self.backend))
        kernels = load(cast(Name, self.backend))
        if not hasattr(kernels, "candidates"):
            raise SystemExit(f"the {self.backend} kernels have no sizes to try")
        for op in self.ops:
            call, (args, static) = self.example(op)
            why = kernels.declines(op, call)
            if why:
                print(f"{op}: {why}")
                continue
            kernel = partial(getattr(kernels, op), interpret=self.backend.endswith("interpret"), **static)
            compiled: dict[str, Any] = {}

            def measure(size: tuning.Sizes, kernel: Any = kernel, args: Any = args, compiled: Any = compiled) -> Any:
                if str(size) not in compiled:
                    compiled[str(size)] = jax.jit(lambda *args: kernel(*args)).lower(*args).compile()
                return compiled[str(size)](*args)

            best = tuning.tune(op, call, kernels.candidates(op, call), measure, repeats=self.repeats)
            print(f"{op}: {best}, of {len(kernels.candidates(op, call))}; kept in {tuning.path()}")

    def example(self, op: Op) -> tuple[Call, Any]:
        """A call in the middle of a sequence, and its arguments."""
        b, k, g, s, d = self.batch, self.kv_heads, self.group, self.slots, self.head_dim
        sets, many = (1 if self.sets == "shared" else k), op in ("segment", "block")
        t = self.tokens if many else 1
        query = "float32" if self.dtype == "float32" else "bfloat16"
        rule = Rule("last") if op in ("step_evict", "segment") else None
        n = s + t if op == "block" else s
        call = Call(b, k, g, n, d, sets, t, self.dtype, query, rule)
        like = zeros((1, d), self.dtype)
        normal = lambda *shape: jax.random.normal(jax.random.key(0), shape)
        vectors = lambda *shape: (store(normal(*shape, d), like), store(normal(*shape, d), like))
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
    tyro.cli(Tune).run()
