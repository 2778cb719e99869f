"""A bounded student, a teacher with everything in sight."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import random_tokens, tiny_decoder

from jaxcompress.checkpoints import load, load_embedded, save
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.experts_config import ExpertsConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.policies.names import get_policy
from jaxcompress.training.data import Batch
from jaxcompress.training.distillation import distilled_value_and_grad, divergence
from jaxcompress.training.lora import EVERY, Adapter, add_lora, init_lora
from jaxcompress.training.loss import token_losses
from jaxcompress.training.objectives import adapted

T, SLOTS = 16, 5
TOKENS = jnp.asarray(random_tokens(2, T + 1))
WEIGHTS = jnp.asarray(np.random.default_rng(1).uniform(0, 1, (2, T)).astype(np.float32))
HOW: dict[str, Any] = dict(policy=get_policy("tova"), slots=SLOTS, weights=WEIGHTS, segment=8)
FAST_COMPILE = {"xla_backend_optimization_level": 0}


def run(params: Any, *, jit: bool = True, **how: Any) -> tuple[dict[str, Any], Any]:
    function = partial(distilled_value_and_grad, **HOW | how)
    return (jax.jit(function, compiler_options=FAST_COMPILE) if jit else function)(params, TOKENS)


def test_divergence_is_its_definition() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 1, 3, 7)).astype(np.float32) * 3
    for t in (1.0, 2.5):
        p, q = (np.exp(x / t) / np.exp(x / t).sum(-1, keepdims=True) for x in (teacher, student))
        np.testing.assert_allclose(
            divergence(jnp.asarray(student), jnp.asarray(teacher), t), t * t * (p * np.log(p / q)).sum(-1), rtol=1e-4
        )
    np.testing.assert_allclose(divergence(jnp.asarray(student), jnp.asarray(student)), 0, atol=1e-6)


@pytest.mark.slow
def test_all_parts_and_their_gradient() -> None:
    """Against one pass over the whole text, written down."""
    model, teacher = tiny_decoder(), jax.tree.map(lambda x: x * 0.9, tiny_decoder())

    def loss(model: Decoder) -> tuple[jax.Array, Any]:
        state = init_state(model.config, HOW["policy"], SLOTS, batch=2)
        done = read(model, TOKENS[:, :-1], state, HOW["policy"])
        logits, seen = model.logits(done.hidden), teacher.norm(teacher.hidden(TOKENS[:, :-1]))
        parts = [
            divergence(logits, teacher(TOKENS[:, :-1]), 2.0),
            token_losses(logits, TOKENS[:, 1:]),
            jnp.square(done.hidden - seen).mean(-1),
        ]
        parts = [(part * WEIGHTS).sum() / WEIGHTS.sum() for part in parts]
        return parts[0] + 0.3 * parts[1] + 0.2 * parts[2], parts

    (value, parts), want = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST_COMPILE)(model)
    metrics, got = run(model, teacher=teacher, language=0.3, hidden=0.2, temperature=2.0)
    np.testing.assert_allclose(metrics["loss"], value, 1e-5)
    np.testing.assert_allclose([metrics[name] for name in ("divergence", "language", "hidden")], parts, 1e-5)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.slow
def test_a_state_that_holds_everything_has_nothing_to_learn() -> None:
    metrics, gradient = run(tiny_decoder(), slots=T)
    assert float(metrics["loss"]) == pytest.approx(0, abs=1e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-3
    metrics, gradient = run(tiny_decoder())
    assert float(metrics["loss"]) > 0.01
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-2


@pytest.mark.slow
def test_no_gradient_goes_into_the_teacher() -> None:
    model = tiny_decoder()
    _, own = run(model)
    _, given = run(model, teacher=jax.tree.map(jnp.array, model))  # equal, but not the same
    for a, b in zip(*map(jax.tree.leaves, (own, given)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_adapters_change_nothing_at_first_and_then_what_they_say() -> None:
    model = tiny_decoder()
    adapters = init_lora(model, jax.random.key(0), rank=3, to=EVERY)
    for a, b in zip(*map(jax.tree.leaves, (add_lora(model, adapters), model)), strict=True):
        np.testing.assert_array_equal(a, b)
    up = jax.random.normal(jax.random.key(1), adapters["gate"].up.shape)
    changed = add_lora(model, adapters | {"gate": adapters["gate"]._replace(up=up)}, alpha=6.0)
    want = model.layers.mlp.gate.kernel[...] + 2 * np.einsum("lnr,lrm->lnm", adapters["gate"].down, up)
    np.testing.assert_allclose(changed.layers.mlp.gate.kernel[...], want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(changed.layers.mlp.up.kernel[...], model.layers.mlp.up.kernel[...])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_objective_of_a_model_is_one_of_its_adapters(dtype: Any) -> None:
    """By the chain rule: what differentiating through `add_lora` gives."""
    base = jax.tree.map(lambda x: x.astype(dtype), tiny_decoder())
    loss = lambda model: sum(jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(model))

    def objective(model: Decoder, batch: Any, step: Any, key: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(model)
        return {"loss": value}, gradient

    fresh = init_lora(base, jax.random.key(0), rank=3, to=("out", "down"))
    adapters = {name: Adapter(one.down, one.up + 0.1) for name, one in fresh.items()}
    metrics, got = jax.jit(lambda x: adapted(objective, base, alpha=6.0)(x, Batch(0, 0), 0, None))(adapters)
    value, want = jax.jit(jax.value_and_grad(lambda x: loss(add_lora(base, x, alpha=6.0))))(adapters)
    np.testing.assert_allclose(metrics["loss"], value, 1e-5)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


def test_merging_adapters_rounds_once() -> None:
    """Of bfloat16 weights and adapters: the nearest bfloat16 to the sum."""
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_decoder())
    fresh = init_lora(base, jax.random.key(0), rank=3)
    noise = jax.random.normal(jax.random.key(1), fresh["query"].up.shape)
    adapters = {"query": Adapter(*(x.astype(jnp.bfloat16) for x in (fresh["query"].down, noise)))}
    merged = add_lora(base, adapters).layers.attention.query.kernel[...]
    wide = lambda x: np.asarray(x, np.float64)
    change = 16 / 3 * np.einsum("lnr,lrm->lnm", *map(wide, adapters["query"]))
    want = jnp.asarray(wide(base.layers.attention.query.kernel[...]) + change, jnp.bfloat16)
    assert merged.dtype == jnp.bfloat16
    assert np.mean(np.asarray(merged != want)) < 1e-3  # but for ties


def test_adapters_that_were_not_trained_are_told(caplog: pytest.LogCaptureFixture) -> None:
    adapters = init_lora(tiny_decoder(), jax.random.key(0), rank=3, to=("out",))
    jax.eval_shape(add_lora, tiny_decoder(), adapters)
    assert caplog.messages == []
    add_lora(tiny_decoder(), adapters)
    assert ["the adapters were not trained" in message for message in caplog.messages] == [True]
    caplog.clear()
    add_lora(tiny_decoder(), {"out": adapters["out"]._replace(up=adapters["out"].up + 1)})
    assert caplog.messages == []


def test_adapters_learn_from_the_weights_below_them(tmp_path: Any) -> None:
    """The teacher is the same arrays; some steps bring the student closer to it; what comes out is a checkpoint."""
    base = tiny_decoder()
    adapters: Any = init_lora(base, jax.random.key(0), rank=2)
    optimizer = optax.adam(3e-3)
    state = optimizer.init(adapters)
    how = dict(HOW, student=lambda adapters: add_lora(base, adapters), teacher=base)

    @jax.jit
    def step(adapters: Any, state: Any) -> Any:
        metrics, gradient = distilled_value_and_grad(adapters, TOKENS, **how)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(adapters, updates), state, metrics["loss"]

    losses = []
    for _ in range(15):
        adapters, state, loss = step(adapters, state)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    trained = add_lora(base, adapters)
    again = load(save(trained, tmp_path / "model")).model
    np.testing.assert_allclose(again(TOKENS), trained(TOKENS), rtol=1e-5, atol=1e-4)


ONES = Adapter(jnp.ones((1, 32, 1)), jnp.ones((1, 1, 32)))


def other(**changes: Any) -> Decoder:
    from dataclasses import replace

    return Decoder(replace(tiny_decoder().config, **changes), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: run(tiny_decoder(), jit=False, temperature=0.0), "temperature is positive, not 0"),
        (lambda: run(tiny_decoder(), jit=False, teacher=other(vocab_size=60)), "predicts 60 tokens, the student 61"),
        (lambda: run(tiny_decoder(), jit=False, teacher=other(hidden_size=16), hidden=1.0), "16 in the teacher, 32 in"),
        (lambda: run(tiny_decoder(), jit=False, segment=T + 1), "does not fit into texts of 16"),
        (lambda: run(tiny_decoder(), jit=False, temperature=np.nan), "temperature is positive, not nan"),
        (lambda: init_lora(tiny_decoder(), jax.random.key(0), rank=0), "at least 1, not 0"),
        (lambda: init_lora(tiny_decoder(), jax.random.key(0), to=()), "one projection or more"),
        (lambda: add_lora(tiny_decoder(), {"qery": ONES}), "has no qery: it is gated; known: query"),
        (lambda: add_lora(other(mlp="plain"), {"gate": ONES}), "has no gate: it is plain"),
        (lambda: add_lora(tiny_decoder(), {"query": ONES}), r"query is \[1, 32, 1\] and .*: it was made for another"),
        (
            lambda: add_lora(load_embedded(dtype="int8").model, init_lora(load_embedded().model, jax.random.key(0))),
            "weights in int8 cannot be adapted",  # codes and scales got the change, each
        ),
        (lambda: init_lora(tiny_decoder(), jax.random.key(0), to=("query", "norm")), "unknown projections norm"),
        (lambda: init_lora(other(mlp="plain"), jax.random.key(0), to=("gate",)), "has no gate: it is plain"),
        (
            lambda: init_lora(other(mlp="experts", experts=ExpertsConfig(3, 2)), jax.random.key(0), to=("up",)),
            "'up' has a matrix for each expert; adapt the projections query",
        ),
    ],
)
def test_errors_say_what_was_given(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
