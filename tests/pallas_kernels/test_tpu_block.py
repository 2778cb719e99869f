"""Blocks of queries on a TPU, interpreted: output and mass equal those of a T x N softmax."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.pallas_kernels import tpu_block
from jaxcompress.recurrence.advance import advance
from jaxcompress.recurrence.softmax import masked_softmax

from .examples import POLICIES, RACES, D, close, compiled, no_races, some
from .test_tpu_recurrence import ROPE, fresh, same, tokens

B, T, K, G, SLOTS = 2, 40, 2, 2, 21
N = SLOTS + T


def data(sets: int, dtype: str = "float32") -> tuple[Any, ...]:
    """Slots, some free and in no order, then the block's own tokens; the second row has padding."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
    at = np.full((B, T), -1)
    at[0] = 30 + np.arange(T)
    at[1, 3:-2] = 30 + np.arange(T - 5)
    old = np.where(
        random.random((B, sets, SLOTS)) < 0.8,
        random.permuted(np.tile(np.arange(30), (B, sets, 1)), axis=-1)[..., :SLOTS],
        -1,
    )
    held = np.concatenate([old, np.broadcast_to(at[:, None], (B, sets, T))], axis=-1)
    return (
        normal(B, T, K, G, D), jnp.asarray(at, jnp.int32), normal(B, K, N, D), normal(B, K, N, D),
        jnp.asarray(held, jnp.int32),
    )  # fmt: skip


def reference(q: Any, at: Any, keys: Any, values: Any, held: Any, window: Any) -> Any:
    scores = jnp.einsum("btkgd,bknd->bkgtn", q, keys, preferred_element_type=jnp.float32) * D**-0.5
    here = at[:, None, :, None]
    visible = (held[:, :, None] >= 0) & (held[:, :, None] <= here)
    if window is not None:
        visible &= held[:, :, None] > here - window
    weights = masked_softmax(scores, visible[:, :, None], (at >= 0)[:, None, None, :, None])
    last = jnp.take_along_axis(weights, at.argmax(-1)[:, None, None, None, None], axis=3)[:, :, :, 0]
    out = jnp.einsum("bkgtn,bknd->btkgd", weights.astype(values.dtype), values)
    return out.astype(q.dtype), last, weights.sum(3)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda tokens, keys: monkeypatch.setattr(
        tpu_block, "block_sizes", lambda call: dict(tokens=tokens, keys=keys)
    )


@pytest.mark.parametrize(
    ("sets", "dtype", "window"),
    some([(1, "float32", None), (2, "float32", 25), (2, "bfloat16", None)], (2, "float32", 25)),
)
def test_equals_a_softmax_over_all(tiles: Any, sets: int, dtype: str, window: int | None) -> None:
    """Several tiles of queries and of keys, the last of each not full."""
    tiles(16, 128)
    q, at, keys, values, held = data(sets, dtype)
    wider = lambda x: jnp.concatenate([x, x[:, :, ::-1], x * 0.5], axis=2)  # more than one tile of keys
    held = jnp.concatenate([held, jnp.where(held % 3 == 0, held, -1), jnp.full_like(held, -1)], axis=2)
    given = q, at, wider(keys), wider(values), held
    got = compiled(partial(tpu_block.block, window=window, interpret=True))(*given)
    tolerance = 3e-2 if dtype == "bfloat16" else 5e-6
    close(got, compiled(partial(reference, window=window))(*given), tolerance)


@pytest.mark.slow
def test_no_races(tiles: Any) -> None:
    tiles(16, N)
    close(tpu_block.block(*data(2), None, interpret=RACES), reference(*data(2), None), 5e-6)
    no_races()


@pytest.mark.parametrize(
    ("name", "chunk"), some([("tova", 7), ("tova", 26), ("h2o", 26), ("h2o-layer", 7), ("window+2", 7)], ("h2o", 26))
)
def test_chunks_and_whole_prompts(name: str, chunk: int) -> None:
    """What is kept of a prompt equals jnp."""
    policy = POLICIES[name]
    done = {
        backend: compiled(partial(advance, layer=0, policy=policy, chunk=chunk, rotate=ROPE, backend=backend))(
            *tokens(26), fresh(policy)
        )
        for backend in ("tpu-interpret", "jnp")
    }
    same([done["tpu-interpret"]], [done["jnp"]])
    assert (np.asarray(done["jnp"].freed) >= 0).any()
