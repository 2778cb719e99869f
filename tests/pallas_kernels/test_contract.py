"""Which kernel is picked, what is said where none is, and that the one asked for really computes."""

from __future__ import annotations

import inspect
import logging
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_tokens, tiny_decoder

from jaxcompress import policies
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import read
from jaxcompress.models.init_state import init_state
from jaxcompress.pallas_kernels import dispatch, measured, tpu_limits, tuning
from jaxcompress.pallas_kernels.dispatch import choose_kernel
from jaxcompress.pallas_kernels.types import KernelCall, Kernels, On
from jaxcompress.policies import Policy, every, protect, sampled
from jaxcompress.policies.reductions.merge import merge_nearest
from jaxcompress.policies.reductions.reduced import with_reduce
from jaxcompress.recurrence.advance import advance, on
from jaxcompress.recurrence.attention import decode_backend, slot_step
from jaxcompress.state.eviction_rule import EvictionRule

from .examples import POLICIES, a_step, close, compiled, some
from .test_tpu_recurrence import fresh, tokens

CALL = KernelCall(2, 2, 2, 16, 128, 1, 1, "float32", "float32")
TPU = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")  # type: ignore


def for_tpu() -> Any:
    """As when compiling for a TPU that is not here."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=TPU))


def launches(function: Any, *args: Any) -> list[str]:
    """Names of the kernels in what a function traces to."""
    found = []

    def visit(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append(str(equation.params["name"]))
                continue
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                visit(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") or hasattr(inner, "jaxpr") else None

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


@pytest.mark.parametrize(
    ("name", "t", "chunk", "kernels"),
    [
        ("tova", 1, 1, ["decode_step_evict"]),
        ("h2o", 12, 1, ["stream_segment"]),
        ("h2o", 12, 6, ["block_with_mass"]),
    ],
)
def test_a_layer_is_one_launch(name: str, t: int, chunk: int, kernels: list[str]) -> None:
    run = partial(advance, layer=0, policy=POLICIES[name], chunk=chunk, backend="tpu-interpret")
    assert launches(lambda *args: run(*args), *tokens(t), fresh(POLICIES[name])) == kernels


def test_a_policy_with_rules_of_its_own_uses_the_step() -> None:
    policy = policies.SnapKV(2, 3)
    run = partial(advance, layer=0, policy=policy, backend="tpu-interpret")
    assert launches(lambda *args: run(*args), *tokens(1), fresh(policy)) == ["decode_step"]


def test_auto_is_jnp_until_something_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernel("step", CALL, "auto") is None
    assert decode_backend() == "jnp on cpu"
    with for_tpu():
        assert choose_kernel("step", CALL, "auto") is None
        assert decode_backend() == "jnp on tpu (kernels by name: tpu; not measured here)"
        row = measured.Measured("TPU v5", "step", "tpu", lambda call: call.slots >= 16)
        monkeypatch.setattr(measured, "TABLE", (row,))
        chosen = choose_kernel("step", CALL, "auto")
        assert chosen is not None
        assert chosen.kernels.__name__.endswith("tpu")
        assert choose_kernel("step", CALL._replace(slots=8), "auto") is None
        assert choose_kernel("block", CALL, "auto") is None
        assert decode_backend() == "tpu for a decoding step, jnp on tpu"


def test_the_environment_says_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXCOMPRESS_BACKEND", "tpu-interpret")
    assert choose_kernel("step", CALL, "auto") is not None
    assert choose_kernel("step", CALL, "jnp") is None
    assert decode_backend() == "tpu-interpret on cpu"
    monkeypatch.setenv("JAXCOMPRESS_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast' .environment variable JAXCOMPRESS_BACKEND.; known: auto, jnp"):
        choose_kernel("step", CALL, "auto")


def test_kernels_that_the_device_cannot_run() -> None:
    with pytest.raises(ValueError, match="needs a TPU .* this is a cpu device .* can run auto, jnp; tpu-interpret"):
        advance(*tokens(1), fresh(POLICIES["tova"]), 0, POLICIES["tova"], backend="tpu")
    assert decode_backend("tpu").startswith("none: backend 'tpu' needs a TPU")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(head_dim=64), "heads are 64 wide"),
        (dict(dtype="int4"), "int4"),
        (dict(slots=17), "17 slots of float32 are not a multiple of the 8 rows"),
    ],
)
def test_a_fallback_is_logged_once(change: Any, says: str, caplog: pytest.LogCaptureFixture) -> None:
    dispatch._say.cache_clear()
    with caplog.at_level(logging.WARNING, "jaxcompress"):
        for _ in range(3):
            assert choose_kernel("step", CALL._replace(**change), "tpu-interpret") is None
    assert len(caplog.messages) == 1
    assert says in caplog.messages[0]
    assert "jnp instead" in caplog.messages[0]


@pytest.mark.parametrize(
    ("policy", "says"),
    some([(policies.StreamingLLM(2), "re-indexed"), (with_reduce(policies.TOVA(), merge_nearest()), None)]),
)
def test_what_kernels_do_not_do_is_done_all_the_same(
    policy: Policy, says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    dispatch._say.cache_clear()
    state = fresh(policy)
    with caplog.at_level(logging.WARNING, "jaxcompress"):
        got = advance(*tokens(4), state, 0, policy, backend="tpu-interpret")
    assert says is None or any(says in message for message in caplog.messages)
    close(got, advance(*tokens(4), state, 0, policy, backend="jnp"), 1e-5)


@policies.policy
class Upside(policies.TOVA):
    """Another score than its base's, and no rule of its own."""

    def score(self, stats: Any, held: Any) -> Any:
        return -stats


def test_a_policy_follows_its_rule_only_while_it_is_what_the_rule_says() -> None:
    tova, h2o = policies.TOVA(), policies.H2O(0.5, "kv_head")
    assert tova.rule(10) == EvictionRule("last")
    assert h2o.rule(9) == EvictionRule("sum", recent=4)
    assert policies.Window(4).rule(9) == EvictionRule("age", first=4)
    assert protect(protect(h2o, first=2, recent=6), first=1).rule(9) == EvictionRule("sum", first=2, recent=6)
    for other in (
        every(tova, 4), sampled(tova, 2), with_reduce(tova, merge_nearest()), policies.TOVA("pool"),
        policies.SnapKV(2, 3),
        Upside(),
        protect(sampled(tova, 2), first=1), policies.Full(),
    ):  # fmt: skip
        assert other.rule(10) is None, other.name


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_a_backend_has_what_the_contract_says(name: str) -> None:
    kernels, limits = dispatch.kernels(name), dispatch.limits(name)  # type: ignore
    assert limits.needs
    assert not limits.runs_on("cpu", "cpu")
    for op in ("step", "step_evict", "block", "segment"):
        assert isinstance(limits.declines(op, CALL._replace(dtype="int4")), str)
        assert "interpret" in inspect.signature(getattr(kernels, op)).parameters
    assert set(dir(Kernels)) >= {"step", "step_evict", "block", "segment"}


@pytest.mark.slow
def test_reading_with_a_backend() -> None:
    """A model whose heads are too narrow falls back, and reads the same."""
    model, ids = tiny_decoder(), jnp.asarray(random_tokens(2, 9))
    state = init_state(model.config, policies.TOVA(), 4, batch=2)
    assert on("tpu-interpret") is on("tpu-interpret")  # what is compiled for it is found again
    got = read(model, ids, state, policies.TOVA(), recurrence=on("tpu-interpret"))
    close(got, read(model, ids, state, policies.TOVA()), 1e-5)


def test_gradient_through_a_step() -> None:
    """Of what the kernel computes, by the jnp path."""
    step = a_step(slots=16)
    visible = (step.held >= 0)[:, :, None]

    def loss(q: Any, new: Any, backend: Any) -> Any:
        new = jax.tree.map(lambda x: x[:, :, None], new)
        out, weights, stored = slot_step(
            q, new, step.stored, step.layer, step.index[..., None], visible, step.present, backend=backend
        )
        return jnp.square(out).sum() + (weights**3).sum() + jnp.square(stored[1]).sum()

    gradient = lambda name: compiled(jax.grad(partial(loss, backend=name), argnums=(0, 1)))(step.q, step.new)
    got, want = gradient("tpu-interpret"), gradient("jnp")
    close(got, want, 1e-5)


# Spread over devices


def a_mesh(rows: int, heads: int) -> Any:
    return jax.make_mesh((rows, heads), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("rows", "heads", "name"),
    some([(1, 2, "tova-kv_head"), (2, 1, "tova"), (1, 2, "tova")], (1, 2, "tova-kv_head")),
)
def test_rows_and_heads_on_different_devices(rows: int, heads: int, name: str) -> None:
    policy, cut = POLICIES[name], lambda x: x[:2]
    q, k, v, positions = map(cut, tokens(9))
    state = init_state(DecoderConfig(7, 16, 16, 2, 4, 2, 128), policy, 7, batch=2)[0]
    spread = On("tpu-interpret", a_mesh(rows, heads), "data", "model")
    want = advance(q, k, v, positions, state, 1, policy, backend="jnp")
    run = compiled(partial(advance, layer=1, policy=policy, backend=spread))
    close(run(q, k, v, positions, state), want, 1e-5)


def test_nothing_is_sent_but_the_mean_over_heads() -> None:
    """A step of the TPU's kernel for four chips, lowered here: no collective for sets of their own."""
    abstract = jax.sharding.AbstractMesh(
        (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2, abstract_device=TPU
    )
    policy = POLICIES["tova-kv_head"]
    state = jax.eval_shape(lambda: init_state(DecoderConfig(7, 16, 16, 2, 8, 4, 128), policy, 15, batch=4)[0])
    shape = jax.ShapeDtypeStruct
    q, kv = shape((4, 1, 8, 128), jnp.float32), shape((4, 1, 4, 128), jnp.float32)
    run = jax.jit(partial(advance, layer=1, policy=policy, backend=On("tpu", abstract, "data", "model")))
    with jax.sharding.use_abstract_mesh(abstract):
        text = run.trace(q, kv, kv, shape((4, 1), jnp.int32), state).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1
    assert not any(word in text for word in ("all_reduce", "all_gather", "all_to_all", "collective_permute"))


def test_heads_that_do_not_divide_are_not_spread(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._say.cache_clear()
    spread = On("tpu-interpret", a_mesh(1, 2), None, "model")
    assert choose_kernel("step", CALL._replace(kv_heads=3), spread) is None
    assert choose_kernel("segment", CALL._replace(rule=EvictionRule("last")), spread) is None
    assert "cannot be spread" in caplog.messages[0]
    assert "the rule takes their mean" in caplog.messages[1]


# Export


@pytest.mark.parametrize(("t", "chunk"), [(1, 1), (12, 1), (12, 12)])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_export_for_tpu(t: int, chunk: int, dtype: str) -> None:
    """The whole of `advance` lowers for a TPU on a machine that has none."""
    policy = POLICIES["tova"]
    state = jax.eval_shape(
        lambda: init_state(DecoderConfig(7, 16, 16, 2, 4, 2, 128), policy, 31, batch=2, dtype=dtype)[0]
    )
    shape = jax.ShapeDtypeStruct
    args = (
        shape((2, t, 4, 128), jnp.bfloat16),
        *[shape((2, t, 2, 128), jnp.bfloat16)] * 2,
        shape((2, t), jnp.int32),
        state,
    )
    run = jax.jit(partial(advance, layer=1, policy=policy, chunk=chunk, backend="tpu"))
    with for_tpu():
        exported = jax.export.export(run, platforms=["tpu"])(*args)
    kernels = exported.mlir_module().count("stablehlo.custom_call @tpu_custom_call")
    assert kernels == (1 if dtype == "bfloat16" or t == 1 else 0 if chunk > 1 else 1)


# Sizes of blocks


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("own_cache")
def test_sizes_are_measured_and_kept() -> None:
    default, fits = dict(n=1), lambda size: size["n"] < 9
    assert tuning.sizes("step", CALL, default, fits) == default
    seconds = {4: 0.1, 5: 0.0, 9: 0.05}

    def run(size: dict[str, int]) -> Any:
        if size["n"] == 7:
            raise ValueError("too large\nfor this")
        time.sleep(seconds[size["n"]])

    candidates = [dict(n=4), dict(n=5), dict(n=7), dict(n=9)]
    assert tuning.tune("step", CALL, candidates, run, repeats=3) == dict(n=5)
    assert tuning.sizes("step", CALL, default, fits) == dict(n=5)
    assert tuning.sizes("step", CALL, default, lambda size: False) == default
    assert tuning.sizes("step", CALL._replace(slots=17), default, fits) == default
    assert tuning.sizes("block", CALL, default, fits) == default
    with for_tpu():
        assert tuning.sizes("step", CALL, default, fits) == default  # another device
    with pytest.raises(ValueError, match="no candidate ran for step .*: too large"):
        tuning.tune("step", CALL, [dict(n=7)], run)


@pytest.mark.usefixtures("own_cache")
def test_candidates_are_what_kernels_are_traced_with() -> None:
    seen = []

    def run(size: dict[str, int]) -> None:
        if size not in seen:  # as in tracing, once for each
            assert tuning.sizes("step", CALL, dict(n=0), lambda size: size["n"] < 9) == size
            seen.append(size)

    assert tuning.tune("step", CALL, [dict(n=9), dict(n=2), dict(n=3)], run, repeats=1) in seen
    assert seen == [dict(n=2), dict(n=3)]
    assert tuning.sizes("step", CALL, dict(n=0), lambda size: False) == dict(n=0)


@pytest.mark.parametrize("op", ["step", "step_evict", "segment", "block"])
def test_sizes_to_try(op: Any) -> None:
    """All fit, and there are some wherever the kernel does not decline."""
    rule = EvictionRule("last") if op in ("step_evict", "segment") else None
    for slots, kv_heads, dtype in [(16, 2, "float32"), (512, 8, "bfloat16"), (8192, 8, "int8")]:
        call = KernelCall(8, kv_heads, 4, slots, 128, 1, 64, dtype, "bfloat16", rule)
        if tpu_limits.declines(op, call) is None:
            tried = tpu_limits.candidates(op, call)
            assert tried
            assert all(size.keys() == tried[0].keys() for size in tried)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": 1}', None])
def test_a_cache_that_cannot_be_read_is_no_cache(text: str | None) -> None:
    tuning.path().parent.mkdir(parents=True)
    if text is None:
        tuning.path().mkdir()
    else:
        tuning.path().write_text(text)
    assert tuning.sizes("step", CALL, dict(n=1), lambda size: True) == dict(n=1)
    np.testing.assert_equal(tuning._read().get(tuning.key("step", CALL)), None)
