"""Checkpoints of a run: exact, whole or not there, and of the right shape."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_decoder

from jaxcompress.training.checkpointing import Checkpoints, SaveFailed
from jaxcompress.training.trainer import init_train_state


def state(value: float = 1.0, size: int = 5) -> dict[str, Any]:
    """Random bits, which do not compress."""
    noise = jax.random.normal(jax.random.key(int(value)), (size,))
    return {"params": {"w": noise, "half": noise.astype(jnp.bfloat16)}, "step": jnp.int32(value)}


def same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "new" / "run") as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(3, state(3), {"next_index": 12, "more": [1, None, "x"]})
        checkpoints.wait()
        assert checkpoints.latest == 3
        checkpoints.save(10, state(10), {"next_index": 40})
    with Checkpoints(tmp_path / "new" / "run") as checkpoints:
        assert checkpoints.latest == 10
        for like in (state(), jax.eval_shape(state)):
            restored, data = checkpoints.restore(like)
            same(restored, state(10))
            assert data == {"next_index": 40}
        restored, data = checkpoints.restore(state(), 3)
        same(restored, state(3))
        assert data == {"next_index": 12, "more": [1, None, "x"]}


def test_a_state_may_be_donated_at_once(tmp_path: Path) -> None:
    change = jax.jit(lambda x: x * 0.5 + 1, donate_argnums=0)
    x, expected = jax.random.normal(jax.random.key(0), (500_000,)), []
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(6):
            checkpoints.save(step, {"x": x}, None)
            expected.append(np.array(x))
            x = change(x)
        for step, array in enumerate(expected):
            checkpoints.wait()
            np.testing.assert_array_equal(checkpoints.restore({"x": x}, step)[0]["x"], array)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (2, 9, 10, 11):
            checkpoints.save(step, state(step), None)
    assert steps(tmp_path) == ["10", "11"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(12, state(), None)
    assert steps(tmp_path) == ["12"]
    with pytest.raises(ValueError, match="at least 1 checkpoint must be kept"):
        Checkpoints(tmp_path, keep=0)


def test_what_a_killed_process_left_is_no_checkpoint(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state(4), None)
    left = tmp_path / "8.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    left.mkdir(parents=True)
    (left / "part").write_bytes(b"half")
    older = tmp_path / "2"  # deleted in part
    older.mkdir()
    (older / "_CHECKPOINT_METADATA").write_text("")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 4
        same(checkpoints.restore(state())[0], state(4))
        checkpoints.save(8, state(8), None)
    assert steps(tmp_path) == ["4", "8"]


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files cannot grow larger, as on a disk that is full. (Python ignores the signal that comes with it.)"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("found", ["wait", "save", "close"])
def test_a_full_disk_costs_nothing_of_the_last_good_one(tmp_path: Path, found: str) -> None:
    """However the failure, which happens in the background, comes to light."""
    good, large = state(5, 50_000), state(6, 50_000)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(5, good, {"next_index": 5})
    checkpoints.wait()
    with full_disk(100_000), pytest.raises(SaveFailed) as caught:  # noqa: PT012
        checkpoints.save(6, large, None)
        checkpoints.save(7, large, None) if found == "save" else getattr(checkpoints, found)()
    message = str(caught.value)
    assert f"the checkpoint of step 6 could not be saved in {tmp_path} (step 5 is the last good one): " in message
    assert "File too large" in message
    assert "\n" not in message
    assert steps(tmp_path) == ["5"]  # what was written of it gives its room back
    if found == "close":
        checkpoints = Checkpoints(tmp_path, keep=1)
    with checkpoints:
        restored, data = checkpoints.restore(good)
        same(restored, good)
        assert data == {"next_index": 5}
        checkpoints.save(6, large, None)  # there is room again
    assert steps(tmp_path) == ["6"]


def test_the_first_failure_is_told(tmp_path: Path) -> None:
    with full_disk(1000), pytest.raises(SaveFailed, match="there is none before it"), Checkpoints(tmp_path) as one:
        one.save(1, state(1, 50_000), None)
    with full_disk(1000), pytest.raises(KeyError, match="what came first"), Checkpoints(tmp_path) as one:  # noqa: PT012
        one.save(1, state(1, 50_000), None)
        raise KeyError("what came first")


def test_the_log_is_not_flooded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with full_disk(1000), pytest.raises(SaveFailed), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1, 50_000), None)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


class TestMismatch:
    """A checkpoint of another shape."""

    adam = optax.adam(1e-3)

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("checkpoints")
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(7, init_train_state(tiny_decoder(), self.adam), None)
        return folder

    @pytest.mark.parametrize(
        ("changes", "optimizer", "says"),
        [
            (dict(vocabulary=67), adam, "params.embedding is [61, 32] float32 there, [67, 32] float32 here"),
            (dict(tied=True), adam, "params.head is [32, 61] float32 there, absent here"),
            (dict(qk_norm=True), adam, "params.layers.attention.key_norm.scale is absent there, [2, 8] float32 here"),
            ({}, optax.sgd(0.1), "optimizer.0.count is [] int32 there, absent here"),
            ({}, optax.sgd(0.1, momentum=0.9), "optimizer.0.count is [] int32 there, absent here"),
        ],
    )
    def test_the_first_difference_is_named(self, folder: Path, changes: Any, optimizer: Any, says: str) -> None:
        like = jax.eval_shape(lambda: init_train_state(tiny_decoder(**changes), optimizer))
        with Checkpoints(folder) as checkpoints, pytest.raises(ValueError) as caught:
            checkpoints.restore(like)
        assert str(caught.value) == f"the checkpoint {folder / '7'} is of another model or optimizer: {says}"

    def test_dtypes_are_not_converted(self, folder: Path) -> None:
        like = jax.eval_shape(lambda: init_train_state(tiny_decoder(), self.adam))
        half = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype)
        with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match="float32 there, .* bfloat16 here"):
            checkpoints.restore(jax.tree.map(half, like))


def test_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(FileNotFoundError, match=f"there is no checkpoint in {tmp_path}"):
            checkpoints.restore(state())
        checkpoints.save(1, state(), None)
        checkpoints.wait()
        with pytest.raises(FileNotFoundError, match=f"there is no checkpoint of step 2 in {tmp_path}"):
            checkpoints.restore(state(), 2)
    (tmp_path / "1" / "state" / "_METADATA").write_text("{")
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=f"{tmp_path / '1'} cannot be read: "):
        checkpoints.restore(state())


def test_arrays_go_where_they_are_wanted(tmp_path: Path) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jnp.arange(8.0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jax.device_put(x, rows)}, None)
        checkpoints.wait()
        for like in (
            {"x": x},
            {"x": jax.device_put(x, rows)},
            {"x": jax.ShapeDtypeStruct((8,), x.dtype, sharding=rows)},
        ):
            restored, _ = checkpoints.restore(like)
            np.testing.assert_array_equal(restored["x"], x)
            assert restored["x"].sharding == like["x"].sharding
