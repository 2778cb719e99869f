"""KVzip: what a repetition looks at, against the reference; and states that were shrunk by scores."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import reference
from tiny import random_tokens, tiny_decoder

from jaxcompress.budgets.allocate import from_scores, retrieval_split, total
from jaxcompress.generation import decode_stream, prefill, reconstruction
from jaxcompress.generation.reconstruction import Growing, Repeat, asking, kvzip, read_whole, reconstruct, shrink
from jaxcompress.models.decoder import read
from jaxcompress.models.init_state import Slots, init_state
from jaxcompress.models.rope import rotate
from jaxcompress.policies import H2O, TOVA, Full, Policy, StreamingLLM, per_layer, policy
from jaxcompress.recurrence.block_attention import causal_attention
from jaxcompress.state.kv_state import State

MODEL = tiny_decoder()
CONTEXT = random_tokens(23)
ASK = Repeat(first=(5, 9, 2), later=(7, 7), after=(1,), lead=3)
MIXED = per_layer(TOVA(), StreamingLLM(2))
LAYERS, HEADS = MODEL.config.num_layers, MODEL.config.num_kv_heads

FAST_COMPILE = {"xla_backend_optimization_level": 0}
reading = jax.jit(read, static_argnames="chunk", compiler_options=FAST_COMPILE)
plain = jax.jit(lambda model, tokens: model(tokens), compiler_options=FAST_COMPILE)


@partial(jax.jit, compiler_options=FAST_COMPILE)
def rotated(tokens: Any) -> Any:
    """Rotated queries and keys of every layer, [L, T, H or K, D], with full attention."""
    at = jnp.arange(tokens.shape[0], dtype=jnp.int32)[None]

    def attend(q, k, v, positions, layer, index, carry, xs):
        q, k = (rotate(x, positions[..., None], MODEL.config.rope) for x in (q, k))
        return causal_attention(q, k, v, positions), carry, (q[0], k[0])

    return MODEL.run_layers(MODEL.embed(tokens[None]), at, attend)[2]


def expected(context: np.ndarray, sinks: int, chunk: int, ask: Repeat = ASK) -> np.ndarray:
    """[L, K, T] by the reference, one forward pass over context and repetition for each chunk."""
    scores = np.full((LAYERS, HEADS, len(context)), np.inf)
    room = 64  # one length for all, so that one function is compiled; nothing looks at what comes after it
    for begin in range(sinks, len(context), chunk):
        end = min(begin + chunk, len(context))
        lead = context[max(begin - ask.lead, sinks) : begin]
        question = [*ask.first] if begin == sinks else [*ask.later, *lead]
        probe = np.array([*question, *ask.after, *context[begin:end]], np.int32)
        both = np.concatenate([context, probe])
        q, k = (np.asarray(x, np.float64)[:, : len(both)] for x in rotated(np.resize(both, room)))
        for layer in range(LAYERS):
            old, new = np.split(k[layer], [len(context)])
            scores[layer, :, begin:end] = reference.kvzip(q[layer, len(context) :], new, old, (begin, end), sinks)
    return scores


@cache
def whole(*lengths: int) -> Any:
    """Progress after contexts that begin alike; shared, not to be donated."""
    return read_whole(MODEL, [CONTEXT[:n] for n in lengths])


@cache
def scores(sinks: int = 2, chunk: int = 8) -> Any:
    return reconstruct(MODEL, [CONTEXT], whole(23).kv, ASK, sinks=sinks, chunk=chunk)


@pytest.mark.parametrize(("sinks", "chunk"), [(2, 8), (0, 8), (4, 100)])
def test_scores_are_the_reference(sinks: int, chunk: int) -> None:
    ours = np.asarray(scores(sinks, chunk))
    assert ours.shape == (LAYERS, 1, HEADS, 65)
    np.testing.assert_allclose(ours[:, 0, :, :23], expected(CONTEXT, sinks, chunk), 1e-4, 1e-6)
    assert np.isneginf(ours[..., 23:]).all()


def test_the_whole_context_is_read_and_the_state_left_alone() -> None:
    state = whole(23).kv
    before = jax.tree.map(np.asarray, state)
    scores(2, 8)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state))
    (part,) = state
    assert (np.asarray(part.positions)[..., :23] == np.arange(23)).all()
    logits = plain(MODEL, np.resize(CONTEXT, (1, 27)))[0, 22]
    np.testing.assert_allclose(whole(23).logits[0], logits, 1e-4, 1e-4)


def test_contexts_of_many_lengths_share_programs() -> None:
    one = lambda n: reconstruct(MODEL, [CONTEXT[:n]], whole(n).kv, ASK, sinks=2, chunk=8)
    one(11)
    before = reconstruction._repeated._cache_size()
    for n in range(12, 15):
        one(n)
    assert reconstruction._repeated._cache_size() == before > 0


def test_rows_are_independent() -> None:
    """Contexts of 23, 9 and 2 tokens: while the first has three chunks to repeat, the last is all sinks."""
    lengths = 23, 9, 2
    rows = [CONTEXT[:n] for n in lengths]
    together = np.asarray(reconstruct(MODEL, rows, whole(*lengths).kv, ASK, sinks=2, chunk=8))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(together[:, row, :, :n], expected(CONTEXT[:n], 2, 8), 1e-4, 1e-6)
        assert np.isneginf(together[:, row, :, n:]).all()
    small = shrink(MODEL, whole(*lengths).kv, jnp.asarray(together), TOVA("kv_head"), 5)
    assert small[0].seen.tolist() == list(lengths)
    for row, n in enumerate(lengths):
        best = reference.top(expected(CONTEXT[:n], 2, 8), 5)
        for layer, head in np.ndindex(LAYERS, HEADS):
            assert held(small, layer, head, row) == best[layer, head].tolist()


def held(state: State, layer: int, head: int, row: int = 0) -> list[int]:
    for part in state:
        heads = part.heads or tuple(range(part.sets))
        if layer in part.layer.tolist() and head in heads:
            positions = np.asarray(part.positions)[part.layer.tolist().index(layer), row, heads.index(head)]
            return sorted(positions[positions >= 0].tolist())
    raise AssertionError


BUDGETS: dict[str, Slots] = {"one": 7, "per layer": (9, 5), "per head": ((3, 11), (8, 8)), "lists": [[3, 11], [6, 6]]}


@pytest.mark.parametrize("slots", BUDGETS.values(), ids=BUDGETS.keys())
def test_the_best_stay_and_no_more_is_allocated(slots: Slots) -> None:
    given = scores()
    state = shrink(MODEL, whole(23).kv, given, TOVA("kv_head"), slots)
    capacity = np.broadcast_to(np.array(slots).reshape(-1, 1) if np.ndim(slots) < 2 else slots, (LAYERS, HEADS))
    for layer, head in np.ndindex(LAYERS, HEADS):
        best = reference.top(np.asarray(given)[layer, 0, head, :23], capacity[layer, head])
        assert held(state, layer, head) == best.tolist()
    kv = sum(part.keys.nbytes + part.values.nbytes for part in state)
    d = MODEL.config.head_dim
    assert kv == 2 * 4 * d * (capacity + 1).sum()  # a slot beside these for the incoming token


@pytest.mark.parametrize(
    ("policy", "chunk"),
    [(TOVA("kv_head"), 1), (H2O(2, "kv_head"), 4), (Growing(), 1), (TOVA(), 4)],
    ids=lambda x: getattr(x, "name", None),
)
def test_a_state_that_lost_nothing_goes_on_as_if_nothing_had_happened(policy: Policy, chunk: int) -> None:
    """With room for everything, what follows reads as in the full cache, token by token and in blocks."""
    more = random_tokens(4, seed=3)
    state = shrink(MODEL, whole(23).kv, scores(), policy, 23, room=4)
    expected = plain(MODEL, np.concatenate([CONTEXT, more])[None])[0, 23:]
    done = reading(MODEL, jnp.asarray(more)[None], state, policy, chunk=chunk)
    np.testing.assert_allclose(MODEL.logits(done.hidden)[0], expected, 1e-3, 1e-3)


@policy
class Pool(Policy):
    scope = "pool"

    def score(self, stats: Any, held: Any) -> Any:
        return held.positions * 1.0


def test_pools_and_layers_share_by_score() -> None:
    given = scores()
    pool = Pool()
    (part,) = shrink(MODEL, whole(23).kv, given, pool, 6)
    assert part.capacity == 6 * HEADS
    for layer in range(LAYERS):
        flat = np.asarray(given)[layer, 0, :, :23].reshape(-1)
        best = np.sort(np.argsort(-flat, kind="stable")[: 6 * HEADS])
        positions, owner = np.asarray(part.positions)[layer, 0, 0], np.asarray(part.owner)[layer, 0, 0]
        mine = sorted((owner * 23 + positions)[positions >= 0].tolist())
        assert mine == best.tolist()
    state = shrink(MODEL, whole(23).kv, given, TOVA(), 6)
    for layer in range(LAYERS):
        mean = np.asarray(given)[layer, 0, :, :23].mean(0)
        assert held(state, layer, 0) == reference.top(mean, 6).tolist()


def test_a_full_cache_can_shrink_by_any_score() -> None:
    """Read by the policy `full`, scored by age; the rest is then decoded with a window per head."""
    state = init_state(MODEL.config, Full(), 23)
    state = reading(MODEL, jnp.asarray(CONTEXT)[None], state, Full(), chunk=23).state
    age = jnp.broadcast_to(state[0].positions * 1.0, (LAYERS, 1, HEADS, 23))
    small = shrink(MODEL, state, age, TOVA("kv_head"), 4)
    assert all(held(small, layer, head) == [19, 20, 21, 22] for layer in range(LAYERS) for head in range(HEADS))
    quantised = shrink(MODEL, state, age, TOVA("kv_head"), 4, dtype="int8")
    assert sum(part.nbytes for part in quantised) < sum(part.nbytes for part in small)
    assert np.isfinite(reading(MODEL, jnp.asarray([[3]]), quantised, TOVA("kv_head")).hidden).all()


def test_budgets_from_scores_are_what_a_threshold_over_all_heads_gives() -> None:
    given = np.asarray(scores())[..., :23]
    slots = from_scores(jnp.asarray(given), 6)
    assert total(slots) == 6 * LAYERS * HEADS
    best = np.argsort(-given.reshape(-1), kind="stable")[: total(slots)]
    counts = np.bincount(best // 23, minlength=LAYERS * HEADS).reshape(LAYERS, HEADS)
    np.testing.assert_array_equal(slots, counts)


def test_kvzip_reads_compresses_and_goes_on() -> None:
    """Ragged rows; what one gives does not depend on what stands in the other."""
    contexts, questions = [CONTEXT, random_tokens(23, seed=9), CONTEXT[:9]], random_tokens(3, 3, seed=1)
    slots = retrieval_split(np.array([[True, False]] * LAYERS), 12, 3)
    policy = TOVA("kv_head")

    def written(which: list[int]) -> np.ndarray:
        now = kvzip(MODEL, [contexts[i] for i in which], policy, slots, repeat=ASK, sinks=2, chunk=8)
        now = prefill(MODEL, [questions[i] for i in which], now)
        return np.concatenate(list(decode_stream(MODEL, now, max_new_tokens=6)), axis=1)

    one, other = written([0, 2]), written([1, 2])
    np.testing.assert_array_equal(one[1], other[1])
    assert (one[0] != other[0]).any()


def test_growing_takes_what_there_is_room_for_and_no_more() -> None:
    now = kvzip(MODEL, [CONTEXT], Growing(), 6, repeat=ASK, room=3)
    with pytest.raises(ValueError, match="10 tokens do not fit into the 9 slots"):
        next(decode_stream(MODEL, now, max_new_tokens=4, stream_every=2))
    tokens = np.concatenate(list(decode_stream(MODEL, now, max_new_tokens=3, stream_every=1)), axis=1)
    assert tokens.shape == (1, 3)
    assert (tokens >= 0).all()


def test_asking_is_the_authors_words() -> None:
    ask = asking(lambda text: [len(text)], "<turn>")
    assert (ask.first, ask.later, ask.after, ask.lead) == ((38,), (65,), (6,), 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: reconstruct(MODEL, [CONTEXT[:5]], whole(23).kv, ASK), "the state has read"),
        (lambda: reconstruct(MODEL, [CONTEXT], whole(23).kv, ASK, sinks=-1), "sinks must be 0"),
        (lambda: reconstruct(MODEL, [CONTEXT], whole(23).kv, ASK, chunk=0), "a chunk 1 token"),
        (lambda: reconstruct(MODEL, [CONTEXT], init_state(MODEL.config, Full(), 23), ASK), "read_whole"),
        (lambda: shrink(MODEL, whole(23).kv, scores()[..., 1:], TOVA("kv_head"), 5), "one for each slot"),
        (lambda: shrink(MODEL, whole(23).kv, scores(), TOVA("query_head"), 5), "per kv head"),
        (lambda: shrink(MODEL, whole(23).kv, scores(), TOVA("kv_head"), 5, room=-1), "room is"),
        (lambda: shrink(MODEL, whole(23).kv, scores(), TOVA(), ((3, 5), (4, 4))), "scope"),
        (lambda: shrink(MODEL, whole(23).kv[:0], scores(), TOVA("kv_head"), 5), "together"),
        (lambda: kvzip(tiny_decoder(sliding=(8, None)), [CONTEXT], Growing(), 5, repeat=ASK), "sliding window"),
        (lambda: kvzip(MODEL, [[]], Growing(), 5, repeat=ASK), "empty"),
        (lambda: kvzip(MODEL, [], Growing(), 5, repeat=ASK), "no prompts"),
        (lambda: kvzip(MODEL, [CONTEXT], MIXED, 5, repeat=ASK), r"\['absolute', 'slot'\]"),
    ],
)
def test_errors_say_what_was_given(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_slots_that_are_no_numbers(as_users_call_it: None) -> None:
    for slots in ("64", None, 5.5):
        with pytest.raises(ValueError, match="slots must be a number of slots"):
            shrink(MODEL, whole(23).kv, scores(), TOVA("kv_head"), slots)


def test_scores_do_not_depend_on_where_tokens_are_cached() -> None:
    """Keys cached un-rotated (positions re-indexed) give the same scores: nothing is missing yet."""
    state = read_whole(MODEL, [CONTEXT], placement="slot").kv
    ours = reconstruct(MODEL, [CONTEXT], state, ASK, sinks=2, chunk=8, placement="slot")
    np.testing.assert_allclose(ours[..., :23], scores()[..., :23], 1e-3, 1e-5)
    assert state[0].capacity == whole(23).kv[0].capacity == 64
