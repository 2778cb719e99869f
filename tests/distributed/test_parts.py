"""What lies on a device is all that is read for it, and what was saved from one mesh comes back on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_decoder

from jaxcompress.checkpoints import _load, load, save
from jaxcompress.distributed import ShardingRules, make_mesh
from jaxcompress.training.checkpointing import Checkpoints
from jaxcompress.training.trainer import init_train_state

MODEL = tiny_decoder(64)
OPTIMIZER = optax.adam(1e-3)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The names of tensors that are read from files, and the bytes of each read."""
    reads: list[tuple[str, int]] = []
    get = _load._Tensor.__getitem__

    def noted(tensor: Any, index: Any) -> np.ndarray:
        found = get(tensor, index)
        reads.append((tensor.name, found.nbytes))
        return found

    monkeypatch.setattr(_load._Tensor, "__getitem__", noted)
    return reads


@pytest.mark.parametrize("mesh", ["tensor=2", "fsdp=2"])
def test_a_device_reads_only_its_part(read: list[tuple[str, int]], tmp_path: Path, mesh: str) -> None:
    rules = ShardingRules(make_mesh(mesh))
    save(MODEL, tmp_path / "model", shard_bytes=30_000)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    loaded = load(tmp_path / "model", sharding=rules.weight).model
    jax.tree.map(np.testing.assert_array_equal, loaded, MODEL)
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(loaded) for shard in leaf.addressable_shards)
    assert sum(nbytes for _, nbytes in read) <= held, "a device was read more than it holds"
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(MODEL))
    assert held / 2 == rules.bytes_per_device(loaded) < 0.6 * whole


@pytest.mark.parametrize(("before", "after"), [("fsdp=2", "tensor=2"), ("tensor=2", "data=2"), ("data=2", None)])
def test_a_run_goes_on_over_another_mesh(tmp_path: Path, before: str, after: str | None) -> None:
    begin = lambda: init_train_state(jax.tree.map(jnp.copy, MODEL), OPTIMIZER, seed=0)
    rules = None if after is None else ShardingRules(make_mesh(after))
    state = ShardingRules(make_mesh(before)).put(begin())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"next_index": 4})
    like = jax.eval_shape(begin) if rules is None else rules.abstract(begin)
    with Checkpoints(tmp_path) as checkpoints:
        found, data = checkpoints.restore(like)
    assert data == {"next_index": 4}
    for one, other, wanted in zip(*map(jax.tree.leaves, (found, state, like)), strict=True):
        np.testing.assert_array_equal(one, other)
        if rules is not None:
            assert one.sharding.is_equivalent_to(wanted.sharding, one.ndim)
