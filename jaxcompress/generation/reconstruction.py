"""KVzip: keeps the tokens that the model needs to repeat its context (Kim et al. 2025, "KVzip").

The model reads a context in full, then receives it again as if it repeated it. A question is unlikely to need a token
that gets no attention during the repetition. So the compressed state also suits questions that are not known yet.
Scores taken from the end of a prompt do not.

    state = kvzip(model, [context], TOVA("kv_head"), slots=256, repeat=asking(encode))
    state = prefill(model, [question], state)  # from here on, use the state as usual

Scores from any other method work the same way: `shrink` turns a full state and scores into a bounded state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.generation.decode_state import DecodeState, init_decode_state
from jaxcompress.generation.generate import prefill
from jaxcompress.inputs.token_ids import prompt_ids, token_ids
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.init_state import Slots, init_state
from jaxcompress.models.int8 import as_float
from jaxcompress.policies.cache_view import CacheView, LayerContext, Observation
from jaxcompress.policies.policy import Policy, Schedule, policy
from jaxcompress.state.kv_state import KVState, State, Stats
from jaxcompress.state.placement import Placement
from jaxcompress.state.select import keep_top
from jaxcompress.state.shapes import SlotScores, Tokens, Valid
from jaxcompress.state.storage import load_vectors, store_vectors


class _OldestFirst(Policy):
    scope = "kv_head"

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        """Ranks by age; a full state takes no more tokens."""
        return -held.positions.astype(jnp.float32)


@policy
class Growing(_OldestFirst):
    """Keeps all tokens and adds new ones: for a shrunk state that has `room`, as in KVzip's code.

    A token without room is an error. In a fresh state this policy has no meaning.
    """

    name = "growing"  # type: ignore[assignment]
    schedule = Schedule("once")


READ_CHUNK = 512  # tokens of a context that are read at once
FEW = 64  # lengths are rounded up to a multiple of it: contexts of many lengths share few compiled programs


class Repeat(NamedTuple):
    """The token ids before the repetition of a chunk of context.

    Attributes:
      first: the tokens before the first chunk.
      later: the tokens before every other chunk, followed by the last `lead` tokens of the previous chunk.
      after: the tokens between these and the chunk; in a chat template, the turn to the model.
      lead: the number of tokens repeated from the previous chunk (see `later`).
    """

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    lead: int = 8


def asking(encode: Callable[[str], Sequence[int]], after: str = "\n") -> Repeat:
    """The authors' prompt (KVzip `model/wrapper.py`).

    Args:
      encode: from text to ids, without special tokens.
      after: the text that the model's chat template puts between a user's message and the answer; a line break for a
        model without a template, as in kvpress.
    """
    ids = lambda text: tuple(map(int, encode(text)))
    return Repeat(
        ids("\n\nRepeat the previous context exactly."),
        ids("\n\nRepeat the part of the previous context exactly, starting with "),
        ids(after),
    )


def kvzip(  # eleven parameters: those of `init_decode_state` and those of KVzip
    model: Decoder,
    prompts: Sequence[Sequence[int] | np.ndarray],
    policy: Policy,
    slots: Slots,
    *,
    repeat: Repeat,
    room: int = 0,
    sinks: int = 4,
    chunk: int = 2048,
    seeds: Sequence[int] | int = 0,
    dtype: DTypeLike | None = None,
    placement: Placement | None = None,
) -> DecodeState:
    """Reads contexts and compresses them so that the model could repeat them; continue with `prefill` or `decode`.

    While it runs, the keys and values of the whole contexts are in memory: once in the full state, and once more in
    every step of reading and repeating, with the weights of 128 queries over all keys. The returned state is as small
    as any state with this number of slots. The computation is about three times that of reading alone.

    Args:
      prompts: contexts of any lengths; rows are independent.
      policy: the policy after compression, of scope `kv_head`, `layer` or `pool`; `Growing()` evicts nothing more. Its
        statistics start fresh. In a pool the heads of a layer compete for its slots.
      slots: the number of tokens that each head keeps. To distribute slots over layers and heads by the scores, call
        `reconstruct`, `jaxcompress.budgets.allocate.from_scores` and `shrink` in turn.
      repeat: see `asking`.
      room: additional slots for later tokens.
      sinks: the number of first tokens that are always kept and never repeated (the system prompt, in the authors'
        code).
      chunk: tokens repeated at a time.
      seeds, dtype, placement: see `jaxcompress.generation.init_decode_state`; dtype is that of the compressed state.

    Raises:
      ValueError: layers have different placements; other cases as for `prefill`, `reconstruct` and `shrink`.
      FloatingPointError: logits are not finite.
    """
    placements = {mine.placement for mine in policy.layers or (policy,)}
    if placement is None and len(placements) > 1:
        raise ValueError(
            f"the layers of {policy.name} place tokens differently: {sorted(placements)}; name a placement"
        )
    placement = placement or policy.placement
    whole = read_whole(model, prompts, seeds=seeds, placement=placement)
    scores = reconstruct(model, prompts, whole.kv, repeat, sinks=sinks, chunk=chunk, placement=placement)
    small = shrink(model, whole.kv, scores, policy, slots, room=room, dtype=dtype)
    return replace(whole, kv=small, policy=policy, placement=placement)


def read_whole(
    model: Decoder,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    seeds: Sequence[int] | int = 0,
    placement: Placement = "absolute",
) -> DecodeState:
    """Reads contexts into a state large enough for the longest: the token at position i is in slot i.

    It has as many slots as the longest has tokens, rounded up to a multiple of 64.
    """
    _check_windows(model)
    prompts = prompt_ids(prompts, model.config.vocab_size)
    slots = _rounded(max(map(len, prompts)))
    size = min(READ_CHUNK, slots)
    empty = init_decode_state(model, _Reading(), slots, batch=len(prompts), seeds=seeds, placement=placement)
    return prefill(model, prompts, empty, mode="chunked", chunk=size, segment=size)


def reconstruct(
    model: Decoder,
    prompts: Sequence[Sequence[int] | np.ndarray],
    state: State,
    repeat: Repeat,
    *,
    sinks: int = 4,
    chunk: int = 2048,
    placement: Placement = "absolute",
) -> Float[Array, "L B K N"]:
    """The score of each token: the highest attention from any query in the repetition of its chunk.

        score[n] = max over queries i of the repetition and query heads of softmax_j(q_i k_j / sqrt(D))[n]

    with j over the first tokens, n's chunk of the context, and the repetition itself up to i; float32. The forward pass
    that repeats sees the whole context.

    Args:
      prompts: the contexts that `state` has read.
      state: as `read_whole` returns it; not changed.
      repeat, sinks, chunk, placement: see `kvzip`.

    Returns:
      A score for every slot of the state: +inf for the first `sinks` tokens, -inf for free slots.

    Raises:
      ValueError: the state has not read these contexts, sinks is below 0, or chunk is below 1.
    """
    if sinks < 0 or chunk < 1:
        raise ValueError(f"sinks must be 0 or more and a chunk 1 token or more, not {sinks} and {chunk}")
    vocabulary = model.config.vocab_size
    rows = prompt_ids(prompts, vocabulary)
    for name in ("first", "later", "after"):
        token_ids(list(getattr(repeat, name)), vocabulary, f"Repeat.{name}")
    if not all(isinstance(part.stats, _Watched) for part in state):
        raise ValueError("contexts are repeated against a state that read_whole has made")
    if [len(row) for row in rows] != np.asarray(state[0].seen).tolist():
        lengths = [len(row) for row in rows]
        raise ValueError(
            f"contexts of {lengths} tokens are to be repeated, the state has read {np.asarray(state[0].seen).tolist()}"
        )
    pieces = [[(at, min(at + chunk, len(row))) for at in range(sinks, len(row), chunk)] for row in rows]
    asked = [[_question(row, span, repeat, sinks) for span in spans] for row, spans in zip(rows, pieces, strict=True)]
    width = _rounded(max((len(ids) for row in asked for ids in row), default=0))
    best = tuple(jnp.zeros(part.stats.best.shape, jnp.float32) for part in state)
    for i in range(max(map(len, asked))):
        tokens, valid = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        span = np.zeros((len(rows), 2), np.int32)
        for row, (questions, spans) in enumerate(zip(asked, pieces, strict=True)):
            if i < len(questions):
                tokens[row, : len(questions[i])], valid[row, : len(questions[i])] = questions[i], True
                span[row] = spans[i]
        best = _repeated(model, state, best, tokens, valid, span, sinks=sinks, placement=placement)
    scores, held = jnp.concatenate(best), jnp.concatenate([part.positions for part in state])
    return jnp.where(held < 0, -jnp.inf, jnp.where(held < sinks, jnp.inf, scores))


def shrink(
    model: Decoder,
    state: State,
    scores: Float[Array, "L B K N"],
    policy: Policy,
    slots: Slots,
    *,
    room: int = 0,
    dtype: DTypeLike | None = None,
) -> State:
    """Keeps the tokens with the highest scores: a full state and scores from any method -> a bounded state.

    Runs once, outside of jit. Both states are in memory until the caller releases the full one.

    Args:
      state: a state with all heads of each layer in one part, as made by `read_whole` or the policy `full`; its keys
        must be cached as the policy's placement needs them.
      scores: one per slot; higher scores are kept, +inf always. On a tie the older token stays.
      policy: the policy from here on, of scope `kv_head`, `layer` (the mean of a layer's scores counts) or `pool`. Its
        statistics start as for new tokens; its memory per row starts empty.
      slots: the number of tokens that each head keeps; heads with different numbers are stored separately (scope
        `kv_head`).
      room: additional slots for later tokens.
      dtype: the dtype of the new state, by default that of the old one; vectors are quantised here, once (see
        `jaxcompress.state.storage`).

    Raises:
      ValueError: the scores have another shape, the state is not of the kind above, the model has sliding-window
        layers, the policy has a set per query head, room is negative, or slots do not fit the model or the policy.
    """
    config = model.config
    _check_windows(model)
    if sum(part.layer.shape[0] for part in state) != config.num_layers or any(
        part.heads or part.owner is not None or part.kv_heads != config.num_kv_heads for part in state
    ):
        raise ValueError(
            "only a state that holds all kv heads of a layer together, each in slots of its own, can shrink"
        )
    _, batch, _, n = state[0].positions.shape
    expected = config.num_layers, batch, config.num_kv_heads, n
    if scores.shape != expected:
        raise ValueError(f"scores are one for each slot, {list(expected)}, not {list(scores.shape)}")
    if any(mine.scope == "query_head" for mine in policy.layers or (policy,)):
        raise ValueError(f"scores are per kv head; policy {policy.name} has a set per query head")
    if room < 0:
        raise ValueError(f"room is a number of slots, 0 or more, not {room}")
    like = state[0].keys.dtype if dtype is None else dtype
    small = []
    for part in init_state(config, policy, _with_room(slots, room), batch=batch, dtype=like):
        layers = tuple(np.asarray(part.layer).tolist())
        mine = policy.at(layers[0])
        small.append(_filled(model, part, state, scores, policy=mine, room=room, layers=layers))
    return tuple(small)


class _Watched(NamedTuple):
    """Statistics during the repetition: [B, K, N] each.

    Attributes:
      inside: the tokens among which a query's attention is normalised.
      best: the highest attention from any query so far.
    """

    inside: Bool[Array, "..."]
    best: Float[Array, "..."]


@policy
class _Reading(_OldestFirst):
    """Has the statistics of `_Watching` but does not update them."""

    name = "kvzip"  # type: ignore[assignment]

    def init(self, incoming: CacheView) -> Stats:
        return _Watched(jnp.ones(incoming.positions.shape, bool), jnp.zeros(incoming.positions.shape))


@policy
class _Watching(_Reading):
    def observe(self, stats: Stats, seen: Observation) -> Stats:
        weights = seen.weights * stats.inside[:, :, None, None]
        whole = weights.sum(-1, keepdims=True)
        weights = weights / jnp.where(whole > 0, whole, 1.0)
        return _Watched(stats.inside, jnp.maximum(stats.best, weights.max((2, 3))))


def _question(row: np.ndarray, span: tuple[int, int], repeat: Repeat, sinks: int) -> np.ndarray:
    """The tokens that make the model repeat row[span]."""
    begin, end = span
    ask = repeat.first
    if begin > sinks:
        ask = (*repeat.later, *row[max(begin - repeat.lead, sinks) : begin])
    return np.array([*ask, *repeat.after, *row[begin:end]], np.int32)


@partial(jax.jit, static_argnames=("sinks", "placement"))
def _repeated(
    model: Decoder,
    state: State,
    best: tuple[Array, ...],
    tokens: Tokens,
    valid: Valid,
    span: Int[Array, "B 2"],
    *,
    sinks: int,
    placement: Placement,
) -> tuple[Array, ...]:
    """The highest attention so far, after the repetition of one more chunk."""
    begin, end = span[:, 0, None, None], span[:, 1, None, None]
    here = [(part.positions >= begin) & (part.positions < end) for part in state]
    first = [(part.positions >= 0) & (part.positions < sinks) for part in state]
    aimed = tuple(
        replace(part, stats=_Watched(one | two, jnp.zeros(one.shape)))
        for part, one, two in zip(state, here, first, strict=True)
    )
    done = read(model, tokens, aimed, _Watching(), valid=valid, chunk=tokens.shape[1], placement=placement).state
    # Held tokens stay in their slots. Free slots may have taken tokens of the repetition: they are not `here`.
    return tuple(jnp.where(mine, part.stats.best, old) for mine, part, old in zip(here, done, best, strict=True))


@partial(jax.jit, static_argnames=("room", "layers"))
def _filled(
    model: Decoder, new: KVState, state: State, scores: Array, *, policy: Policy, room: int, layers: tuple[int, ...]
) -> KVState:
    """Some heads of some layers of the compressed state."""
    config, pooled = model.config, policy.scope == "pool"
    which = new.heads or tuple(range(config.num_kv_heads))
    keep = new.capacity - room * (config.num_kv_heads if pooled else 1)
    places = [(part, i) for part in state for i in range(part.layer.shape[0])]

    def of(field: str) -> Any:
        """A field of these layers, stacked."""
        one = lambda part, i: jax.tree.map(lambda x: x[i], getattr(part, field))
        return jax.tree.map(lambda *x: jnp.stack(x), *[one(*places[layer]) for layer in layers])

    keys, values = (load_vectors(of(field))[:, :, which] for field in ("keys", "values"))
    held = jnp.broadcast_to(of("positions"), (len(layers), *scores.shape[1:]))[:, :, which]
    score, owner = scores[layers,][:, :, which], None
    if policy.scope == "layer":
        held, score = held[:, :, :1], score.mean(2, keepdims=True)
    elif pooled:
        flat = lambda x: x.reshape(*x.shape[:2], 1, -1, *x.shape[4:])
        owner = flat(jnp.broadcast_to(jnp.arange(len(which))[:, None], held.shape))
        keys, values, held, score = flat(keys), flat(values), flat(held), flat(score)

    kept = jax.vmap(lambda score, held: keep_top(score, held, keep))(score, held)
    order = jnp.argsort(~kept, axis=-1, stable=True)[..., :keep]

    def pick(x: Array) -> Array:
        """[L, B, K or P, N, ...] -> the kept entries."""
        where = jnp.broadcast_to(order, (*x.shape[:3], order.shape[-1]))
        return jnp.take_along_axis(x, where.reshape(*where.shape, *[1] * (x.ndim - 4)), axis=3)

    keys, values, held = pick(keys), pick(values), jnp.where(pick(kept), pick(held), -1)
    owner = None if owner is None else jnp.where(held >= 0, pick(owner), 0)
    group = config.num_heads // config.num_kv_heads
    out = as_float(model.layers.attention.out.kernel[...]).reshape(
        config.num_layers, -1, group, config.head_dim, config.hidden_size
    )
    nothing = jnp.zeros_like(new.seen)

    def numbers(keys: Any, values: Any, held: Any, owner: Any, memory: Any, layer: Any) -> Stats:
        heads = group * len(which), len(which)
        context = LayerContext(config.rotary(layer), policy.placement, out[layer][which,], heads, which[: new.kv_heads])
        came = CacheView(keys, values, held, owner, nothing, layer, memory, new.capacity, context)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*held.shape, *x.shape[3:])), policy.init(came))

    stats = jax.vmap(numbers)(keys, values, held, owner, new.memory, new.layer)
    fresh = dict(
        keys=store_vectors(keys, new.keys),
        values=store_vectors(values, new.values),
        positions=held,
        owner=owner,
        stats=stats,
    )
    put = lambda old, x: old.at[:, :, :, : order.shape[-1]].set(x)
    old = new.slotted()
    return replace(new, seen=state[0].seen, **{name: jax.tree.map(put, old[name], fresh[name]) for name in old})


def _with_room(slots: Slots, room: int) -> Slots:
    if isinstance(slots, list | tuple | np.ndarray):
        return [_with_room(one, room) for one in slots]  # type: ignore[return-value]
    return slots + room if isinstance(slots, int | np.integer) else slots  # `init_state` says what is wrong with others


def _rounded(length: int) -> int:
    return -(-length // FEW) * FEW


def _check_windows(model: Decoder) -> None:
    if any(model.config.sliding):
        raise ValueError(
            "some layers of this model have a sliding window: they forget by themselves, and cannot be asked to repeat "
            "what left it"
        )
