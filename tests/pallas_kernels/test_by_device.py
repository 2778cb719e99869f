"""The device that counts is the one that computes, not the default one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress import policies
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.pallas_kernels import devices, dispatch, measured
from jaxcompress.pallas_kernels.by_device import by_device
from jaxcompress.pallas_kernels.dispatch import choose_kernel
from jaxcompress.pallas_kernels.types import Here, On
from jaxcompress.recurrence.advance import advance
from jaxcompress.recurrence.attention import slot_step

from .test_contract import CALL, for_tpu
from .test_tpu_recurrence import fresh, tokens

FIRST, SECOND = jax.devices()
KINDS = {FIRST: ("cpu", "cpu"), SECOND: ("tpu", "TPU v5 lite")}


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the second device were a TPU, on which a kernel has been measured faster."""
    monkeypatch.setattr(devices, "kind_of", KINDS.__getitem__)
    here = lambda: {"cpu": FIRST, "tpu": SECOND}
    monkeypatch.setattr(devices, "devices_here", here)
    monkeypatch.setattr(measured, "TABLE", (measured.Measured("TPU v5", "step", "tpu", lambda call: True),))


def picked(backend: Any) -> str:
    chosen = choose_kernel("step", CALL, backend)
    return "jnp" if chosen is None else chosen.kernels.__name__.rsplit(".", 1)[-1]


def on(device: jax.Device) -> jax.Array:
    return jax.device_put(jnp.zeros(2), device)


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("default", [FIRST, SECOND])
def test_arrays_say_where_they_are(default: jax.Device) -> None:
    with jax.default_device(default):
        assert by_device(picked, "auto", on(FIRST)) == "jnp"
        assert by_device(picked, "auto", (on(SECOND), 3, None)) == "tpu"
        assert by_device(picked, "tpu", on(SECOND)) == "tpu"
        with pytest.raises(ValueError, match=r"needs a TPU .* this is a cpu device"):
            by_device(picked, "tpu", on(FIRST))
        # Arrays that were not put anywhere go where others are, and else to the default device.
        assert by_device(picked, "auto", (jnp.zeros(2), on(SECOND))) == "tpu"
        assert by_device(picked, "auto", np.zeros(2)) == ("tpu" if default is SECOND else "jnp")
        assert devices.device() == KINDS[default]


@pytest.mark.usefixtures("mixed")
def test_a_mesh_says_where_it_is() -> None:
    spread = lambda device: On("tpu", jax.sharding.Mesh(np.array([device]), ("x",)), rows="x")
    assert by_device(picked, spread(SECOND), on(SECOND)) == "tpu"
    with pytest.raises(ValueError, match="this is a cpu device"):
        by_device(picked, spread(FIRST), on(FIRST))


def say(backend: Any) -> jax.Array:
    """Something in the compiled program that tells what was picked."""
    return jnp.float32({"jnp": 111.0, "tpu": 222.0}[picked(backend)]) * jnp.ones(3)


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("default", [FIRST, SECOND])
@pytest.mark.parametrize(("platform", "number"), [("cpu", 111), ("tpu", 222)])
def test_what_is_compiled_is_picked_when_it_is_compiled(default: jax.Device, platform: str, number: int) -> None:
    with jax.default_device(default):
        traced = jax.jit(lambda x: x[0] + by_device(say, "auto", x)).trace(jnp.zeros(2))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert [f"{one}.0" in text or f"{one / 100}" in text for one in (111, 222)] == [number == 111, number == 222]


@pytest.mark.usefixtures("mixed")
def test_a_gradient_is_picked_so_too() -> None:
    value, gradient = jax.value_and_grad(lambda x: (x * by_device(say, "auto", x)[0]).sum())(on(SECOND))
    assert value.devices() == {SECOND}  # the processor that it really is
    np.testing.assert_array_equal(gradient, 111)


@pytest.mark.usefixtures("mixed")
def test_kernels_by_name_are_for_the_device_that_can_run_them() -> None:
    traced = lambda name: jax.make_jaxpr(lambda x: x[0] + by_device(say, name, x))(jnp.zeros(2))
    assert "222" in str(traced("tpu"))
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        traced("gpu")


def test_where_nothing_was_measured_nothing_is_traced_twice() -> None:
    seen = []
    jax.make_jaxpr(lambda x: seen.append(by_device(lambda backend: backend, "auto", x)) or x)(1.0)
    assert seen == [Here("auto")]
    with for_tpu():
        assert by_device(lambda backend: devices.device(), "auto", on(FIRST)) == ("tpu", "TPU v5 lite")


class Asked(Exception):
    """Nothing has to be computed to see what is asked."""


@pytest.mark.usefixtures("mixed")
def test_the_library_asks_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way in: what is chosen with is the arrays' own device."""

    def told(op: Any, call: Any, backend: Any, never: Any = None) -> None:
        raise Asked(op, type(backend), devices.device())

    for module in ("attention", "following", "stream", "chunk_step"):
        monkeypatch.setattr(f"jaxcompress.recurrence.{module}.choose_kernel", told)
    policy = policies.TOVA()
    state = fresh(policy)
    rows, heads, slots, width = state.keys.shape[1:]
    held, there = jnp.ones((rows, 1, 1, slots), bool), jnp.ones(rows, bool)
    q, new = jnp.zeros((rows, heads, 2, width)), (state.keys[0, :, :, :1],) * 2
    step = q, new, (state.keys, state.values), 0, jnp.zeros((rows, 1, 1), jnp.int32), held, there
    ways = {
        "step": lambda: slot_step(*jax.device_put(step, SECOND)),
        "step_evict": lambda: advance(*jax.device_put((*tokens(1), state), SECOND), 0, policy),
        "segment": lambda: advance(*jax.device_put((*tokens(3), state), SECOND), 0, policy),
        "block": lambda: advance(*jax.device_put((*tokens(3), state), SECOND), 0, policy, chunk=3),
    }
    for op, way in ways.items():
        with pytest.raises(Asked) as asked:
            way()
        assert asked.value.args == (op, Here, KINDS[SECOND])


@pytest.mark.usefixtures("mixed")
def test_slots_lie_together_for_any_device_here() -> None:
    config = DecoderConfig(8, 8, 8, 1, num_heads=4, num_kv_heads=2, head_dim=128)
    for default in (FIRST, SECOND):
        with jax.default_device(default):
            assert init_state(config, policies.TOVA(), 12)[0].positions.shape[-1] == 16
            assert dispatch.slot_multiple("int8") == 32
