"""Attention as arrays: over a block of tokens, and of one token over the slots of a state.

This is the only door to kernels: whoever attends comes through here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.pallas_kernels import launch
from jaxcompress.pallas_kernels.contract import Backend, Call, Chosen, Rule, choose, describe, stored_as
from jaxcompress.shapes import AttentionOut, Keys, Positions, Queries, SlotPositions, Values
from jaxcompress.storage import Quantised, Stored, parts

MASKED = -1e30  # finite, so that a row in which nothing is visible stays finite


QUERIES = 128
"""Most queries that attend at once. More hold more memory and are slower on a CPU: 256 of them 1.4 times at rows of
4,096."""


def causal_attention(
    q: Queries,
    k: Keys,
    v: Values,
    positions: Positions,
    *,
    window: Int[Array, ""] | None = None,
    streaming: tuple[int, int] | None = None,
) -> AttentionOut:
    """Every query attends to the tokens at its own and earlier positions, at most `window` of them.

    With `streaming=(sinks, recent)` it sees of these only the first `sinks` positions and the `recent` newest ones.

    Positions grow along T; padding (-1) is attended by nothing, and what a padded query returns has no meaning but
    is finite. Queries are taken in blocks (`QUERIES`), against the keys up to the end of their sixteenth of the
    row only, and a block's weights are recomputed for the gradient: about half the work of a T x T product, and memory
    that grows with T, not T squared.
    """
    return _causal(q, k, v, positions, window, streaming, None, 0)


def forgetful_attention(
    q: Queries,
    k: Keys,
    v: Values,
    positions: Positions,
    bias: Float[Array, "B K T"],
    *,
    delay: int,
    window: Int[Array, ""] | None = None,
) -> AttentionOut:
    """Causal attention that forgets softly: from `delay` positions on, a key's scores have its bias added to them.

    Otherwise as `causal_attention`, in blocks too. The gradient goes through the bias; keep it finite.

    Args:
      bias: of each key, at most 0 to forget: the logarithm of how much of it is left.
    """
    return _causal(q, k, v, positions, window, None, bias, delay)


def _causal(
    q: Queries, k: Keys, v: Values, positions: Positions,
    window: Int[Array, ""] | None, streaming: tuple[int, int] | None, bias: Float[Array, "B K T"] | None, delay: int,
) -> AttentionOut:  # fmt: skip
    b, t, h, d = q.shape
    kv = k.shape[2]
    n = -(-t // QUERIES)
    some = -(-t // n)  # blocks of one size, with next to no padding
    pad = [(0, 0), (0, n * some - t)]
    at = jnp.pad(positions, pad, constant_values=-1).reshape(b, n, some).swapaxes(0, 1)
    q = jnp.pad(q * d**-0.5, [*pad, (0, 0), (0, 0)]).reshape(b, n, some, kv, h // kv, d).transpose(1, 0, 3, 4, 2, 5)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    outs = []
    for start in range(0, n, many := -(-n // 16)):
        end = min((start + many) * some, t)
        keys, values, key = k[:, :, :end], v[:, :, :end], positions[:, None, :end]

        def attend(block: tuple[Array, Array], keys: Array = keys, values: Array = values, key: Array = key) -> Array:
            q, query = block[0], block[1][:, :, None]
            seen = (key <= query) & (key >= 0)
            if window is not None:
                seen &= key > query - window
            if streaming is not None:
                seen &= (key < streaming[0]) | (key > query - streaming[1])
            late = () if bias is None else (bias[:, :, : key.shape[-1]], (key <= query - delay)[:, None])
            return _attend_block(q, keys, values, seen[:, None], *late)

        blocks = q[start : start + many], at[start : start + many]
        outs.append(attend((blocks[0][0], blocks[1][0]))[None] if many == 1 else jax.lax.map(attend, blocks))
    return jnp.concatenate(outs).transpose(1, 0, 4, 2, 3, 5).reshape(b, n * some, h, d)[:, :t]


def lifetime_attention(
    q: Float[Array, "B T K G D"],
    keys: Float[Array, "B K N D"],
    values: Float[Array, "B K N D"],
    positions: Positions,
    born: Int[Array, "*batch #K N"],
    dies: Int[Array, "*batch #K N"],
    *,
    alive: int,
    block: int = 128,
) -> Float[Array, "B T K G D"]:
    """Every query attends to the tokens that live at its position: `born <= position < dies`.

    The last T of the N keys belong to the queries, those before them are older than any query. Queries are taken in
    blocks, each against its own tokens and the at most `alive` that live when it begins, gathered: the work is
    T x (alive + block), whatever T, and a block's weights are computed again for the gradient.

    Args:
      positions: [B, T], growing along T, -1 for padding.
      born: the position of each token, -1 for none.
      dies: the first position whose query no longer sees it.
    """
    b, t, kv, g, d = q.shape
    past = keys.shape[2] - t
    block = min(block, t)
    n = -(-t // block)
    pad = n * block - t
    q = jnp.pad(q * d**-0.5, [(0, 0), (0, pad), (0, 0), (0, 0), (0, 0)])
    positions = jnp.pad(positions, [(0, 0), (0, pad)], constant_values=-1)
    # Float32 outside of the blocks, so that the gradient of a token that lives for many is added up in it.
    dtype, wide = keys.dtype, jnp.promote_types(keys.dtype, jnp.float32)
    keys, values = (jnp.pad(x.astype(wide), [(0, 0), (0, 0), (0, pad), (0, 0)]) for x in (keys, values))
    born, dies = (jnp.pad(x, [(0, 0), (0, 0), (0, pad)], constant_values=-1) for x in (born, dies))
    column = jnp.arange(keys.shape[2])
    alive = min(alive, past + (n - 1) * block)

    def attend(inputs: tuple[Array, Array, Array]) -> Array:
        q, at, start = inputs
        first = jnp.where(at >= 0, at, jnp.iinfo(jnp.int32).max).min(-1)[:, None, None]
        lives = (born >= 0) & (dies > first) & (column < past + start)
        nth = jnp.where(lives, jnp.cumsum(lives, axis=-1) - 1, alive)
        rows, sets = jnp.indices((*nth.shape[:2], 1), sparse=True)[:2]
        found = jnp.full((*nth.shape[:2], alive), keys.shape[2]).at[rows, sets, nth].set(column, mode="drop")
        gathered = lambda x, where: jnp.take_along_axis(x, where, axis=2, mode="fill", fill_value=0)
        own = lambda x: jax.lax.dynamic_slice_in_dim(x, past + start, block, axis=2)
        both = lambda x: jnp.concatenate([gathered(x, found[..., None]), own(x)], axis=2).astype(dtype)
        from_, to = (jnp.concatenate([jnp.take_along_axis(x, found, 2, mode="fill", fill_value=-1), own(x)], 2)
                     for x in (born, dies))  # fmt: skip
        here = at[:, None, :, None]
        seen = (from_[:, :, None] >= 0) & (from_[:, :, None] <= here) & (here < to[:, :, None])
        return _attend_block(q.transpose(0, 2, 3, 1, 4), both(keys), both(values), seen)

    cut = lambda x: x.reshape(b, n, block, *x.shape[2:]).swapaxes(0, 1)
    out = jax.lax.map(attend, (cut(q), cut(positions), jnp.arange(n) * block))  # [n, B, K, G, block, D]
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(b, n * block, kv, g, d)[:, :t]


CACHED = 2 * 2**20
"""Bytes of probabilities that a CPU computes at once, about what a core has as its own cache: 2 to 4 times faster than
all of 8 rows of 512, whose memory has to be had from the system each time, and up to 1.8 times faster than head by head
where rows are short."""


def whole_attention(q: Queries, k: Keys, v: Values, bias: Float[Array, "B T"]) -> AttentionOut:
    """Every query attends to every key, wherever it stands: the attention of encoders, whose rows are short.

    All T x T probabilities are in memory at once; on a CPU those of a few heads, so that they stay in its cache
    (`CACHED`). In a row of which nobody sees anything, what is returned has no meaning but is finite.

    Args:
      bias: added to the scores of each key; `MASKED` for one that nobody sees.
    """
    b, t, h, d = q.shape
    kv = k.shape[2]
    heads = lambda x: x.swapaxes(1, 2).reshape(b * kv, t, d)
    # The query heads of a group are rows of one product.
    q = (q * d**-0.5).reshape(b, t, kv, h // kv, d).transpose(0, 2, 3, 1, 4).reshape(b * kv, -1, d)
    bias = jnp.repeat(bias.astype(jnp.float32), kv, axis=0)[:, None]
    most = max(1, CACHED // (4 * q.shape[1] * t))
    n = max(n for n in range(1, b * kv + 1) if b * kv % n == 0 and n <= most)

    def some(*all_heads: Array) -> Array:
        if n == b * kv:
            return _whole(*all_heads)
        cut = lambda x: x.reshape(-1, n, *x.shape[1:])
        return jax.lax.map(lambda few: _whole(*few), tuple(map(cut, all_heads))).reshape(q.shape)

    out = jax.lax.platform_dependent(q, heads(k), heads(v), bias, cpu=some, default=_whole)
    return out.reshape(b, h, t, d).swapaxes(1, 2)


def _whole(
    q: Float[Array, "N R D"], k: Float[Array, "N T D"], v: Float[Array, "N T D"], bias: Float[Array, "N 1 T"]
) -> Float[Array, "N R D"]:
    scores = jnp.einsum("nrd,ntd->nrt", q, k, preferred_element_type=jnp.float32) + bias
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.einsum("nrt,ntd->nrd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype)


class Shown(NamedTuple):
    """What one layer's attention compared: enough for any row of its probabilities, none of which is computed unasked.

    Attributes:
      queries: [B, T, H, D], as they met the keys: in a decoder rotated to their positions.
      keys: [B, T, K, D], likewise.
      bias: [B, T] float32, what was added to the scores of each key; `MASKED` for what nobody sees.
      positions: [B, T], where tokens stand if attention is causal, -1 for padding; None if it is not (encoders).
    """

    queries: Queries
    keys: Keys
    bias: Float[Array, "B T"]
    positions: Positions | None = None

    def rows(self, index: Int[Array, "B R"]) -> Float[Array, "B H R T"]:
        """The attention probabilities of some queries, float32; zero for those of padding.

        Args:
          index: which queries of each row of the batch.
        """
        b, t, h, d = self.queries.shape
        kv = self.keys.shape[2]
        q = jnp.take_along_axis(self.queries, index[..., None, None], axis=1).reshape(b, -1, kv, h // kv, d)
        scores = jnp.einsum("brkgd,btkd->bkgrt", q, self.keys, preferred_element_type=jnp.float32) * d**-0.5
        scores += self.bias[:, None, None, None]
        visible = (self.bias > MASKED / 2)[:, None, None, None]
        present = jnp.ones((b, 1, 1, index.shape[1], 1), bool)
        if self.positions is not None:
            at = jnp.take_along_axis(self.positions, index, axis=1)[:, None, None, :, None]
            key = self.positions[:, None, None, None]
            visible, present = visible & (key >= 0) & (key <= at), at >= 0
        return masked_softmax(scores, visible, present).reshape(b, h, -1, t)


class Summary(NamedTuple):
    """Stand-ins for evicted tokens that every query sees beside the slots.

    Attributes:
      keys, values: [B, K, M, D]; keys as queries meet them.
      bias: [B, K, 1 or G, M] float32, added to the scores: the logarithm of how many tokens each stands for, -inf for
        none.
      norm: times the squared norm of the query, taken off the scores.
    """

    keys: Float[Array, "B K M D"]
    values: Float[Array, "B K M D"]
    bias: Float[Array, "B K #G M"]
    norm: float = 0.0

    def scores(self, q: Float[Array, "B T K G D"]) -> Float[Array, "B K G T M"]:
        products = jnp.einsum("btkgd,bkmd->bkgtm", q, self.keys, preferred_element_type=jnp.float32)
        scores = products * q.shape[-1] ** -0.5 + self.bias[:, :, :, None]
        if self.norm:
            scores -= self.norm * jnp.square(q.astype(jnp.float32)).sum(-1).transpose(0, 2, 3, 1)[..., None]
        return scores


class Extra(NamedTuple):
    """What is added to attention over slots.

    Attributes:
      bias: [B, K or 1, S] float32, added to the scores of slots, or None.
      summary: seen beside the slots, or None.
    """

    bias: Float[Array, "B K S"] | None = None
    summary: Summary | None = None


NOTHING = Extra()


def slot_attention(
    q: Float[Array, "B K G D"],
    keys: Float[Array, "B K S D"] | Quantised,
    values: Float[Array, "B K S D"] | Quantised,
    visible: Bool[Array, "#B #K #G S"],
    present: Bool[Array, " B"],
    extra: Extra = NOTHING,
) -> tuple[Float[Array, "B K G D"], Float[Array, "B K G S"]]:
    """One query per row and head over the slots of one layer: output, and the probability each slot received.

    What is not visible receives nothing; rows in which no query is present (padding) give nothing.
    """
    scores = _products(q, keys) * q.shape[-1] ** -0.5
    if extra.bias is not None:
        scores += extra.bias[:, :, None]
    present = present[:, None, None, None]
    if extra.summary is None:
        weights = masked_softmax(scores, visible, present)
        return _weighted_sum(weights, values), weights
    more = extra.summary.scores(q[:, None])[:, :, :, 0]
    both = jnp.concatenate([scores, more], axis=-1)
    seen = jnp.concatenate([jnp.broadcast_to(visible, scores.shape), jnp.isfinite(more)], axis=-1)
    weights, shares = jnp.split(masked_softmax(both, seen, present), [scores.shape[-1]], axis=-1)
    out = _weighted_sum(weights, values)
    return out + jnp.einsum("bkgm,bkmd->bkgd", shares, extra.summary.values).astype(out.dtype), weights


def slot_write(
    stored: tuple[Stored, Stored], new: tuple[Stored, Stored], layer: Int[Array, ""] | int, index: Int[Array, "B P M"]
) -> tuple[Stored, Stored]:
    """Keys and values [L, B, K, S, D] with new ones [B, K, M, D] in the slots `index` of a layer; S: nowhere."""

    def put(old: Array, new: Array) -> Array:
        if new.ndim == 3 and index.shape[-1] == 1:  # scales: a comparison is cheaper than a scatter
            here = jnp.arange(old.shape[3], dtype=index.dtype) == index
            return old.at[layer].set(jnp.where(here, new, old[layer]))
        rows, heads = jnp.indices(new.shape[:2], sparse=True)
        to = jnp.broadcast_to(index, new.shape[:3])
        return old.at[layer, rows[..., None], heads[..., None], to].set(new, mode="drop")

    return jax.tree.map(put, stored, new)


def slot_step(
    q: Float[Array, "B K G D"],
    new: tuple[Stored, Stored],
    stored: tuple[Stored, Stored],
    layer: Int[Array, ""] | int,
    index: Int[Array, "B P M"],
    visible: Bool[Array, "#B #K #G S"],
    present: Bool[Array, " B"],
    extra: Extra = NOTHING,
    *,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B K G D"], Float[Array, "B K G S"], tuple[Stored, Stored]]:
    """A decoding step: new keys and values go into their slots, then `slot_attention` over all of the layer's.

    Args:
      new: key and value of one token per row (in a pool M), [B, K, M, D], as the state stores them.
      stored: stacks [L, B, K, S, D].
      index: the slots to write, S for none.
      visible: what each query sees, the slots just written included.
      backend: what computes (see `jaxcompress.pallas_kernels.contract`).

    Returns:
      The output, the probability that each slot received, and what is stored then.

    Raises:
      ValueError: kernels asked for by name that this device cannot run.
    """
    call = call_of(q[:, None], stored[0], index.shape[1])
    chosen = choose("step", call, backend, _beyond_kernels(index, visible, extra))
    reference = partial(_step, extra=extra)
    if chosen is None:
        return reference(q, new, stored, layer, index, visible, present)

    def run(q, new, stored, layer, index, visible, present):
        return launch.step(chosen, q, _only(new), stored, layer, index[..., 0], visible[:, :, 0], present)

    return _differentiable(run, reference)(q, new, stored, jnp.asarray(layer), index, visible, present)


def slot_step_by_rule(
    chosen: Chosen,
    q: Float[Array, "B K G D"],
    new: tuple[Stored, Stored],
    stored: tuple[Stored, Stored],
    layer: Int[Array, ""] | int,
    index: Int[Array, "B P 1"],
    held: SlotPositions,
    numbers: Float[Array, "B P S"] | None,
    present: Bool[Array, " B"],
    rule: Rule,
) -> tuple[Float[Array, "B K G D"], Float[Array, "B P S"] | None, Int[Array, "B P"], tuple[Stored, Stored]]:
    """A decoding step of a policy that the kernel follows by itself (see `Kernels.step_evict`)."""

    def run(q, new, stored, layer, index, held, numbers, present):
        return launch.step_evict(chosen, q, _only(new), stored, layer, index[..., 0], held, numbers, present, rule)

    return _without_gradient(run, "a decoding step with eviction")(
        q, new, stored, jnp.asarray(layer), index, held, numbers, present
    )


def block_attention(
    chosen: Chosen,
    q: Float[Array, "B T K G D"],
    at: Positions,
    keys: Stored,
    values: Stored,
    held: SlotPositions,
    window: Int[Array, ""] | int | None,
) -> tuple[Float[Array, "B T K G D"], Float[Array, "B K G N"], Float[Array, "B K G N"]]:
    """A block of queries, with the mass that policies fold over (see `Kernels.block`)."""

    def run(q, at, keys, values, held, window):
        return launch.block(chosen, q, at, keys, values, held, window)

    window = None if window is None else jnp.asarray(window)
    return _without_gradient(run, "a block of queries")(q, at, keys, values, held, window)


def stream_attention(
    chosen: Chosen,
    q: Float[Array, "B T K G D"],
    new: tuple[Stored, Stored],
    stored: tuple[Stored, Stored],
    layer: Int[Array, ""] | int,
    positions: Positions,
    held: SlotPositions,
    numbers: Float[Array, "B P S"] | None,
    window: Int[Array, ""] | int | None,
    rule: Rule,
) -> tuple[Any, ...]:
    """The recurrence of a whole segment in one launch (see `Kernels.segment`)."""

    def run(q, new, stored, layer, positions, held, numbers, window):
        return launch.segment(chosen, q, new, stored, layer, positions, held, numbers, window, rule)

    window = None if window is None else jnp.asarray(window)
    return _without_gradient(run, "a streamed segment")(
        q, new, stored, jnp.asarray(layer), positions, held, numbers, window
    )


def call_of(q: Float[Array, "B T K G D"], stored: Stored, sets: int, rule: Rule | None = None) -> Call:
    """What a kernel may decline a call for.

    Args:
      stored: keys, [..., S, D].
    """
    b, t, k, g, d = q.shape
    slots = jax.tree.leaves(stored)[0].shape[-2]
    return Call(b, k, g, slots, d, sets, t, stored_as(stored), q.dtype.name, rule)


def _beyond_kernels(index: Array, visible: Array, extra: Extra) -> str | None:
    """What no kernel does in a decoding step."""
    if extra.bias is not None or extra.summary is not None:
        return "the policy adds to attention scores or shows stand-ins"
    if index.shape[-1] > 1 or visible.shape[2] > 1:
        return "heads share a pool of slots"
    return None


def _only(new: Any) -> Any:
    return jax.tree.map(lambda x: x[:, :, 0], new)


def _step(q, new, stored, layer, index, visible, present, extra: Extra = NOTHING):
    stored = slot_write(stored, new, layer, index)
    keys, values = jax.tree.map(lambda x: x[layer], stored)
    return *slot_attention(q, keys, values, visible, present, extra), stored


def _differentiable(run: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel with the gradient of what it computes."""
    function = jax.custom_vjp(run)

    def backward(saved: Any, cotangent: Any) -> Any:
        return jax.vjp(reference, *saved)[1](cotangent)

    function.defvjp(lambda *args: (run(*args), args), backward)
    return function


def _without_gradient(run: Callable[..., Any], what: str) -> Callable[..., Any]:
    """A kernel through which nobody may differentiate."""
    function = jax.custom_vjp(run)

    def forward(*args: Any) -> Any:
        raise ValueError(
            f"no gradient passes through the kernel for {what}: take it by death times, which kernels compute "
            "(`jaxcompress.parallel.advance_parallel`), or use backend='jnp'"
        )

    function.defvjp(forward, lambda saved, cotangent: ())
    return function


def _products(q: Float[Array, "B K G D"], keys: Stored) -> Float[Array, "B K G S"]:
    numbers, scale = parts(keys)
    pairs = zip(jnp.split(q, len(numbers), axis=-1), numbers, strict=True)
    first, *rest = [jnp.einsum("bkgd,bksd->bkgs", a, b, preferred_element_type=jnp.float32) for a, b in pairs]
    scores = sum(rest, first)
    return scores if scale is None else scores * scale[:, :, None]


def _weighted_sum(weights: Float[Array, "B K G S"], values: Stored) -> Float[Array, "B K G D"]:
    numbers, scale = parts(values)
    weights = (weights if scale is None else weights * scale[:, :, None]).astype(numbers[0].dtype)
    return jnp.concatenate([jnp.einsum("bkgs,bksd->bkgd", weights, x) for x in numbers], axis=-1)


def masked_softmax(
    scores: Float[Array, "*batch N"], visible: Bool[Array, "*#batch N"], present: Bool[Array, "*#batch 1"]
) -> Float[Array, "*batch N"]:
    """Probabilities over what is visible, float32; all zero for queries that are not present."""
    scores = jnp.where(visible, scores, MASKED)
    # The maximum cancels out and has no gradient; asked for one, jax divides by how many scores equal it, which is zero
    # where compiled code computes them twice and rounds differently.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return weights * (present / weights.sum(-1, keepdims=True))


def decode_backend(backend: Backend = "auto") -> str:
    """What computes on this machine's default device, in words."""
    return describe(backend)


@jax.checkpoint
def _attend_block(
    q: Float[Array, "B K G T D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N D"],
    seen: Bool[Array, "*batch #K T N"],
    bias: Float[Array, "B K N"] | None = None,
    late: Bool[Array, "B 1 T N"] | None = None,
) -> Float[Array, "B K G T D"]:
    """Attention to what is `seen`, with the bias of a key added where a query comes `late` for it."""
    b, kv, g, t, d = q.shape
    # The query heads of a group are rows of one product: larger products, and K and V are never repeated.
    scores = jnp.einsum("bkqd,bknd->bkqn", q.reshape(b, kv, g * t, d), k, preferred_element_type=jnp.float32)
    added = jnp.where(seen, 0.0, MASKED)
    if bias is not None:
        assert late is not None
        added += jnp.where(late, bias[:, :, None], 0.0)
    scores += jnp.tile(added, (1, 1, g, 1))
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = jnp.einsum("bkqn,bknd->bkqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype).reshape(b, kv, g, t, d)
