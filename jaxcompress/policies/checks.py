"""Whether something is a policy, and gives what a policy gives."""

from __future__ import annotations

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxcompress.policies.cache_view import CacheView, Observation
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.placement import Placement
from jaxcompress.state.shapes import SlotScores


def check_policy(policy: Any) -> None:
    """Raises ValueError if something is no policy; says what it is and how to get one."""
    if isinstance(policy, Policy):
        return
    if isinstance(policy, str):
        told = f"its name {policy!r}: write jaxcompress.get_policy({policy!r})"
    elif hasattr(policy, "make"):
        told = "one as it was saved: call its make()"
    elif callable(policy) and hasattr(policy, "__name__"):
        told = f"{policy.__name__} itself: call it, {policy.__name__}()"
    else:
        told = f"{policy!r:.60}; the model comes first, then tokens or a state, then the policy, then numbers"
    raise ValueError(f"a policy is expected, such as jaxcompress.get_policy('tova'), not {told}")


def check_epsilon(epsilon: float | int) -> None:
    """Raises ValueError if a number that a policy adds to its scores is negative or not finite."""
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be 0 or more, not {epsilon}")


def check_placement(placement: Any) -> None:
    """Raises ValueError if there is no placement of that name."""
    if placement is not None and placement not in get_args(Placement):
        raise ValueError(f"unknown placement: it is one of {', '.join(get_args(Placement))}, not {placement!r}")


def check_placed(policy: Policy, placement: Placement | None = None) -> None:
    """Raises ValueError if the tokens that a policy holds cannot stand there, or no placement is called so; None: where
    the policy places them.

    Re-indexed positions count the tokens that one head holds; a pool holds those of all heads in one order.
    """
    check_placement(placement)
    for one in policy.layers or (policy,):
        placed = placement or one.placement
        if one.scope == "pool" and placed != "absolute":
            raise ValueError(
                f"policy {one.name} lets heads share a pool of slots, where tokens stand at absolute positions, not at "
                f"placement {placed!r}: give placement='absolute', or a policy that scores heads apart, with scope "
                "kv_head"
            )


def checked_scores(policy: Policy, stats: Stats, held: CacheView) -> SlotScores:
    """`policy.score`, without gradient. Of the tokens with score +inf, those that `policy.shields` counts come first:
    there is room for them in any state, and for the others, such as the rest of a protected token's chunk, perhaps not.

    Raises:
      ValueError: it gives something else than [B, P, N] numbers.
    """
    given = policy.score(stats, held)
    shape, dtype = getattr(given, "shape", None), getattr(given, "dtype", None)
    if shape != held.positions.shape or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"score of policy {policy.name} must be floats [B, P, N] = {list(held.positions.shape)}, one for each of "
            f"N candidates of P sets, got {_described(given)}; its scope is {policy.scope!r}. Keys and values have an "
            "axis of kv heads: average over it, .mean(1, keepdims=True), or take the scope 'kv_head'"
        )
    if any(counted := policy.shields(held.per_set)):
        given = jnp.where(jnp.isposinf(given) & ~held.among(*counted), jnp.finfo(dtype).max, given)
    return jax.lax.stop_gradient(given)


def checked_stats(policy: Policy, stats: Stats, seen: Observation) -> Stats:
    """`policy.observe`, without gradient.

    Raises:
      ValueError: it gives numbers of other shapes or dtypes than it was given.
    """
    after = policy.observe(stats, jax.lax.stop_gradient(seen))
    shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
    if jax.tree.structure(after) != jax.tree.structure(stats) or shapes(after) != shapes(stats):
        raise ValueError(
            f"observe of policy {policy.name} must give numbers like those it was given, {_described(stats)}, got "
            f"{_described(after)}"
        )
    return after


def _described(tree: Any) -> str:
    """Dtypes and shapes of what a policy gave."""
    if hasattr(tree, "shape") and hasattr(tree, "dtype"):
        return f"{tree.dtype} {list(tree.shape)}"
    parts = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    arrays = bool(parts) and all(hasattr(x, "shape") for x in parts)
    return f"({', '.join(map(_described, parts))})" if arrays else repr(tree)
