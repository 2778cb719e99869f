"""Policies that were learned: a small network gives each token its numbers when it enters (see `forget_head`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.policies.cache_view import CacheView, Observation, Scope
from jaxcompress.policies.forget_head import KEEP_EVERYTHING, ForgetHead, check_used, token_numbers
from jaxcompress.policies.geometry import for_set
from jaxcompress.policies.policy import Policy, leaf, policy
from jaxcompress.policies.protect import protected
from jaxcompress.state.kv_state import Stats
from jaxcompress.state.placement import unrotated
from jaxcompress.state.shapes import SlotScores

LIKE_TOVA = (0.0, 1.0, 0.0, 0.0)
"""What `Retention` starts from: the logarithm of the newest query's attention."""
EPSILON = 1e-8  # below it, attention is none


class Decided(NamedTuple):
    """What `DMS` knows of a token, [B, P, N] each.

    Attributes:
      fate: the logit that decides about it; without its successor's part as long as it waits.
      before: its part of the logit of the token before it.
      waits: 1 if its successor has not come yet; such a token is among the newest, which are protected.
      at: its position.
      owner: in a pool its kv head, else 0.
    """

    fate: Array
    before: Array
    waits: Array
    at: Array
    owner: Array


@policy
class DMS(Policy):
    """Keeps the tokens of highest logit among those that are older than `window` tokens; newer ones are protected.

        score[n] = first number of token n + second number of the token after it
        score[n] = +inf for the `window` newest tokens

    Dynamic memory sparsification (Łańcucki et al. 2025, "Inference-Time Hyper-Scaling with KV Cache Compression"), with
    the timing of the published code: a token's fate is known when its successor has come, and is carried out once more
    than `window` tokens have come after it. Differences: logits rank the tokens of a fixed number of slots instead of
    being cut at zero. They come from key and value instead of the residual stream; there the successor alone decides,
    since its residual has seen the token, and here both do. Before training all logits are equal: the first tokens and
    the `window` newest stay.

    Attributes:
      head: R = 2.
      window: as in training.
      scope: "kv_head", or "pool": heads then share a layer's slots as their logits ask for, as in the paper, where
        they need not keep equally many.

    Raises:
      ValueError: weights that do not fit together, a window below 1, or another scope; when it is used, a model whose
        layers or heads the weights are not for.
    """

    label = "dms"
    watches = 1  # type: ignore[assignment]

    head: ForgetHead = leaf()
    window: int = 64
    scope: Scope = "kv_head"

    def check(self) -> None:
        _check_head(self.head, len(KEEP_EVERYTHING), "dms")
        _check_scope("dms", self.scope, ("kv_head", "pool"))
        if self.window < 1:
            raise ValueError(f"a window of {self.window} tokens: give 1 or more, for a token's successor to come")

    def shields(self, capacity: int) -> tuple[int, int]:
        return 0, self.window

    def init(self, incoming: CacheView) -> Stats:
        numbers = _entering(self.head, incoming)
        owner = jnp.zeros_like(incoming.positions) if incoming.owner is None else incoming.owner
        after, waits = _of_next(numbers[..., 1], incoming, owner)
        return Decided(numbers[..., 0] + after, numbers[..., 1], waits, incoming.positions, owner)

    def observe(self, stats: Decided, seen: Observation) -> Stats:
        # Two tokens of a head wait at most: the newest, and the newest of the block before.
        waiting = jnp.where(stats.waits > 0, stats.at, jnp.iinfo(jnp.int32).max)
        oldest = waiting.min(-1, keepdims=True)
        for head in range(self.head.inner.shape[1] if self.scope == "pool" else 1):
            mine = stats.owner == head
            came = (stats.at == oldest + 1) & mine
            decided = (waiting == oldest) & mine & came.any(-1, keepdims=True)
            part = jnp.where(came, stats.before, 0.0).sum(-1, keepdims=True)
            fate = jnp.where(decided, stats.fate + part, stats.fate)
            stats = stats._replace(fate=fate, waits=jnp.where(decided, 0.0, stats.waits))
        return stats

    def score(self, stats: Decided, held: CacheView) -> SlotScores:
        return protected(stats.fate, held, recent=self.window)


def _of_next(part: Float[Array, "B P N"], incoming: CacheView, owner: Array) -> tuple[Array, Array]:
    """The part of the token after each token of a block, 0 for the last; and 1 for the last, which waits, else 0."""
    n, after, waits = part.shape[-1], jnp.zeros_like(part), jnp.zeros_like(part)
    for head in range(1 if incoming.owner is None else incoming.context.heads[1]):
        mine = incoming.occupied & (owner == head)
        here = jax.lax.cummin(jnp.where(mine, jnp.arange(n), n), axis=part.ndim - 1, reverse=True)
        following = jnp.pad(here[..., 1:], [*[(0, 0)] * (part.ndim - 1), (0, 1)], constant_values=n)
        found = jnp.take_along_axis(part, jnp.minimum(following, n - 1), axis=-1)
        after = jnp.where(mine & (following < n), found, after)
        waits = jnp.where(mine & (following == n), 1.0, waits)
    return after, waits


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

    Before training a, b2, b3 = 0 and b1 = 1: TOVA of the same scope. The `recent` newest tokens are protected: too few
    queries have looked at them to tell.

    Attributes:
      head: R = 4.
      scope: "kv_head", "pool" (heads share a layer's slots), or "layer" (one set; numbers are averaged over kv heads).
      recent: as in training.

    Raises:
      ValueError: weights that do not fit together, another scope or a negative number; when it is used, a model whose
        layers or heads the weights are not for.
    """

    label = "retention"

    head: ForgetHead = leaf()
    scope: Scope = "kv_head"
    recent: int = 0

    def check(self) -> None:
        _check_head(self.head, len(LIKE_TOVA), "retention")
        _check_scope("retention", self.scope, ("kv_head", "layer", "pool"))
        if self.recent < 0:
            raise ValueError(f"recent is a number of tokens, 0 or more, not {self.recent}")

    def shields(self, capacity: int) -> tuple[int, int]:
        return 0, self.recent

    def init(self, incoming: CacheView) -> Stats:
        weights = for_set(_entering(self.head, incoming), incoming)
        nothing = jnp.zeros_like(incoming.positions, jnp.float32)
        return Looked(tuple(weights[..., i] for i in range(len(LIKE_TOVA))), nothing, nothing)

    def observe(self, stats: Looked, seen: Observation) -> Stats:
        received = seen.per_set(self.scope)
        row, present = seen.last(received)
        return stats._replace(last=jnp.where(present, row, stats.last), total=stats.total + seen.total(self.scope))

    def score(self, stats: Looked, held: CacheView) -> SlotScores:
        return protected(foreseen(stats, held.newest - held.positions), held, recent=self.recent)


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
    check_used(head, which, keys.shape[-1], context.layers)
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
