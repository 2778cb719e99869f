"""The decoding step for TPUs: interpreted, it equals the jnp path."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.pallas_kernels import rules, tpu_limits, tpu_step
from jaxcompress.pallas_kernels.types import KernelCall
from jaxcompress.recurrence.attention import slot_attention
from jaxcompress.state.select import worst
from jaxcompress.state.slots import write_slots

from .examples import RACES, RULES, Step, a_step, close, compiled, no_races, some


def reference(step: Step) -> Any:
    stored = write_slots(
        step.stored, jax.tree.map(lambda x: x[:, :, None], step.new), step.layer, step.index[..., None]
    )
    keys, values = jax.tree.map(lambda x: x[step.layer], stored)
    visible = (step.held >= 0)[:, :, None]
    out, weights = slot_attention(step.q, keys, values, visible, step.present)
    return out.astype(step.q.dtype), weights, stored


def run(step: Step, interpret: Any = True) -> Any:
    seen = step.held >= 0
    return tpu_step.step(step.q, step.new, step.stored, step.layer, step.index, seen, step.present, interpret=interpret)


def evict(step: Step, rule: Any, interpret: Any = True) -> Any:
    numbers = None if rule.fold == "age" else step.numbers
    return tpu_step.step_evict(
        step.q, step.new, step.stored, step.layer, step.index, step.held, numbers, step.present, rule,
        interpret=interpret,
    )  # fmt: skip


def evict_reference(step: Step, rule: Any) -> Any:
    out, weights, stored = reference(step)
    mean = weights.mean((1, 2))[:, None] if step.held.shape[1] == 1 else weights.mean(2)
    numbers = None
    if rule.fold != "age":
        numbers = mean + step.numbers if rule.fold == "sum" else mean
        numbers = jnp.where(step.present[:, None, None], numbers, step.numbers)
    newest = step.held.max(-1, keepdims=True)
    scores = (step.held - newest).astype(jnp.float32) if numbers is None else numbers
    scores = jnp.where((step.held < rule.first) | (step.held > newest - rule.recent), jnp.inf, scores)
    return out, numbers, worst(scores, step.held).astype(jnp.int32), stored


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Blocks of so many heads and slots."""

    def use(heads: int, slots: int) -> None:
        monkeypatch.setattr(tpu_step, "step_sizes", lambda op, call: dict(heads=heads, slots=slots))

    return use


TOLERANCE = {"bfloat16": 2e-2}


@pytest.mark.parametrize(
    ("dtype", "query", "sets"),
    some(
        [
            ("float32", "float32", 1),
            ("float32", "float32", 2),
            ("bfloat16", "bfloat16", 2),
            ("bfloat16", "float32", 1),
            ("int8", "float32", 2),
            ("float8_e4m3fn", "float32", 1),
        ],
        ("float32", "float32", 1),
        ("bfloat16", "bfloat16", 2),
        ("float8_e4m3fn", "float32", 1),
    ),  # fmt: skip
)
def test_equals_jnp(dtype: str, query: str, sets: int) -> None:
    step = a_step(sets=sets, dtype=dtype, query=query)
    close(compiled(run)(step), compiled(reference)(step), TOLERANCE.get(dtype, 2e-6))


@pytest.mark.parametrize("slots", some([300, 256], 300))
def test_tiles_of_slots(tiles: Any, slots: int) -> None:
    """The online softmax, and a last tile that slots do not fill."""
    step = a_step(slots=slots, rows=3, sets=2)
    tiles(1, 128)
    close(compiled(run)(step), compiled(reference)(step))


@pytest.mark.parametrize(
    ("rule", "sets", "by"),
    some(
        [("last", 1, 0), ("protected", 2, 128), ("age", 1, 0), ("sum", 2, 0), ("last", 1, 128)],
        ("last", 1, 0),
        ("protected", 2, 128),
    ),  # fmt: skip
)
def test_eviction(tiles: Any, rule: str, sets: int, by: int) -> None:
    step = a_step(sets=sets, slots=140 if by else 17, ties=True)
    tiles(2, by or 17)
    got = compiled(partial(evict, rule=RULES[rule]))(step)
    close(got, compiled(partial(evict_reference, rule=RULES[rule]))(step))


def test_rows_without_a_token_change_nothing() -> None:
    step = a_step(rows=2)
    out, weights, stored = compiled(run)(step)
    assert not step.present[1]
    assert not np.any(out[1])
    assert not np.any(weights[1])
    close([x[:, 1] for x in stored], [x[:, 1] for x in step.stored])
    close([x[0] for x in stored], [x[0] for x in step.stored])  # nor do other layers


@pytest.mark.parametrize(
    ("dtype", "fused"), some([("float32", True), ("bfloat16", False), ("int8", False), ("int8", True)], ("int8", False))
)
def test_no_races(tiles: Any, dtype: str, fused: bool) -> None:
    """Nor is anything read that was never written."""
    step = a_step(rows=2, slots=256, sets=2, dtype=dtype, layers=1)
    tiles(1, 128)
    done, want = (evict, evict_reference) if fused else (run, reference)
    rule = (RULES["sum"],) if fused else ()
    close(done(step, *rule, interpret=RACES), want(step, *rule), TOLERANCE.get(dtype, 2e-6))
    no_races()


@pytest.mark.slow
@settings(max_examples=6)
@given(
    st.integers(0, 99), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(8, 40), st.booleans(),
    st.sampled_from(["float32", "bfloat16", "int8", "float8_e4m3fn"]), st.sampled_from(list(RULES)), st.booleans(),
)  # fmt: skip
def test_any_shape(seed, rows, heads, group, slots, per_head, dtype, rule, races) -> None:
    step = a_step(
        seed, rows=rows, heads=heads, group=group, slots=slots, sets=heads if per_head else 1, dtype=dtype, ties=True
    )
    interpret = RACES if races else True
    close(run(step, interpret), reference(step), TOLERANCE.get(dtype, 2e-6))
    out, numbers, goes, stored = evict(step, RULES[rule], interpret)
    close((out, numbers, stored), evict_reference(step, RULES[rule])[:2] + reference(step)[2:], 2e-2)
    # Of scores that rounding brought together another may go; it must be as low.
    shown = step.numbers if numbers is None else numbers
    again = rules.victim(RULES[rule], None if numbers is None else shown, step.held)[..., 0]
    close(goes, again)


def test_what_is_declined() -> None:
    call = KernelCall(1, 8, 4, 512, 128, 1, 1, "bfloat16", "bfloat16")
    assert tpu_limits.declines("step", call) is None
    for change, says in [
        (dict(head_dim=64), "64 wide, not a multiple of 128"),
        (dict(dtype="int4"), "int4"),
        (dict(dtype="float16"), "float16"),
        (dict(query="float16"), "queries are float16"),
        (dict(slots=513), "init_state(..., slot_multiple=8)"),
        (dict(dtype="int8", slots=513), "multiple of the 32 rows"),
        (dict(slots=2**20), "do not fit into VMEM"),
    ]:
        why = tpu_limits.declines("step", call._replace(**change))
        assert why is not None
        assert says in why
