"""Policies that were learned: a small network gives each token its numbers when it enters (see `forget_head`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.policies.cache_view import CacheView, Observation, Scope
from jaxcompress.policies.forget_head import ForgetHead, token_numbers
from jaxcompress.policies.geometry import for_set
from jaxcompress.policies.policy import Policy, leaf, policy
from jaxcompress.policies.protect import protected
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.placement import unrotated
from jaxcompress.state.shapes import SlotScores

LIKE_TOVA = (0.0, 1.0, 0.0, 0.0)
"""What `Retention` starts from: the logarithm of the newest query's attention."""
EPSILON = 1e-8  # below it, attention is none


@policy
class DMS(Policy):
    """Keeps the tokens of highest logit among those that are older than `window` tokens; newer ones are protected.

        score[n] = logit that a network gave n's key and value
        score[n] = +inf for the `window` newest tokens

    Dynamic memory sparsification (Łańcucki et al. 2025, "Inference-Time Hyper-Scaling with KV Cache Compression"). A
    token's fate is decided when it enters and carried out `window` tokens later, so that its neighbours can still use
    it. Two differences from the paper: logits rank the tokens of a fixed number of slots instead of being cut at zero,
    and they come from key and value instead of a borrowed neuron of the query. Before training all logits are equal:
    the first tokens and the `window` newest stay.

    Attributes:
      head: R = 1.
      window: as in training.
      scope: "kv_head", or "pool": heads then share a layer's slots as their logits ask for, as in the paper, where
        they need not keep equally many.

    Raises:
      ValueError: weights that do not fit together, a negative window, or another scope; when it is used, a model whose
        heads the weights are not for.
    """

    label = "dms"

    head: ForgetHead = leaf()
    window: int = 16
    scope: Scope = "kv_head"

    def check(self) -> None:
        _check_head(self.head, 1, "dms")
        _check_scope("dms", self.scope, ("kv_head", "pool"))
        if self.window < 0:
            raise ValueError(f"a window of {self.window} tokens: give 0 or more")

    @property
    def needs(self) -> int:  # type: ignore[override]
        return self.window + 1

    def init(self, incoming: CacheView) -> Stats:
        return _entering(self.head, incoming)[..., 0]

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return protected(stats, held, recent=self.window)


class Looked(NamedTuple):
    """What `Retention` knows of a token, [B, P, N] each.

    Attributes:
      weights: a, b1, b2, b3.
      last: the attention of the newest query, averaged over the heads that share the set.
      total: the same, summed over all queries so far.
    """

    weights: tuple[Array, ...]
    last: Array
    total: Array


@policy
class Retention(Policy):
    """Keeps the tokens that later queries will attend to most, as a network foresees.

    The network gives each token four numbers a, b1, b2, b3 when it enters. With the attention that it received since,

        score = a + b1 log(newest query's attention) + b2 log(mean attention per query) + b3 log(age + 1).

    Before training a, b2, b3 = 0 and b1 = 1: TOVA of the same scope.

    Attributes:
      head: R = 4.
      scope: "kv_head", "pool" (heads share a layer's slots), or "layer" (one set; numbers are averaged over kv heads).

    Raises:
      ValueError: weights that do not fit together or another scope; when it is used, a model whose heads the weights
        are not for.
    """

    label = "retention"

    head: ForgetHead = leaf()
    scope: Scope = "kv_head"

    def check(self) -> None:
        _check_head(self.head, len(LIKE_TOVA), "retention")
        _check_scope("retention", self.scope, ("kv_head", "layer", "pool"))

    def init(self, incoming: CacheView) -> Stats:
        weights = for_set(_entering(self.head, incoming), incoming)
        nothing = jnp.zeros_like(incoming.positions, jnp.float32)
        return Looked(tuple(weights[..., i] for i in range(len(LIKE_TOVA))), nothing, nothing)

    def observe(self, stats: Looked, seen: Observation) -> Stats:
        received = seen.per_set(self.scope)
        row, present = seen.last(received)
        return stats._replace(last=jnp.where(present, row, stats.last), total=stats.total + seen.total(self.scope))

    def score(self, stats: Looked, held: CacheView) -> SlotScores:
        return foreseen(stats, held.newest - held.positions)


def foreseen(seen: Looked, age: Any) -> SlotScores:
    """The score of `Retention`, and in training the logit of future attention; `age` in tokens."""
    start, last, mean, old = seen.weights
    age = age.astype(jnp.float32) + 1
    log = lambda x: jnp.log(x + EPSILON)
    return start + last * log(seen.last) + mean * log(seen.total / age) + old * jnp.log(age)


def _entering(head: ForgetHead, incoming: CacheView) -> Float[Array, "B K N R"]:
    """The numbers of tokens that enter, from keys as they are cached; in a pool K is 1."""
    context, keys, owner = incoming.context, incoming.keys.astype(jnp.float32), incoming.owner
    which = context.which if owner is None else tuple(range(context.heads[1]))
    _check_used(head, which, keys.shape[-1])
    if context.placement == "absolute":
        keys = unrotated(context.rotate, keys, incoming.positions)
    mine = jax.tree.map(lambda x: x[incoming.layer], head)
    if which != tuple(range(head.inner.shape[1])):
        mine = jax.tree.map(lambda x: x[jnp.array(which)], mine)
    if owner is None:
        return token_numbers(mine, keys, incoming.values)
    shape = (keys.shape[0], len(which), *keys.shape[2:])  # what every head would say, and then its own
    numbers = token_numbers(mine, *(jnp.broadcast_to(x, shape) for x in (keys, incoming.values)))
    return jnp.take_along_axis(numbers, owner[..., None], axis=1)


def _check_used(head: ForgetHead, which: tuple[int, ...], head_dim: int) -> None:
    """Checks heads and width. How many layers the model has is not known here."""
    kv_heads = head.inner.shape[1]
    if max(which) >= kv_heads or head_dim != head.head_dim:
        raise ValueError(
            f"the weights are for {kv_heads} kv heads of width {head.head_dim}, the model has heads "
            f"{min(which)} to {max(which)} of width {head_dim}"
        )


def _check_head(head: ForgetHead, outputs: int, name: str) -> None:
    shapes = [tuple(x.shape) for x in head]
    *front, size, hidden = shapes[0] if len(shapes[0]) == 4 else (0,) * 4
    wanted = [(*front, size, hidden), (*front, hidden), (*front, hidden, outputs), (*front, outputs)]
    if shapes != wanted or size % 2 or size < 4:
        raise ValueError(
            f"{name} needs weights [L, K, 2D + 2, M], [L, K, M], [L, K, M, {outputs}] and [L, K, {outputs}], not "
            f"{', '.join(str(list(shape)) for shape in shapes)}"
        )


def _check_scope(name: str, scope: str, known: tuple[str, ...]) -> None:
    if scope not in known:
        raise ValueError(f"{name} has numbers per kv head: its scope is {' or '.join(known)}, not {scope}")
