"""Frozen weights are arguments of what is compiled, not constants of it."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import random_tokens, tiny_decoder

from jaxcompress.policies import Retention
from jaxcompress.policies.names import get_policy
from jaxcompress.training.compiled import Compiled
from jaxcompress.training.data import Batch
from jaxcompress.training.distillation import full_cache_hidden
from jaxcompress.training.lora import add_lora, init_lora
from jaxcompress.training.merging import init_gates, merging_loss
from jaxcompress.training.objectives import adapted, bounded, causal, distilled
from jaxcompress.training.policy_objectives import policy_objective
from jaxcompress.training.retention_heads import init_retention
from jaxcompress.training.trainer import Objective, init_train_state, make_evaluate, make_step

T = 16
BATCH = Batch(random_tokens(2, T + 1), np.ones((2, T), np.float32))
MODEL = tiny_decoder()
HOW: dict[str, Any] = dict(slots=5, segment=8)
KEY = jax.random.key(0)


def large_constants(text: str) -> list[int]:
    """Bytes of each constant of a program that is larger than 1 KiB."""
    return [size for size in (len(digits) // 2 for digits in re.findall(r'dense<"0x([0-9A-F]+)"', text)) if size > 1024]


def of_a_loss(loss: Callable[..., Any]) -> Objective:
    """Of a network that learns beside a frozen model."""

    def objective(head: Any, batch: Batch, step: Any, key: Any) -> Any:
        (value, _), slope = jax.value_and_grad(
            lambda head: loss(MODEL, batch.tokens, head, weights=batch.weights, share=0.5, temperature=1.0),
            has_aux=True,
        )(head)
        return {"loss": value}, slope

    return objective


def adapters() -> Any:
    return init_lora(MODEL, KEY, rank=2)


def learned(name: str, **how: Any) -> tuple[Any, Any]:
    made = policy_objective(MODEL, name, KEY, steps=4, **how)
    return made.params, made.objective


HEAD = init_retention(MODEL.config, KEY)
CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "causal": lambda: (MODEL, causal()),
    "distilled": lambda: (MODEL, distilled(get_policy("tova"), teacher=MODEL, **HOW)),
    "a learned policy": lambda: (MODEL, bounded(Retention(HEAD), **HOW)),
    "LoRA": lambda: (adapters(), adapted(causal(), MODEL)),
    "LoRA with a teacher": lambda: (adapters(), adapted(distilled(get_policy("tova"), teacher=MODEL, **HOW), MODEL)),
    "LoRA as a student": lambda: (
        adapters(),
        distilled(get_policy("tova"), teacher=MODEL, student=lambda adapters: add_lora(MODEL, adapters), **HOW),
    ),
    "retention": lambda: learned("retention"),
    "retention beside the model": lambda: learned(
        "retention", model_objective=partial(distilled, teacher=MODEL, **HOW)
    ),
    "dms": lambda: learned("dms"),
    "dmc": lambda: learned("dmc"),
    "dmc of a frozen model": lambda: (init_gates(MODEL.config, KEY), of_a_loss(partial(merging_loss, teacher=MODEL))),
}
QUICK = {"LoRA as a student", "retention", "dms", "dmc of a frozen model"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_no_weights_are_in_the_program(case: str) -> None:
    params, objective = CASES[case]()
    optimizer = optax.sgd(0.1)
    step = make_step(objective, optimizer)
    state = jax.eval_shape(partial(init_train_state, params, optimizer))
    assert large_constants(step.lower(state, BATCH).as_text()) == []


def test_a_plain_jit_would_have_them() -> None:
    """That the measure measures."""
    function = lambda tokens: full_cache_hidden(MODEL, tokens)
    assert sum(large_constants(jax.jit(function).lower(BATCH.tokens).as_text())) > 20_000
    assert large_constants(Compiled(function).lower(BATCH.tokens).as_text()) == []


class TestCompiled:
    """The function itself."""

    def test_it_is_jit(self) -> None:
        frozen, traced = jnp.arange(400.0), []

        def function(tree: Any, x: Any) -> Any:
            scan = jax.lax.scan(lambda total, y: (total + y * frozen[3], None), tree["a"], x)
            return {"sum": scan[0], "same": tree}, np.float32(2), x.max()

        def seen(*given: Any) -> Any:
            traced.append(given[1].shape)
            return function(*given)

        mine, plain = Compiled(seen), jax.jit(function)
        for shape in ((3,), (5,), (3,)):
            given = {"a": jnp.float32(1), "b": None}, jnp.arange(float(shape[0]))
            jax.tree.map(np.testing.assert_array_equal, mine(*given), plain(*given))
        assert traced == [(3,), (5,)]

    def test_the_first_argument_is_donated(self) -> None:
        frozen = jnp.ones(300)
        x, y = jnp.zeros(300), jnp.zeros(300)
        Compiled(lambda x, y: x + y + frozen, donate=True)(x, y)
        assert (x.is_deleted(), y.is_deleted(), frozen.is_deleted()) == (True, False, False)

    def test_what_it_holds_is_let_go_with_it(self) -> None:
        """Nothing of a run outlives it: neither what is trained nor what is frozen."""

        def run() -> list[weakref.ref[jax.Array]]:
            frozen, params = jnp.ones((4, 61)), {"table": jnp.zeros((61, 4))}

            def objective(params: Any, batch: Batch, step: Any, key: Any) -> Any:
                loss = lambda params: jnp.square(params["table"][batch.tokens] @ frozen - 1).mean()
                value, gradient = jax.value_and_grad(loss)(params)
                return {"loss": value}, gradient

            optimizer = optax.sgd(0.1)
            state, _ = make_step(objective, optimizer)(init_train_state(params, optimizer), BATCH)
            make_evaluate(objective)(state.params, [BATCH])
            return [weakref.ref(x) for x in (frozen, params["table"], state.params["table"])]

        held = run()
        gc.collect()
        assert [ref() is None for ref in held] == [True] * 3
