"""reduce: what becomes of the tokens that are not kept: merged into what stays, or summarised beside it.

    policy = with_reduce(TOVA(), merge_weighted())

Merging changes values only, never keys: cached keys are rotated to their positions, and the mean of keys that stand at
different positions is the key of none. Summaries average keys before rotation, and cost memory of their own, which
counts towards the bytes of the state. What is chosen (who goes, who joins whom) has no gradient, what is added up does.

Tokens that leave a sliding window are dropped as ever. What a layer with fewer slots than its window has merged or
summarised before stays visible beyond the window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.attention import Summary
from jaxcompress.policies.base import (
    Absorbed,
    Around,
    Candidates,
    Entering,
    Gone,
    Incoming,
    Observation,
    Policy,
    leaf,
    policy,
    wrapper,
)
from jaxcompress.policies.combine import per_layer
from jaxcompress.policies.draws import per_token
from jaxcompress.shapes import SlotScores
from jaxcompress.state import Memory, Stats
from jaxcompress.values import Value, value

BLOCK = 128  # evicted tokens compared at once with what stays: bounds the memory of a one-shot prompt
_NEVER = jnp.iinfo(jnp.int32).max
_TINY = 1e-16  # squared norms below this count as this: what depends on the norm of a zero vector has a finite gradient


class Reduction(Value):
    """What becomes of evicted tokens. Every kv head is seen on its own, whoever shares a set in the policy.

    Attributes:
      weighs: whether slots get a bias from it (see `bias`).
      summarises: whether queries see stand-ins beside the slots (see `summary`).
    """

    weighs: bool = False
    summarises: bool = False

    @property
    def name(self) -> str:
        """For tables and messages."""
        return type(self).__name__

    def absorb(self, numbers: Stats, held: Candidates, gone: Gone) -> Absorbed:
        """What is held after tokens have gone. Positions and numbers are [B, K, N] or [B, K, M], keys and values
        float32, `owner` is None; memory is the reduction's own."""
        raise NotImplementedError

    def init(self, positions: Int[Array, "B K T"]) -> Stats:
        """The numbers of incoming tokens, of the shape of their positions each."""
        return ()

    def observe(self, numbers: Stats, mass: Float[Array, "B K N"]) -> Stats:
        """The numbers after a block of queries that gave this mass, the mean over a group's heads."""
        return numbers

    def memory(self, rows: int, heads: int, width: int) -> Memory:
        """Fresh memory of zeros, [B, K, ...] each."""
        return ()

    def bias(self, numbers: Stats) -> Float[Array, "B K N"]:
        """Added to attention scores, if it `weighs`."""
        raise NotImplementedError

    def summary(self, memory: Memory, around: Around) -> Summary:
        """Stand-ins seen beside the slots, if it `summarises`."""
        raise NotImplementedError


def with_reduce(policy: Policy, reduction: Reduction) -> Policy:
    """The policy, with evicted tokens reduced instead of dropped. What is kept follows the same rule as without.

    The policy's stats become (its own, the reduction's), and so does its memory. Of a policy with layers of their own,
    those that forget are given the reduction. Whatever works on scores may come before or after: `every(p, 16)` and
    `protect(p, first=4)` of a reduced p are the same as reducing these.

    Raises:
      ValueError: nothing is ever evicted, evicted before the new token is seen, or reduced already; or a summary where
        tokens do not stand at absolute positions.
    """
    if not isinstance(reduction, Reduction):
        raise TypeError(f"with_reduce needs a reduction such as merge_nearest(), not {reduction!r}")
    if policy.layers and any(one.evicts for one in policy.layers):
        return per_layer(*(reduced(one, reduction) if one.evicts else one for one in policy.layers))
    return reduced(policy, reduction)


@policy
class reduced(wrapper):
    """What `with_reduce` makes of a policy that is the same in all layers."""

    reduction: Reduction = leaf()
    reduces = True  # type: ignore[assignment]

    def check(self) -> None:
        one = self.policy
        if not one.evicts:
            raise ValueError(f"policy {one.name} never forgets, so there is nothing to reduce; give one that evicts")
        if one.schedule.when == "before":
            raise ValueError(f"policy {one.name} makes room before it sees a token; a reduction needs evict='after'")
        if one.reduces:
            raise ValueError(f"policy {one.name} reduces what it evicts already; give the policy without")
        _check_placement(one.name, one.placement, self.reduction)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.policy.name}/{self.reduction.name}"

    def __repr__(self) -> str:
        return f"with_reduce({self.policy!r}, {self.reduction!r})"

    @property
    def _heads(self) -> _PerHead:
        return _PerHead(self.policy)

    def score(self, stats: Stats, held: Candidates) -> SlotScores:
        return self.policy.score(stats[0], held._replace(memory=held.memory[0]))

    def init(self, incoming: Candidates) -> Stats:
        mine = self._heads.pack(self.reduction.init(self._heads.positions(incoming)))
        return self.policy.init(incoming._replace(memory=incoming.memory[0])), mine

    def observe(self, stats: Stats, seen: Observation) -> Stats:
        mass = seen.per_set("pool" if self.scope == "pool" else "kv_head").sum(2)
        mine = self._heads.pack(self.reduction.observe(self._heads.numbers(stats[1]), mass))
        return self.policy.observe(stats[0], seen), mine

    def memory(self, held: Candidates) -> Memory:
        rows, width = held.keys.shape[0], held.keys.shape[-1]
        return self.policy.memory(held), self.reduction.memory(rows, self._heads.count(held), width)

    def remember(self, memory: Memory, incoming: Incoming) -> Memory:
        return self.policy.remember(memory[0], incoming), memory[1]

    def enter(self, memory: Memory, incoming: Incoming, layer: Int[Array, ""], around: Around) -> Entering:
        entering = self.policy.enter(memory[0], incoming, layer, around)
        return entering._replace(memory=(entering.memory, memory[1]))

    def absorb(self, stats: Stats, held: Candidates, gone: Gone) -> Absorbed:
        _check_placement(self.policy.name, held.around.placement, self.reduction)
        heads = self._heads
        kept, lost = heads.split(held), heads.split_gone(gone, held.around)
        numbers = jax.tree.map(lambda x: jnp.broadcast_to(x, kept.positions.shape), heads.numbers(stats[1]))
        done = self.reduction.absorb(numbers, kept._replace(memory=held.memory[1]), lost)
        values, changed, numbers = heads.join(done, kept.positions)
        return Absorbed(values, changed, (stats[0], numbers), (held.memory[0], done.memory))

    def bias(self, stats: Stats) -> Float[Array, "B K N"] | None:
        theirs = self.policy.bias(stats[0])
        if not self.reduction.weighs:
            return theirs
        mine = self.reduction.bias(self._heads.numbers(stats[1]))
        return mine if theirs is None else mine + theirs

    def summary(self, memory: Memory, around: Around) -> Summary | None:
        if not self.reduction.summarises:
            return None
        _check_placement(self.policy.name, around.placement, self.reduction)
        return self._heads.shown(self.reduction.summary(memory[1], around), around)


def _check_placement(name: str, placement: str, reduce: Reduction) -> None:
    if reduce.summarises and placement != "absolute":
        raise ValueError(
            f"{reduce.name} needs tokens at absolute positions, policy {name} places them by {placement}; "
            "use placement='absolute' or merge instead"
        )


class _PerHead(NamedTuple):
    """Between the sets of a policy and single kv heads.

    Heads that share a set still merge each into another token, so that their numbers differ: they are kept as
    [B, 1, N, K]. Where every head has a set, and in a pool, they are [B, P, N].
    """

    policy: Policy

    def count(self, held: Candidates) -> int:
        """K of the layer, in a pool too."""
        return held.around.heads[1] if self.policy.scope == "pool" else held.keys.shape[1]

    def positions(self, incoming: Candidates) -> Array:
        """[B, P, T] -> [B, K, T]; in a pool, where every token has one head, as they are."""
        if self.policy.scope == "pool":
            return incoming.positions
        return jnp.broadcast_to(incoming.positions, incoming.keys.shape[:3])

    def numbers(self, stats: Stats) -> Stats:
        """[B, P, N, ...] -> [B, K, N]; in a pool [B, 1, N]."""
        return jax.tree.map(lambda x: jnp.moveaxis(x, -1, 1)[:, :, 0], stats) if self.policy.scope == "layer" else stats

    def pack(self, numbers: Stats) -> Stats:
        """Back again."""
        if self.policy.scope != "layer":
            return numbers
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, -1)[:, None], numbers)

    def split(self, held: Candidates) -> Candidates:
        """Every head with positions of its own. In a pool, keys and values of all are repeated for each head."""
        owner, k = held.owner, self.count(held)
        wide = lambda x: jnp.broadcast_to(x, (x.shape[0], k, *x.shape[2:]))
        positions = wide(held.positions)
        around = held.around
        if owner is not None:
            positions = jnp.where(owner == jnp.arange(k)[:, None], positions, -1)
            around = around._replace(which=tuple(range(k)))
        keys, values = (wide(x.astype(jnp.float32)) for x in (held.keys, held.values))
        return held._replace(keys=keys, values=values, positions=positions, owner=None, around=around)

    def split_gone(self, gone: Gone, around: Around) -> Gone:
        """Likewise."""
        k = around.heads[1] if gone.owner is not None else gone.keys.shape[1]
        wide = lambda x: jnp.broadcast_to(x, (x.shape[0], k, *x.shape[2:]))
        positions = wide(gone.positions)
        if gone.owner is not None:
            positions = jnp.where(gone.owner == jnp.arange(k)[:, None], positions, -1)
        keys, values = (wide(x.astype(jnp.float32)) for x in (gone.keys, gone.values))
        return Gone(keys, values, positions, jax.tree.map(wide, self.numbers(gone.stats[1])))

    def join(self, done: Absorbed, positions: Array) -> tuple[Array, Array, Stats]:
        """Values, what changed and numbers, as the policy has them."""
        if self.policy.scope != "pool":
            return done.values, done.changed, self.pack(done.stats)
        mine = positions >= 0  # each slot belongs to one head
        only = lambda x: jnp.where(mine.reshape(*mine.shape, *[1] * (x.ndim - 3)), x, 0).sum(1, keepdims=True)
        return only(done.values), (done.changed & mine).any(1, keepdims=True), jax.tree.map(only, done.stats)

    def shown(self, summary: Summary, around: Around) -> Summary:
        """In a pool, where all queries look at the same slots: each at the stand-ins of its own head."""
        if self.policy.scope != "pool":
            return summary
        b, k, m, d = summary.keys.shape
        own = jnp.arange(around.heads[0])[:, None] // around.group == jnp.arange(k * m) // m  # [H, K * M]
        bias = jnp.where(own, summary.bias.reshape(b, 1, 1, k * m), -jnp.inf)
        keys, values = (x.reshape(b, 1, k * m, d) for x in (summary.keys, summary.values))
        return summary._replace(keys=keys, values=values, bias=bias)


# Merging: values of what goes are added to values of what stays.


@value
class merge_nearest(Reduction):
    """Merges an evicted value into the kept token with the most similar key (kvpress's MergingPress).

    For evicted e and its target t, the kept token whose cached key has the largest cosine to e's:

      w_e = max(cos(k_e, k_t), 0) * |v_e| / (|v_e| + |v_t|)        v_t <- (v_t + sum w_e v_e) / (1 + sum w_e)

    The sums go over all tokens evicted at once into t. What is less similar than `threshold` is dropped.
    """

    threshold: float | int = 0.0

    def check(self) -> None:
        _check_share("threshold", self.threshold, -1.0)

    @property
    def name(self) -> str:
        return f"merge_nearest(threshold={self.threshold:g})" if self.threshold else "merge_nearest"

    def absorb(self, numbers: Stats, held: Candidates, gone: Gone) -> Absorbed:
        near = nearest(held, gone)
        size = _norm(gone.values)
        other = _norm(jnp.take_along_axis(held.values, near.target[..., None], axis=2))
        passes = near.found & (near.cosine >= self.threshold)
        weight = jnp.where(passes, jnp.maximum(near.cosine, 0.0) * size / (size + other), 0.0)
        total, weights = pour(near.target, weight, gone.values, held.values.shape[2])
        values = (held.values + total) / (1 + weights)[..., None]
        return Absorbed(values, weights > 0, numbers, held.memory)


@value
class merge_weighted(Reduction):
    """Merges an evicted value into the kept token with the most similar key: a mean of all that the slot stands for.

    Each slot carries n, how many tokens it stands for, and attention adds log n to its score (the proportional
    attention of Bolya et al. 2023, "Token Merging"):

      v_t <- (n_t v_t + sum n_e v_e) / (n_t + sum n_e)        n_t <- n_t + sum n_e

    so that merging tokens of equal key and value changes nothing, and tokens of equal key are merged without error. The
    mean of all values, weighted by n, stays what it was. A slot that many unlike tokens have joined draws as much
    attention as all of them and drowns what single tokens say: recall of single facts is lost.
    """

    weighs = True

    def absorb(self, numbers: Stats, held: Candidates, gone: Gone) -> Absorbed:
        near = nearest(held, gone)
        weight = jnp.where(near.found, gone.stats, 0.0)
        total, weights = pour(near.target, weight, gone.values, held.values.shape[2])
        together = jnp.maximum(numbers + weights, 1.0)[..., None]
        values = jnp.where(weights[..., None] > 0, (numbers[..., None] * held.values + total) / together, held.values)
        return Absorbed(values, weights > 0, numbers + weights, held.memory)

    def init(self, positions: Int[Array, "B K T"]) -> Stats:
        return jnp.ones(positions.shape, jnp.float32)

    def bias(self, numbers: Stats) -> Float[Array, "B K N"]:
        return jnp.log(jnp.maximum(numbers, 1.0))


@value
class cam(Reduction):
    """Spreads an evicted value evenly over the next kept tokens, by chance (Zhang et al. 2024, "CaM: Cache Merging").

    With the m <= `targets` oldest of the kept tokens younger than e, and mass a = all attention that a token received:

      v_t <- v_t + v_e / m  for each of them, with probability min(a_e / mean a_t, 1), else e is dropped

    The draw depends on seed, layer, head and position only. What is moved is mass, not a mean: values grow with every
    eviction, without bound where every step evicts.
    """

    targets: int = 32
    seed: int = 0

    def check(self) -> None:
        if self.targets < 1:
            raise ValueError(f"targets must be at least 1 token, not {self.targets}")

    @property
    def name(self) -> str:
        return f"cam{self.targets}"

    def absorb(self, numbers: Stats, held: Candidates, gone: Gone) -> Absorbed:
        kept = held.positions >= 0
        age = jnp.where(kept, held.positions, _NEVER)
        slots = jnp.broadcast_to(jnp.arange(age.shape[-1], dtype=jnp.int32), age.shape)
        order = jax.lax.sort((age, slots), num_keys=1)[1]
        rank = jnp.put_along_axis(jnp.zeros_like(order), order, slots, axis=-1, inplace=False)
        draw = per_token(self.seed, held._replace(positions=gone.positions))

        def block(sums: Any, parts: Any) -> Any:
            there, position, own, draw, values = parts
            older = (kept[:, :, None] & (age[:, :, None] <= position[..., None])).sum(-1, keepdims=True)
            nth = rank[:, :, None] - older
            chosen = (kept[:, :, None] & (nth >= 0) & (nth < self.targets)).astype(jnp.float32)  # [B, K, m, N]
            count = jnp.maximum(chosen.sum(-1), 1.0)
            mean = jnp.einsum("bkmn,bkn->bkm", chosen, numbers, precision="highest") / count
            share = jnp.where(there & (draw * mean < own), 1 / count, 0.0)[..., None] * chosen
            return _add(sums, share, values), ()

        parts = gone.positions >= 0, gone.positions, gone.stats, draw, gone.values
        (total, weights), _ = _in_blocks(block, _no_sums(held), parts)
        return Absorbed(held.values + total, weights > 0, numbers, held.memory)

    def init(self, positions: Int[Array, "B K T"]) -> Stats:
        return jnp.zeros(positions.shape, jnp.float32)

    def observe(self, numbers: Stats, mass: Float[Array, "B K N"]) -> Stats:
        return numbers + mass


class _Limit(NamedTuple):
    """[B, K] each: a running threshold, and whether there is one yet (1.0)."""

    threshold: Float[Array, "B K"]
    started: Float[Array, "B K"]


@value
class d2o(Reduction):
    """Merges an evicted value into the most similar kept token if it is similar enough (Wan et al. 2024, "D2O").

    "Enough" is a running mean of the largest cosines c_e between the keys of what went and of what stayed, one per row
    and kv head: the mean of the first eviction's, then old * threshold + new * mean at every later one. Those that
    reach it are averaged in:

      v_t <- (e v_t + sum exp(c_e) v_e) / (e + sum exp(c_e))

    The weights are the paper's; its code also merges rotated keys, which this does not.
    """

    old: float | int = 0.5
    new: float | int = 0.5

    def check(self) -> None:
        _check_share("old", self.old)
        _check_share("new", self.new)

    def absorb(self, numbers: Stats, held: Candidates, gone: Gone) -> Absorbed:
        near, before = nearest(held, gone), held.memory
        cosine = jax.lax.stop_gradient(near.cosine)
        count = near.found.sum(-1)
        mean = jnp.where(near.found, cosine, 0.0).sum(-1) / jnp.maximum(count, 1)
        limit = jnp.where(before.started > 0, self.old * before.threshold + self.new * mean, mean)
        limit = jnp.where(count > 0, limit, before.threshold)
        # A little slack, since the mean of equal numbers may be rounded up.
        weight = jnp.where(near.found & (cosine >= limit[..., None] - 1e-6), jnp.exp(near.cosine), 0.0)
        total, weights = pour(near.target, weight, gone.values, held.values.shape[2])
        values = (math.e * held.values + total) / (math.e + weights)[..., None]
        started = jnp.maximum(before.started, count > 0)
        return Absorbed(values, weights > 0, numbers, _Limit(limit, started))

    def memory(self, rows: int, heads: int, width: int) -> _Limit:
        return _Limit(jnp.zeros((rows, heads)), jnp.zeros((rows, heads)))


class Nearest(NamedTuple):
    """For each evicted token the kept token whose key is most similar.

    Attributes:
      target: its slot, [B, K, M]; the oldest of equals.
      cosine: [B, K, M], 0 where nothing was found.
      found: [B, K, M] bool, False for what is no token, and where nothing stays.
    """

    target: Int[Array, "B K M"]
    cosine: Float[Array, "B K M"]
    found: Bool[Array, "B K M"]


def nearest(held: Candidates, gone: Gone) -> Nearest:
    """Compares keys as they are cached, by cosine."""
    kept, scale = held.positions >= 0, 1 / _norm(held.keys)[:, :, None]
    age = jnp.where(kept, held.positions, _NEVER)[:, :, None]

    def block(carry: Any, keys: Array) -> Any:
        like = jnp.einsum("bkmd,bknd->bkmn", _unit(keys), held.keys, precision="highest") * scale
        seen = jax.lax.stop_gradient(jnp.where(kept[:, :, None], like, -jnp.inf))
        target = jnp.where(seen == seen.max(-1, keepdims=True), age, _NEVER).argmin(-1)
        return carry, (target, jnp.take_along_axis(like, target[..., None], axis=-1)[..., 0])

    target, cosine = _in_blocks(block, (), gone.keys)[1]
    found = (gone.positions >= 0) & kept.any(-1, keepdims=True)
    return Nearest(target, jnp.where(found, cosine, 0.0), found)


def pour(
    target: Int[Array, "B K M"], weight: Float[Array, "B K M"], values: Float[Array, "B K M D"], n: int
) -> tuple[Float[Array, "B K n D"], Float[Array, "B K n"]]:
    """Sums of weight * value and of weight over what goes into each of n places.

    As products with one-hot rows: unlike a scatter they add in the same order every time.

    Args:
      target: where each value goes; out of 0..n-1: nowhere.
    """
    places = jnp.arange(n)

    def block(sums: Any, parts: Any) -> Any:
        target, weight, values = parts
        return _add(sums, jnp.where(target[..., None] == places, weight[..., None], 0.0), values), ()

    b, k, _, d = values.shape
    nothing = jnp.zeros((b, k, n, d), jnp.float32), jnp.zeros((b, k, n), jnp.float32)
    return _in_blocks(block, nothing, (target, weight, values))[0]


def _no_sums(held: Candidates) -> tuple[Array, Array]:
    return jnp.zeros_like(held.values), jnp.zeros_like(held.values[..., 0])


def _add(sums: tuple[Array, Array], share: Array, values: Array) -> tuple[Array, Array]:
    """share [B, K, m, N] of values [B, K, m, D]. Full precision: an accelerator would round the values otherwise."""
    total = jnp.einsum("bkmn,bkmd->bknd", share, values, precision="highest")
    return sums[0] + total, sums[1] + share.sum(2)


def _in_blocks(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, parts: Any) -> tuple[Any, Any]:
    """Scans over blocks of evicted tokens, axis 2 of all parts and results, so that no array of all pairs exists."""
    m = jax.tree.leaves(parts)[0].shape[2]
    if m <= BLOCK:
        return body(carry, parts)
    n = -(-m // BLOCK)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, n * BLOCK - m) if axis == 2 else (0, 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], n, BLOCK, *x.shape[3:]), 2, 0)

    def whole(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], n * BLOCK, *x.shape[4:])[:, :, :m]

    carry, results = jax.lax.scan(body, carry, jax.tree.map(cut, parts))
    return carry, jax.tree.map(whole, results)


# Summaries: stand-ins that queries see beside the slots.


class MeanSlots(NamedTuple):
    """Stand-ins of `mean_slots`.

    Attributes:
      keys, values: [B, K, n, D], means; keys before rotation.
      position: [B, K, n], mean.
      count: [B, K, n], how many tokens each stands for.
    """

    keys: Float[Array, "B K n D"]
    values: Float[Array, "B K n D"]
    position: Float[Array, "B K n"]
    count: Float[Array, "B K n"]


@value
class mean_slots(Reduction):
    """Summarises what was evicted by n means per kv head, which every query sees beside the slots.

    An evicted token joins the stand-in whose mean key, before rotation, has the largest cosine to its own; empty ones
    are filled first. A stand-in is the running mean of keys (un-rotated), values and positions, and is seen at its mean
    position with log(how many it stands for) added to its score: exact where all of its keys are equal and stand in one
    place. An online k-means.

    Tokens that are evicted together join one after the other, the oldest first. Costs n * (2 D + 2) float32 numbers per
    row and kv head, as much as about n slots of float32.
    """

    n: int = 4
    summarises = True

    def check(self) -> None:
        if self.n < 1:
            raise ValueError(f"mean_slots needs at least 1 stand-in, not {self.n}")

    @property
    def name(self) -> str:
        return f"mean_slots{self.n}"

    def memory(self, rows: int, heads: int, width: int) -> MeanSlots:
        vectors, numbers = jnp.zeros((rows, heads, self.n, width)), jnp.zeros((rows, heads, self.n))
        return MeanSlots(vectors, vectors, numbers, numbers)

    def absorb(self, numbers: Stats, held: Candidates, gone: Gone) -> Absorbed:
        around, there = held.around, gone.positions >= 0
        # Rotating multiplies by the factor that some models put on cos and sin (YaRN): once in the cache, once here.
        factor = _norm(around.rotate(jnp.ones(gone.keys.shape[-1]), jnp.zeros(()))) / gone.keys.shape[-1] ** 0.5
        bare = around.rotate(gone.keys, -gone.positions) / jnp.square(factor)

        def join(old: MeanSlots, token: Any) -> Any:
            key, value, position, there = token  # [B, K, D], [B, K]
            like = jnp.einsum("bknd,bkd->bkn", _unit(old.keys), _unit(key), precision="highest")
            to = jnp.where(old.count == 0, jnp.inf, jax.lax.stop_gradient(like)).argmax(-1)
            here = (jnp.arange(self.n) == to[..., None]) & there[..., None]
            count = old.count + here
            share = jnp.where(here, 1 / jnp.maximum(count, 1.0), 0.0)
            means = old.keys, old.values, old.position[..., None]
            new = zip(means, (key, value, position[..., None]), strict=True)
            keys, values, position = (x + share[..., None] * (y[:, :, None] - x) for x, y in new)
            return MeanSlots(keys, values, position[..., 0], count), ()

        # The newest come first in what goes.
        tokens = bare, gone.values, gone.positions.astype(jnp.float32), there
        if gone.positions.shape[-1] == 1:
            new, _ = join(held.memory, tuple(x[:, :, 0] for x in tokens))
        else:
            new, _ = jax.lax.scan(join, held.memory, tuple(jnp.moveaxis(x, 2, 0) for x in tokens), reverse=True)
        return Absorbed(held.values, jnp.zeros(held.positions.shape, bool), numbers, new)

    def summary(self, memory: MeanSlots, around: Around) -> Summary:
        bias = jnp.where(memory.count > 0, jnp.log(jnp.maximum(memory.count, 1.0)), -jnp.inf)
        return Summary(around.rotate(memory.keys, memory.position), memory.values, bias[:, :, None])


class LowRank(NamedTuple):
    """State of `low_rank`.

    Attributes:
      values: [B, K, r, D], means weighted by the feature.
      log_mass: [B, K, r], logarithm of the sum of the feature.
      started: [B, K], 1.0 if there is anything.
    """

    values: Float[Array, "B K r D"]
    log_mass: Float[Array, "B K r"]
    started: Float[Array, "B K"]


@value
class low_rank(Reduction):
    """Summarises what was evicted by linear attention with r positive random features (Choromanski et al. 2021).

      phi_i(x) = exp(w_i . x / D^(1/4) - |x|^2 / (2 sqrt D)) / sqrt(r)     w_i ~ N(0, 1), orthogonal in blocks of D
      out = (A + sum_i phi_i(q) H_i) / (Z + sum_i phi_i(q) z_i)            H = sum phi(k) v, z = sum phi(k) of what went

    where A / Z is attention over the slots: phi(q) . phi(k) is exp(q . k / sqrt D) on average over w. Each feature is a
    stand-in with score log(phi_i(q) z_i) and value H_i / z_i, so that this is attention over slots and r more. The
    estimate is unbiased before the division, and its variance grows as exp(|q + k|^2 / sqrt D): with the norms of
    trained models a few features say little.

    Costs r * (D + 1) + 1 float32 numbers per row and kv head.
    """

    rank: int = 8
    seed: int = 0
    summarises = True

    def check(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1 feature, not {self.rank}")

    @property
    def name(self) -> str:
        return f"low_rank{self.rank}"

    def memory(self, rows: int, heads: int, width: int) -> LowRank:
        return LowRank(
            jnp.zeros((rows, heads, self.rank, width)), jnp.zeros((rows, heads, self.rank)), jnp.zeros((rows, heads))
        )

    def absorb(self, numbers: Stats, held: Candidates, gone: Gone) -> Absorbed:
        old, there, d = held.memory, (gone.positions >= 0)[..., None], gone.keys.shape[-1]
        features = jnp.einsum(
            "bkmd,rd->bkmr", gone.keys, _features(self.rank, d, self.seed) * d**-0.25, precision="highest"
        )
        features -= jnp.square(gone.keys).sum(-1, keepdims=True) * (d**-0.5 / 2)
        # Sums of exponentials, relative to the largest: shares of old and new in what is held then.
        nothing = -1e30
        before = jnp.where(old.started[..., None] > 0, old.log_mass, nothing)
        features = jnp.where(there, features, nothing)
        mass = jnp.logaddexp(before, jax.nn.logsumexp(features, axis=2))
        some = (old.started > 0) | there.any((2, 3))
        kept = jnp.where(old.started[..., None] > 0, jnp.exp(before - mass), 0.0)
        share = jnp.where(there, jnp.exp(features - mass[:, :, None]), 0.0)
        values = kept[..., None] * old.values
        values += jnp.einsum("bkmr,bkmd->bkrd", share, gone.values, precision="highest")
        new = LowRank(values, jnp.where(some[..., None], mass, 0.0), some.astype(jnp.float32))
        return Absorbed(held.values, jnp.zeros(held.positions.shape, bool), numbers, new)

    def summary(self, memory: LowRank, around: Around) -> Summary:
        b, k, r, d = memory.values.shape
        bias = jnp.where(memory.started[..., None] > 0, memory.log_mass - math.log(self.rank), -jnp.inf)
        keys = jnp.broadcast_to(
            _features(self.rank, d, self.seed) * d**0.25, (b, k, r, d)
        )  # Summary divides by sqrt(d)
        return Summary(keys, memory.values, bias[:, :, None], norm=d**-0.5 / 2)


def _features(rank: int, width: int, seed: int) -> Float[Array, "r D"]:
    """Directions of the features: orthogonal within blocks of D, each distributed as a standard normal vector."""
    rng = np.random.default_rng(seed)
    blocks = []
    for _ in range(-(-rank // width)):
        q, r = np.linalg.qr(rng.standard_normal((width, width)))
        blocks.append((q * np.sign(np.diag(r))).T)  # without the signs directions would not be uniform
    lengths = np.sqrt(rng.chisquare(width, (rank, 1)))
    return jnp.asarray(np.concatenate(blocks)[:rank] * lengths, jnp.float32)


def _norm(x: Float[Array, "... D"]) -> Float[Array, "..."]:
    return jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1), _TINY))


def _unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return x / _norm(x)[..., None]


def _check_share(name: str, value: float, low: float = 0.0) -> None:
    if not low <= value <= 1:
        raise ValueError(f"{name} must be in {low:g}..1, not {value!r}")
