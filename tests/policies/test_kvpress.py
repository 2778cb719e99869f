"""The numbers of kvpress (see fixtures/kvpress): scores and kept sets of a prompt read at once, and keys turned."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrence.test_official import FAST_COMPILE, PROMPT, SLOTS, llama

from jaxcompress import policies
from jaxcompress.models.decoder import read
from jaxcompress.models.init_state import init_state
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.policies import Policy

from .watched import scored_as

FOLDER = Path(__file__).parents[1] / "fixtures" / "kvpress"
LAYERS = 3
numbers = cache(lambda name: dict(np.load(FOLDER / f"{name}.npz")))

SNAP = policies.SnapKV(8)
METHODS: dict[str, tuple[Policy, Any]] = {
    "tova": (policies.protect(policies.TOVA(), recent=1), SLOTS),
    "tova_eager": (policies.protect(policies.TOVA(), recent=1), SLOTS),
    "h2o_observed": (policies.ObservedAttention(), SLOTS),
    "snapkv": (SNAP, SLOTS),
    "streaming_llm": (policies.Window(4), SLOTS),
    "window": (policies.Window(), SLOTS),
    "knorm": (policies.KNorm(), SLOTS),
    "keydiff": (policies.KeyDiff(), SLOTS),
    "lagkv": (policies.LagKV(8), SLOTS),
    "lagkv_cross": (policies.LagKV(8, cross=True), SLOTS),
    "expected_attention": (policies.ExpectedAttention(future=32), SLOTS),
    "pyramidkv": (policies.SnapKV(4), (86, 48, 10)),
    "cur": (policies.CUR(), SLOTS),
    "critical_snapkv": (policies.critical(SNAP), SLOTS),
    "chunkkv_snapkv": (policies.by_chunks(policies.SnapKV(8, scope="layer"), 8), SLOTS),
    "chunk_knorm": (policies.within_chunks(policies.KNorm(), 32), SLOTS),
    "adakv_snapkv": (policies.adaptive(policies.SnapKV(8, scope="pool")), SLOTS),
}
BOTH = pytest.mark.parametrize("name", ["llama_gqa", pytest.param("llama_mha", marks=pytest.mark.slow)])
TIED = {"lagkv"}  # ranks within a chunk: many tokens score alike, and kvpress leaves to torch which of them stay


class Prompt(NamedTuple):
    """A prompt that was read at once. Per layer, in the order of the sequence.

    scores: [B, P, T]; kept: for each row and kv head its positions.
    """

    scores: list[np.ndarray]
    kept: list[list[list[list[int]]]]
    state: Any


@cache
def compressed(name: str, method: str) -> Prompt:
    model, ids = llama(name)
    policy, slots = METHODS[method]
    scores: dict[int, np.ndarray] = {}

    def record(layer: Any, x: Any, positions: Any) -> None:
        held = np.broadcast_to(positions, x.shape)[..., -positions.shape[-1] :]
        order = np.argsort(np.where(held < 0, 2**30, held), -1, kind="stable")
        scores[int(layer)] = np.take_along_axis(x, order, -1)[..., : (held >= 0).sum(-1).max()]

    def score(stats: Any, held: Any) -> Any:
        x = policy.score(stats, held)
        jax.debug.callback(record, held.layer, x, held.positions)
        return x

    watched = scored_as(policy, score)
    state = init_state(model.config, watched, slots, batch=len(ids))
    run = jax.jit(lambda model, ids, state: read(model, ids, state, watched, chunk=PROMPT).state)
    state = jax.block_until_ready(run(model, jnp.asarray(ids[:, :PROMPT]), state))
    jax.effects_barrier()
    kept = []
    for part in state:
        for layer in range(part.positions.shape[0]):
            kept.append([[_kept(part, layer, b, head) for head in range(model.config.num_kv_heads)]
                         for b in range(len(ids))])  # fmt: skip
    return Prompt([scores[layer] for layer in range(LAYERS)], kept, state)


def _kept(part: Any, layer: int, b: int, head: int) -> list[int]:
    positions = np.asarray(part.positions[layer, b, head if part.positions.shape[2] > 1 else 0])
    mine = positions >= 0
    if part.owner is not None:
        mine &= np.asarray(part.owner[layer, b, 0]) == head
    return sorted(positions[mine].tolist())


@BOTH
@pytest.mark.parametrize("method", METHODS)
def test_kept(name: str, method: str) -> None:
    z, ours = numbers(name), compressed(name, method)
    for layer in range(LAYERS):
        if method == "adakv_snapkv":
            mask = z[f"{method}/keepmask{layer}"]
            want = [[np.flatnonzero(head).tolist() for head in row] for row in mask]
        else:
            want = z[f"{method}/keep{layer}"].tolist()
        rows = len(want) if method != "chunkkv_snapkv" else 1  # kvpress gives the other rows the chunks of the first
        for b in range(rows):
            for head, positions in enumerate(want[b]):
                mine = ours.kept[layer][b][head]
                assert len(mine) == len(positions)
                if method in TIED:
                    _same_but_for_ties(z[f"{method}/score{layer}"][b, head], mine, positions)
                else:
                    assert mine == positions


def _same_but_for_ties(score: np.ndarray, ours: list[int], theirs: list[int]) -> None:
    cut = score[theirs].min()
    for position in set(ours) ^ set(theirs):
        assert score[position] == cut


SCORED = [m for m in METHODS if m not in ("streaming_llm", "window", "chunkkv_snapkv", "chunk_knorm", "adakv_snapkv")]


@BOTH
@pytest.mark.parametrize("method", SCORED)
def test_scores(name: str, method: str) -> None:
    """To 2e-5 of the largest of a head: two float32 models, of which theirs alone is up to 1.2e-5 from float64."""
    z, ours = numbers(name), compressed(name, method)
    for layer in range(LAYERS):
        want, got = z[f"{method}/score{layer}"], ours.scores[layer]
        got = np.broadcast_to(got, want.shape)
        free = np.isfinite(got)
        assert free.any()
        largest = np.abs(np.where(free, want, 0)).max(-1, keepdims=True)
        assert (np.abs(np.where(free, got - want, 0)) <= 2e-5 * largest).all()


def test_the_batch_mistake_of_chunks() -> None:
    """kvpress keeps row 0's chunks in every row; each row has its own here."""
    ours, z = compressed("llama_gqa", "chunkkv_snapkv"), numbers("llama_gqa")
    assert any(ours.kept[layer][1][0] != z[f"chunkkv_snapkv/keep{layer}"][1][0].tolist() for layer in range(LAYERS))
    for kept in (head for layer in ours.kept for row in layer for head in row):
        assert all(len([p for p in kept if p // 8 == chunk]) in (0, 8) for chunk in range(PROMPT // 8))


@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha"])
def test_keys_turned_to_their_ranks(name: str) -> None:
    """placement="slot" is kvpress's key re-rotation: kept keys as if they stood at 0 .. n - 1."""
    model, ids = llama(name)
    policy, z = policies.Window(4), numbers(name)
    state = init_state(model.config, policy, SLOTS, batch=len(ids))
    # The prompt attends at absolute positions there; the first layer's keys do not depend on attention.
    step = jax.jit(read, static_argnames=("chunk", "placement"), compiler_options=FAST_COMPILE)
    done = step(model, jnp.asarray(ids[:, :PROMPT]), state, policy, chunk=PROMPT, placement="slot").state[0]
    for b, row in enumerate(np.asarray(done.positions[0, :, 0])):
        order = np.argsort(np.where(row < 0, 2**30, row))[:SLOTS]
        keys = np.asarray(done.keys[0, b])[:, order]
        turned = rotate(jnp.asarray(keys), jnp.arange(SLOTS), model.config.rope)
        np.testing.assert_allclose(turned, z["rerotate_streaming/k0"][b], atol=1e-4)


@pytest.mark.parametrize("rope", [
    RopeConfig(), RopeConfig(kind="linear", factor=4.0), RopeConfig(kind="llama3", factor=8.0, original_context=64),
    RopeConfig(kind="yarn", factor=4.0, original_context=64, attention_factor=1.3),
], ids=lambda rope: rope.kind)  # fmt: skip
def test_turning_a_cached_key_is_rotating_the_bare_one(rope: RopeConfig) -> None:
    """What re-indexing relies on; a key cached rotated would have to be turned by the difference, temperature apart."""
    keys, rng = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32), np.random.default_rng(1)
    at, to = rng.integers(0, 500, 20), np.arange(20)
    size = np.linalg.norm(rotate(jnp.asarray(keys), jnp.zeros(20), rope), axis=-1) / np.linalg.norm(keys, axis=-1)
    turned = rotate(rotate(jnp.asarray(keys), jnp.asarray(at), rope), jnp.asarray(to - at), rope) / size[:, None]
    np.testing.assert_allclose(turned, rotate(jnp.asarray(keys), jnp.asarray(to), rope), atol=3e-4)


@pytest.mark.slow
def test_layers_of_different_length_go_on() -> None:
    """After pyramid budgets, one and five tokens more: every layer masks by what it holds itself."""
    model, ids = llama("llama_gqa")
    policy, slots = METHODS["pyramidkv"]
    step = jax.jit(read, static_argnames="chunk", compiler_options=FAST_COMPILE)
    start = step(model, jnp.asarray(ids[:, :PROMPT]), init_state(model.config, policy, slots, batch=2), policy,
                 chunk=PROMPT).state  # fmt: skip
    five = step(model, jnp.asarray(ids[:, PROMPT : PROMPT + 5]), start, policy, chunk=1)
    one, hidden = start, []
    for i in range(PROMPT, PROMPT + 5):
        done = step(model, jnp.asarray(ids[:, i : i + 1]), one, policy)
        one, hidden = done.state, [*hidden, np.asarray(done.hidden)]
    np.testing.assert_allclose(five.hidden, np.concatenate(hidden, 1), atol=1e-4)
    assert [int(part.occupancy().max()) for part in one] == list(slots)
