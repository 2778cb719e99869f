"""Kernels on one device, or on each device of a mesh for its own rows and heads.

Nothing is sent between devices here: rows are independent, and so are kv heads, each with its own query heads. Where
heads share a set, the mean over heads is taken afterwards, on what a step returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxcompress.pallas_kernels.types import Chosen, On
from jaxcompress.state.eviction_rule import EvictionRule

# Axes of each argument: rows, heads, sets (1, or one per kv head), or none of these.
_B, _K, _P = "rows", "heads", "sets"
_STORED = (None, _B, _K)


def step(chosen: Chosen, q, new, stored, layer, index, visible, present):
    """See `Kernels.step`."""
    run = lambda *args: chosen.kernels.step(*args, interpret=chosen.interpret)
    ins = ((_B, _K), (_B, _K), _STORED, (), (_B, _P), (_B, _P), (_B,))
    outs = ((_B, _K), (_B, _K), _STORED)
    return _spread(run, chosen.on, index.shape[1], ins, outs)(q, new, stored, layer, index, visible, present)


def step_evict(chosen: Chosen, q, new, stored, layer, index, held, numbers, present, rule: EvictionRule):
    """See `Kernels.step_evict`."""
    run = lambda *args: chosen.kernels.step_evict(*args, rule=rule, interpret=chosen.interpret)
    ins = ((_B, _K), (_B, _K), _STORED, (), (_B, _P), (_B, _P), (_B, _P), (_B,))
    outs = ((_B, _K), (_B, _P), (_B, _P), _STORED)
    return _spread(run, chosen.on, index.shape[1], ins, outs)(q, new, stored, layer, index, held, numbers, present)


def block(chosen: Chosen, q, at, keys, values, held, window):
    """See `Kernels.block`."""
    run = lambda *args: chosen.kernels.block(*args, interpret=chosen.interpret)
    ins = ((_B, None, _K), (_B,), (_B, _K), (_B, _K), (_B, _P), ())
    outs = ((_B, None, _K), (_B, _K), (_B, _K))
    return _spread(run, chosen.on, held.shape[1], ins, outs)(q, at, keys, values, held, window)


def segment(chosen: Chosen, q, new, stored, layer, positions, held, numbers, window, rule: EvictionRule):
    """See `Kernels.segment`."""
    run = lambda *args: chosen.kernels.segment(*args, rule=rule, interpret=chosen.interpret)
    ins = ((_B, None, _K), (_B, None, _K), _STORED, (), (_B,), (_B, _P), (_B, _P), ())
    outs = ((_B, None, _K), _STORED, (_B, _P), (_B, _P), (_B, _P))
    return _spread(run, chosen.on, held.shape[1], ins, outs)(q, new, stored, layer, positions, held, numbers, window)


def _spread(run: Callable[..., Any], on: On | None, sets: int, ins: Any, outs: Any) -> Callable[..., Any]:
    if on is None:
        return run
    axes = {_B: on.rows, _K: on.heads, _P: on.heads if sets > 1 else None, None: None}
    spec = lambda names: PartitionSpec(*(axes[name] for name in names))
    return jax.shard_map(
        run, mesh=on.mesh, in_specs=tuple(map(spec, ins)), out_specs=tuple(map(spec, outs)), check_vma=False
    )
