"""A policy's numbers per token and per row: their shapes and types, and whether a state has them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.policies.cache_view import CacheView, LayerContext
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import KVState, Memory, Stats


def numbers_of(
    policy: Policy, context: LayerContext, *, batch: int, head_dim: int, capacity: int, pooled: bool
) -> tuple[Stats, Memory]:
    """Shapes and types of one token's stats [B, P, 1, ...] and of the memory [B, ...], in a layer of this context.

    Args:
      capacity: of a set; in a pool, of all heads together.
    """
    heads = policy.heads(*context.heads)
    shape = lambda *size, dtype=jnp.float32: jax.ShapeDtypeStruct(size, dtype)

    def numbers(keys: Any, positions: Any, owner: Any, seen: Any, layer: Any, out: Any) -> tuple[Any, Any]:
        one = CacheView(keys, keys, positions, owner, seen, layer, (), capacity, context._replace(out=out))
        memory = policy.memory(one)
        return policy.init(one._replace(memory=memory)), memory

    return jax.eval_shape(
        numbers, shape(batch, heads, 1, head_dim), shape(batch, policy.sets(heads), 1, dtype=jnp.int32),
        shape(batch, 1, 1, dtype=jnp.int32) if pooled else None, shape(batch, dtype=jnp.int32),
        shape(dtype=jnp.int32), context.out,
    )  # fmt: skip


def check_numbers(policy: Policy, state: KVState, stats: Stats, memory: Memory) -> None:
    """Raises ValueError if a state has other numbers than the policy needs, as `numbers_of` gives them."""
    if _kind(stats, 3) != _kind(state.stats, 4):
        raise not_made_for(policy, "numbers for each slot", _described(state.stats, 4), _described(stats, 3))
    if _kind(memory, 1) != _kind(state.memory, 2):
        raise not_made_for(policy, "numbers for each row", _described(state.memory, 2), _described(memory, 1))


def not_made_for(policy: Policy, what: str, has: Any, needs: Any) -> ValueError:
    """The error of a state that another policy made."""
    return ValueError(
        f"the state was not made for policy {policy.name}: it has {has} {what}, the policy needs {needs}; make it with "
        "init_state(config, policy, slots), and go on with the policy that it was made for"
    )


def _kind(numbers: Any, leading: int) -> Any:
    """Signature of a policy's numbers: structure, types, and the axes after the first `leading` ones."""
    return jax.tree.structure(numbers), [(x.dtype, x.shape[leading:]) for x in jax.tree.leaves(numbers)]


def _described(numbers: Any, leading: int) -> str:
    one = lambda x: f"{x.dtype} {list(x.shape[leading:])}" if x.shape[leading:] else f"{x.dtype}"
    return ", ".join(map(one, jax.tree.leaves(numbers))) or "no"
