"""Backpropagation through a bounded state: two forms, one gradient."""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_tokens, tiny_decoder

from jaxcompress.evaluation import perplexity
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.init_state import init_state
from jaxcompress.policies.names import get_policy
from jaxcompress.recurrence.advance import Step, steps
from jaxcompress.recurrence.parallel import parallel_gradient
from jaxcompress.training.data import Batch
from jaxcompress.training.loss import token_losses
from jaxcompress.training.objectives import causal
from jaxcompress.training.recurrent import bounded_value_and_grad, rematerialised, through_time

T, SLOTS = 24, 6
TOKENS = random_tokens(2, T + 1)
WEIGHTS = np.random.default_rng(1).uniform(0, 1, (2, T)).astype(np.float32)
FAST_COMPILE = {"xla_backend_optimization_level": 0}


@cache
def gradient(
    policy: str,
    segment: int,
    bptt_segments: int | None,
    recurrence: Step | None,
    slots: Any = SLOTS,
    chunk: int = 1,
    **model: Any,
) -> tuple[float, Decoder]:
    how: dict[str, Any] = dict(
        policy=get_policy(policy),
        slots=slots,
        weights=jnp.asarray(WEIGHTS),
        segment=segment,
        bptt_segments=bptt_segments,
        chunk=chunk,
        recurrence=recurrence,
    )
    run = jax.jit(partial(bounded_value_and_grad, **how), compiler_options=FAST_COMPILE)
    return run(tiny_decoder(**model), jnp.asarray(TOKENS))


def same(got: tuple[Any, Any], want: tuple[Any, Any]) -> None:
    """To 1e-5 of the largest number in each array."""
    np.testing.assert_allclose(got[0], want[0], 1e-5)
    for a, b in zip(*map(jax.tree.leaves, (got[1], want[1])), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
        assert np.abs(b).max() > 0


FORMS = parallel_gradient, rematerialised
QUICK = {("tova", 9, parallel_gradient), ("tova", 9, rematerialised)}


@pytest.mark.parametrize(
    ("policy", "segment", "recurrence"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in product(["tova", "h2o", "window+2"], [8, 9, T], FORMS)  # 9: the last segment is shorter
    ],
)
def test_both_forms_are_token_by_token(policy: str, segment: int, recurrence: Step) -> None:
    same(gradient(policy, segment, None, recurrence), gradient(policy, 1, None, steps))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "slots", "model"),
    [
        ("tova", (6, 3), {}),
        ("tova-kv_head", ((6, 3), (2, 5)), {}),
        ("tova-pool/adaptive", 4, {}),
        ("tova", 6, dict(sliding=(None, 4), qk_norm=True)),
        ("snapkv+2/every3", 6, dict(tied=True)),
    ],
    ids=str,
)
def test_states_of_every_shape(policy: str, slots: Any, model: dict[str, Any]) -> None:
    forms = [gradient(policy, 8, None, form, slots, **model) for form in FORMS]
    same(*forms)


@pytest.mark.slow
def test_chunks() -> None:
    same(*(gradient("tova", 12, None, form, chunk=4) for form in FORMS))


def test_chunks_that_segments_would_cut() -> None:
    with pytest.raises(ValueError, match="segments of 8 tokens cut chunks of 12.*give a segment of 12 or"):
        gradient("tova", 8, None, None, chunk=12)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["tova/merge_nearest", "streaming_llm+2", "tova/mean_slots2"])
def test_policies_that_do_more_than_evict_use_the_scan(policy: str) -> None:
    same(gradient(policy, 8, None, None), gradient(policy, 1, None, steps))


@pytest.mark.slow
@pytest.mark.parametrize("bptt_segments", [1, 3])
def test_the_gradient_goes_back_as_far_as_it_is_let(bptt_segments: int) -> None:
    """Against a loop over windows, between which the state is a constant."""
    segment, policy, model = 4, get_policy("tova"), tiny_decoder()

    def loss(model: Decoder) -> jax.Array:
        state, total = init_state(model.config, policy, SLOTS, batch=2), jnp.zeros(())
        for start in range(0, T, segment):
            if start % (bptt_segments * segment) == 0:
                state = jax.lax.stop_gradient(state)
            done = read(model, jnp.asarray(TOKENS[:, start : start + segment]), state, policy)
            targets = jnp.asarray(TOKENS[:, start + 1 : start + segment + 1])
            weights = WEIGHTS[:, start : start + segment]
            total += (token_losses(model.logits(done.hidden), targets) * weights).sum()
            state = done.state
        return total / WEIGHTS.sum()

    want = jax.jit(jax.value_and_grad(loss), compiler_options=FAST_COMPILE)(model)
    same(gradient("tova", segment, bptt_segments, None), want)
    short = gradient("tova", segment, 1, None)[1].layers.attention.key.kernel[...]
    whole = gradient("tova", segment, None, None)[1].layers.attention.key.kernel[...]
    assert np.abs(short - whole).max() > 1e-3 * np.abs(whole).max()


def test_the_loss_is_the_perplexity_of_streaming() -> None:
    model, ones = tiny_decoder(), jnp.ones_like(WEIGHTS)
    how: dict[str, Any] = dict(policy=get_policy("tova"), slots=SLOTS, segment=8, bptt_segments=1)
    loss, _ = jax.jit(partial(bounded_value_and_grad, **how))(model, jnp.asarray(TOKENS), weights=ones)
    assert float(loss) == pytest.approx(perplexity(model, TOKENS, get_policy("tova"), SLOTS).nats, rel=1e-6)


@pytest.mark.slow
def test_with_room_for_everything_it_is_plain_training() -> None:
    def loss(model: Decoder) -> jax.Array:
        losses = token_losses(model(jnp.asarray(TOKENS[:, :-1])), jnp.asarray(TOKENS[:, 1:]))
        return (losses * WEIGHTS).sum() / WEIGHTS.sum()

    same(gradient("full", 8, None, None, T), jax.value_and_grad(loss)(tiny_decoder()))


@pytest.mark.parametrize("recurrence", [parallel_gradient, pytest.param(rematerialised, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_text(recurrence: Step) -> None:
    def memory(length: int, bptt_segments: int | None) -> int:
        how: dict[str, Any] = dict(
            policy=get_policy("tova"), slots=16, segment=32, bptt_segments=bptt_segments, recurrence=recurrence
        )
        shapes = jax.ShapeDtypeStruct((1, length + 1), jnp.int32), jax.ShapeDtypeStruct((1, length), jnp.float32)
        program = (
            jax.jit(partial(bounded_value_and_grad, **how))
            .lower(tiny_decoder(), shapes[0], weights=shapes[1])
            .compile()
        )
        analysis: Any = program.memory_analysis()
        return analysis.temp_size_in_bytes

    base = memory(64, 1)
    assert memory(512, 1) < 1.05 * base
    assert memory(512, None) < 6 * base  # segments are rematerialised: a state for each


def test_any_loss_goes_through_time() -> None:
    """x -> a x + b over 6 steps, by hand."""
    xs = jnp.arange(1.0, 7.0)

    def loss(params: Any, carry: Any, x: Any) -> tuple[jax.Array, Any]:
        carry = params["a"] * carry + x
        return carry, carry

    params = {"a": jnp.asarray(0.5)}
    total, gradients, last = through_time(loss, params, jnp.asarray(2.0), xs, bptt_segments=None)
    values, slopes, slope, value = [], [], 0.0, 2.0
    for x in xs.tolist():
        slope, value = value + 0.5 * slope, 0.5 * value + x
        values.append(value), slopes.append(slope)
    assert (float(total), float(last)) == pytest.approx((sum(values), values[-1]))
    assert float(gradients["a"]) == pytest.approx(sum(slopes))
    _, gradients, _ = through_time(loss, params, jnp.asarray(2.0), xs, bptt_segments=1)
    assert float(gradients["a"]) == pytest.approx(2.0 + sum(values[:-1]))


@pytest.mark.parametrize("bptt_segments", [1, 100, None])
def test_gradients_in_bfloat16_are_added_up_in_float32(bptt_segments: int | None) -> None:
    """Of many small windows, and of many segments in one: a bfloat16 sum of ones is 256 at most."""
    n = 1000
    segments = jax.random.uniform(jax.random.key(0), (n,), minval=0.9).astype(jnp.bfloat16)
    loss = lambda params, carry, x: ((params["a"] * x).astype(jnp.float32), carry + 1)

    def run(dtype: Any) -> Any:
        given = {"a": jnp.ones((), dtype)}
        return jax.jit(partial(through_time, loss, bptt_segments=bptt_segments))(given, jnp.zeros(()), segments)

    (total, gradient, carry), (want_total, want, _) = run(jnp.bfloat16), run(jnp.float32)
    assert gradient["a"].dtype == jnp.float32
    np.testing.assert_allclose(gradient["a"], want["a"], rtol=1e-5)
    np.testing.assert_allclose(want["a"], np.asarray(segments, np.float64).sum(), rtol=1e-5)
    np.testing.assert_allclose(total, want_total, rtol=2e-3)
    assert float(carry) == n


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (dict(segment=T + 1), f"a segment of {T + 1} tokens does not fit into texts of {T}"),
        (dict(segment=0), "a segment of 0 tokens"),
        (dict(bptt_segments=2), "3 segments cannot be cut into windows of 2"),
        (dict(bptt_segments=0), "windows of 0"),
        (dict(segment=True), "segment must be a whole number, at least 0, not True"),
        (dict(chunk=0), "chunk must be a whole number, at least 1, not 0"),
        (dict(policy="tova"), r"write jaxcompress.get_policy\('tova'\)"),
        (dict(weights=jnp.ones((1, T))), "weights are one for each token but the first"),
        (dict(slots=0), "at least 1 slot"),
        (dict(policy=get_policy("snapkv+8"), slots=4), "needs at least"),
        (dict(policy=get_policy("full"), slots=T - 1), "keeps every token"),
        (dict(policy=get_policy("streaming_llm+2"), recurrence=parallel_gradient), "moves tokens"),
    ],
)
@pytest.mark.usefixtures("as_users_call_it")
def test_errors_say_what_was_given(how: dict[str, Any], says: str) -> None:
    usual: dict[str, Any] = dict(policy=get_policy("tova"), slots=SLOTS, segment=8, weights=jnp.asarray(WEIGHTS))
    with pytest.raises(ValueError, match=says):
        bounded_value_and_grad(tiny_decoder(), jnp.asarray(TOKENS), **(usual | how))


@pytest.mark.usefixtures("as_users_call_it")
def test_weights_of_one_row_are_not_those_of_two() -> None:
    """They were spread over all rows: the loss was the sum of the rows' losses."""
    batch = Batch(jnp.ones((2, 9), jnp.int32), jnp.ones((1, 8)))
    with pytest.raises(ValueError, match=r"\[2, 8\] for tokens \[2, 9\], not \[1, 8\]"):
        causal()(tiny_decoder(), batch, 0, None)
