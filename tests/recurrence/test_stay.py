"""How many tokens stay is what a policy is told, whatever combinator changes it: shares are of that number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ShapeDtypeStruct as Shape

from jaxcompress import policies
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import Policy, every, leaf, once, policy, protect
from jaxcompress.policies.cache_view import Scope
from jaxcompress.policies.policy import Schedule
from jaxcompress.recurrence.advance import advance
from recurrence.harness import FAST_COMPILE

CONFIG = DecoderConfig(8, 8, 8, 1, 4, 2, 4)  # one layer, 4 query heads over 2 kv heads of width 4


@policy
class Told(Policy):
    """Notes what it is told while it is traced."""

    notes: Any = leaf()
    scope: Scope = "kv_head"
    schedule: Schedule = Schedule()

    def score(self, stats: Any, held: Any) -> Any:
        self.notes.append((held.capacity, held.per_set))
        return held.positions.astype(jnp.float32)


class Notes(list):
    """A leaf, not a pytree."""


def told(tokens: int, slots: int, wrap: Any = lambda one: one, chunk: int = 1, **how: Any) -> set[tuple[int, int]]:
    notes = Notes()
    one = wrap(Told(notes, **how))
    kv = lambda heads: Shape((1, tokens, heads, 4), jnp.float32)
    state = jax.eval_shape(lambda: init_state(CONFIG, one, slots)[0])
    step = lambda q, k, v, at, state: advance(q, k, v, at, state, 0, one, chunk=chunk)
    jax.eval_shape(step, kv(4), kv(2), kv(2), Shape((1, tokens), jnp.int32), state)
    return set(notes)


BEFORE = Schedule("before")


@pytest.mark.parametrize(("how", "stay"), [
    (dict(tokens=1, slots=12), 12),
    (dict(tokens=3, slots=12), 12),  # streamed
    (dict(tokens=20, slots=12, chunk=20), 12),
    (dict(tokens=1, slots=12, wrap=lambda one: every(one, 5)), 8),  # 13 with the new one, 5 go
    (dict(tokens=20, slots=12, chunk=20, wrap=lambda one: every(one, 5)), 12),  # a block fills the room
    (dict(tokens=20, slots=12, chunk=20, wrap=lambda one: once(one, 4)), 4),
    (dict(tokens=20, slots=12, chunk=20, wrap=lambda one: protect(once(one, 4), first=1)), 4),
    (dict(tokens=20, slots=12, chunk=20, wrap=lambda one: once(protect(every(one, 3), first=1), 4)), 4),
    (dict(tokens=1, slots=12, schedule=BEFORE), 11),  # room is made for one
])  # fmt: skip
def test_what_a_policy_is_told(how: Any, stay: int) -> None:
    assert told(**how) == {(stay, stay)}


@pytest.mark.parametrize(("how", "stay"), [
    (dict(tokens=1, slots=12), (24, 12)),
    (dict(tokens=1, slots=12, wrap=lambda one: every(one, 5)), (16, 8)),
    (dict(tokens=20, slots=12, chunk=20, wrap=lambda one: once(one, 4)), (8, 4)),
])  # fmt: skip
def test_in_a_pool_of_two_heads(how: Any, stay: tuple[int, int]) -> None:
    assert told(**how, scope="pool") == {stay}


step = jax.jit(advance, static_argnames="chunk", compiler_options=FAST_COMPILE)


@pytest.mark.parametrize("one", [
    policies.critical(policies.H2O(0.5, "kv_head")), policies.adaptive(policies.H2O(0.5, "pool")),
], ids=repr)  # fmt: skip
def test_shares_of_what_once_keeps(one: Policy) -> None:
    """The same tokens stay of a prompt, whatever room there is for later ones."""
    q = jax.random.normal(jax.random.key(0), (1, 20, 4, 4))
    k, v = (jax.random.normal(jax.random.key(i), (1, 20, 2, 4)) for i in (1, 2))
    out = jnp.eye(16).reshape(2, 2, 4, 16)[..., :8]

    def kept(slots: int, one: Policy) -> list[Any]:
        state = init_state(CONFIG, one, slots)[0]
        state = step(q, k, v, jnp.arange(20)[None], state, 0, one, chunk=20, project=out).state
        held = np.asarray(state.positions[0, 0])
        owner = np.zeros_like(held) if state.owner is None else np.asarray(state.owner[0, 0])
        return [sorted(zip(p[p >= 0], o[p >= 0], strict=True)) for p, o in zip(held, owner, strict=True)]

    assert kept(6, one) == kept(20, once(one, 6))
