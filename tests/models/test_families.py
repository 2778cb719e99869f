"""Families of decoders over a bounded state. That their logits are those of PyTorch is tested with the checkpoints."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.checkpoints import load
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.experts_config import ExpertsConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.models.rope import RopeConfig
from jaxcompress.policies import TOVA, Full, Policy
from jaxcompress.policies.forget_head import init_forget_head
from jaxcompress.policies.names import get_policy
from jaxcompress.policies.registry import LEARNED, learned_policy
from jaxcompress.state.placement import unrotated

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
FAMILIES = ("neox", "gemma2", "gemma3", "phi3_long", "olmo2", "smollm3")
T, SLOTS = 16, 5
step = jax.jit(read, static_argnames=("chunk", "placement"))


@cache
def model(name: str) -> Decoder:
    return load(PARITY / name).model


@cache
def text(name: str) -> tuple[jax.Array, np.ndarray]:
    """Tokens [2, 24], and the logits of PyTorch."""
    with np.load(PARITY / name / "io.npz") as file:
        return jnp.asarray(file["tokens"]), file["logits"]


@pytest.mark.parametrize("chunk", [1, 7, 24])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_state_changes_nothing(name: str, chunk: int) -> None:
    tokens, logits = text(name)
    config = model(name).config
    state = init_state(config, Full(), tokens.shape[1], batch=2)
    done = step(model(name), tokens, state, Full(), chunk=chunk)
    np.testing.assert_allclose(model(name).logits(done.hidden), logits, atol=1e-4)
    held = {int(layer): part.capacity for part in state for layer in part.layer}
    windows = config.sliding or (None,) * config.num_layers
    assert held == {layer: window or tokens.shape[1] for layer, window in enumerate(windows)}


@pytest.mark.parametrize("name", FAMILIES)
def test_ragged_rows_are_rows_of_their_own(name: str) -> None:
    """TOVA token by token: a batch of three rows, padded left, right and not, and each row alone, padded elsewhere."""
    tokens, lengths = np.asarray(text(name)[0])[:, :T], (7, 9, T)
    rows = [np.roll(tokens[i % 2], i)[:n] for i, n in enumerate(lengths)]

    def run(rows: list[np.ndarray], left: list[bool]) -> list[np.ndarray]:
        pads = [(T - len(row), 0) if side else (0, T - len(row)) for row, side in zip(rows, left, strict=True)]
        padded = lambda x: np.stack([np.pad(one, pad) for one, pad in zip(x, pads, strict=True)])
        valid = padded([np.ones(len(row), bool) for row in rows])
        state = init_state(model(name).config, TOVA(), SLOTS, batch=len(rows))
        done = step(model(name), jnp.asarray(padded(rows)), state, TOVA(), valid=jnp.asarray(valid))
        return [hidden[mask] for hidden, mask in zip(np.asarray(done.hidden), valid, strict=True)]

    together = run(rows, [True, False, False])
    for row, mine, left in zip(rows, together, (False, True, False), strict=True):
        np.testing.assert_allclose(run([row], [left])[0], mine, atol=2e-4)


NAMES = (
    "full", "window", "window+1", "streaming_llm+2", "tova", "tova-query_head", "h2o", "observed_attention",
    "scissorhands", "snapkv+2", "nacl", "knorm", "keydiff", "lagkv+2", "cur", "expected_attention", "rkv", "random",
    "tova-pool/adaptive", "tova/mean_slots2", "tova/low_rank4", "tova/d2o", *LEARNED,
)  # fmt: skip


def policy_named(name: str) -> Policy:
    if name not in LEARNED:
        return get_policy(name)
    config, start = (
        model("gemma2").config,
        {"dms": (5.0, 0.0), "dmc": (-20.0, 0.0), "retention": (0.0, 1.0, 0.0, 0.0)}[name],
    )
    shape = dict(layers=config.num_layers, kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    head = init_forget_head(jax.random.key(0), **shape, hidden=4, start=start)
    return learned_policy(name, head._asdict(), **({"window": 2} if name == "dms" else {}))


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_runs_with_soft_caps_and_windows(name: str) -> None:
    """Until something has to go, the logits are those of PyTorch; afterwards they are finite."""
    policy = policy_named(name)
    tokens, logits = text("gemma2")
    slots, chunk = (T, 1) if not policy.evicts else (max(SLOTS, policy.needs), T if policy.oneshot_only else 1)
    state = init_state(model("gemma2").config, policy, slots, batch=2)
    done = step(model("gemma2"), tokens[:, :T], state, policy, chunk=chunk)
    ours = np.asarray(model("gemma2").logits(done.hidden))
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[:, :SLOTS], logits[:, :SLOTS], atol=1e-4)


# RoPE by layer


@pytest.mark.parametrize("name", ["gemma3", "smollm3"])
def test_each_layer_turns_by_its_own_rope(name: str) -> None:
    config, x = model(name).config, jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    at = jnp.arange(3)
    turned = jax.jit(lambda layer: config.rotary(layer)(x, at))
    for layer, rope in enumerate(config.layer_ropes):
        expected = x if rope is None else rope.rotary(8)(x, at)
        np.testing.assert_allclose(turned(layer), expected, atol=1e-6)
    assert len(set(config.layer_ropes)) == 2


@pytest.mark.parametrize("attention_factor", [1.0, 1.5])
def test_turning_back_gives_what_was_turned(attention_factor: float) -> None:
    """The channels that are not rotated have no factor to take away."""
    rope = RopeConfig(kind="yarn", partial=0.5, attention_factor=attention_factor, original_context=8, factor=2.0)
    rotate = partial(rope.rotary(8))
    x, at = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)), jnp.float32), jnp.arange(5)
    np.testing.assert_allclose(unrotated(rotate, rotate(x, at), at), x, atol=1e-5)
    np.testing.assert_array_equal(rotate(x, at)[:, 4:], x[:, 4:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layer_ropes=(None,)), "layer_ropes has 1 entries for 2 layers"),
        (dict(layer_ropes=(RopeConfig(partial=0.5), None)), "must rotate as many"),
        (dict(rope=RopeConfig(partial=0.4)), "rotates 3 of 8 channels"),
        (dict(parallel=True, norms_at="both"), "norms before them"),
        (dict(mlp="experts"), "given together, not mlp='experts', experts=None"),
        (dict(experts=ExpertsConfig(3, 2)), "given together, not mlp='gated'"),
        (dict(mlp="experts", experts=ExpertsConfig(3, 2), mlp_bias=True), "biases of experts are set in ExpertsConfig"),
    ],
)
def test_shapes_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    shape: Any = dict(vocab_size=9, hidden_size=16, intermediate_size=8, num_layers=2, num_heads=2, num_kv_heads=1)
    with pytest.raises(ValueError, match=message):
        type(model("gemma2").config)(**shape, head_dim=8, **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda shape: RopeConfig(kind="Yarn"), "kind must be one of default, linear, .*, not 'Yarn'"),
        (lambda shape: shape(norms_at="befor"), "norms_at must be one of before, after, both, not 'befor'"),
        (lambda shape: shape(qk_norm_over="heads"), "qk_norm_over must be one of head, projection, not 'heads'"),
        (lambda shape: shape(norm="rmsnorm"), "norm must be one of rms"),
        (lambda shape: shape(activation="swish"), "activation must be one of silu"),
        (lambda shape: shape(sliding=(None, 0)), "a sliding window has 1 token or more, not 0"),
        (lambda shape: shape(sliding=(-4, None)), "a sliding window has 1 token or more, not -4"),
        (lambda shape: RopeConfig(kind="longrope").frequencies(8), "0 short_factors for 4 rotated channel pairs"),
    ],
)
def test_words_and_numbers_that_mean_nothing(make: Any, message: str, as_users_call_it: None) -> None:
    shape = partial(type(model("gemma2").config), 9, 16, 8, 2, 2, 1, 8)
    with pytest.raises(ValueError, match=message):
        make(shape)
