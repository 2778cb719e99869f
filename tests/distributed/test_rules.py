"""The mesh, the rules, and what they refuse; on two devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import tiny_decoder

from jaxcompress.cli import main
from jaxcompress.distributed import Collective, ShardingRules, collectives, join, make_mesh
from jaxcompress.distributed.mesh import mesh_sizes
from jaxcompress.distributed.processes import launched
from jaxcompress.evaluation.perplexity import perplexity
from jaxcompress.generation import generate, init_decode_state
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import get_policy

TWO_ROWS, TWO_HEADS = ShardingRules(make_mesh("data=2")), ShardingRules(make_mesh("tensor=2"))


def test_a_mesh_from_text() -> None:
    assert mesh_sizes("data=2, tensor=4") == {"data": 2, "tensor": 4}
    assert dict(make_mesh({"tensor": 2}).shape) == {"data": 1, "fsdp": 1, "tensor": 2}
    assert make_mesh("data=1").devices.size == 1


@pytest.mark.parametrize("text", ["", "data", "data=0", "data=2,data=2", "heads=2", "data=-1", "data=1.5"])
def test_text_that_is_no_mesh(text: str) -> None:
    with pytest.raises(ValueError, match="a mesh is written data=2,tensor=4"):
        make_mesh(text)


@pytest.mark.parametrize("size", [0, -1, True])
def test_sizes_that_are_none(size: int) -> None:
    with pytest.raises(ValueError, match="the size of axis data must be a whole number, at least 1"):
        make_mesh({"data": size})


def test_more_devices_than_there_are() -> None:
    with pytest.raises(ValueError, match="the mesh data=2,tensor=4 has 8 devices, this run has 2 in 1 process"):
        make_mesh("data=2,tensor=4")


def test_rules_are_a_value() -> None:
    assert TWO_ROWS == ShardingRules(make_mesh("data=2")) != TWO_HEADS
    assert len({TWO_ROWS, ShardingRules(make_mesh("data=2"))}) == 1
    with pytest.raises(ValueError, match="axis tensor of the mesh is given to both embed and kv_heads"):
        ShardingRules(make_mesh("tensor=2"), embed="tensor")


def test_where_weights_and_moments_go() -> None:
    model: Any = tiny_decoder(64)
    leaves = jax.tree_util.tree_leaves_with_path(TWO_HEADS.shardings((model, optax.adam(1e-3).init(model))))
    specs = {jax.tree_util.keystr(path, simple=True, separator="."): where.spec for path, where in leaves}
    for of in ("0.", "1.0.mu."):
        assert specs[of + "layers.attention.query.kernel.value"] == P(None, None, "tensor")
        assert specs[of + "layers.attention.out.kernel.value"] == P(None, "tensor", None)
        assert specs[of + "layers.mlp.down.kernel.value"] == P(None, "tensor", None)
        assert specs[of + "layers.mlp_norm.scale.value"] == P(None, None)
        assert specs[of + "embedding.value"] == P("tensor", None)
    # An odd vocabulary stays whole.
    assert TWO_HEADS.weight("embedding", (61, 32)).spec == P(None, None)
    weights = ShardingRules(make_mesh("fsdp=2"))
    assert weights.weight("layers.mlp.up.kernel", (2, 32, 48)).spec == P(None, "fsdp", None)


@pytest.mark.parametrize(
    ("policy", "keys", "positions"),
    [("tova", "tensor", None), ("tova-kv_head", "tensor", "tensor"), ("tova-pool", None, None)],
)
def test_where_a_state_goes(policy: str, keys: str | None, positions: str | None) -> None:
    config = tiny_decoder().config
    make = lambda: init_state(config, get_policy(policy), 4, batch=2, dtype="int8")
    made: Any
    described: Any
    (described,), (made,) = TWO_HEADS.abstract(make), TWO_HEADS.init(make)
    assert described.keys.codes.sharding.spec == P(None, None, keys, None, None)
    assert described.keys.scale.sharding.spec == P(None, None, keys, None)
    assert described.positions.sharding.spec == P(None, None, positions, None)
    for shape, array in zip(jax.tree.leaves(described), jax.tree.leaves(made), strict=True):
        assert array.sharding == shape.sharding
    rows: Any = TWO_ROWS.init(make)[0]
    assert {shard.data.shape[1] for shard in rows.values.codes.addressable_shards} == {1}
    assert {shard.data.shape for shard in rows.seen.addressable_shards} == {(1,)}


def test_the_share_of_a_device() -> None:
    config = tiny_decoder().config
    state = jax.eval_shape(lambda: init_state(config, get_policy("tova"), 4, batch=2))
    vectors = state[0].keys.size * 4 * 2
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert TWO_HEADS.bytes_per_device(state) == whole - vectors // 2  # positions are shared
    chips = ShardingRules(AbstractMesh((64,), ("tensor",)), kv_heads=None)
    assert chips.bytes_per_device(jax.ShapeDtypeStruct((2, 3), jnp.int32)) == 24
    assert TWO_ROWS.bytes_per_device({"tokens": jax.ShapeDtypeStruct((2, 3), jnp.int32)}) == 12


def test_what_devices_exchange() -> None:
    def program(x: Any, by: Any) -> Any:
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ by), None), x, length=3)[0]

    whole, cut = (NamedSharding(TWO_HEADS.mesh, P(*axes)) for axes in ((), ("tensor",)))
    x = jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=whole)
    by = jax.ShapeDtypeStruct((6, 6), jnp.float32, sharding=cut)
    found = collectives(jax.jit(program, out_shardings=whole).lower(x, by).compile())
    (summed,) = [one for one in found if one.kind == "all-reduce"]
    assert summed._replace(op="") == Collective("all-reduce", ((4, 6),), 96, 3, "")
    assert "dot_general" in summed.op


class TestRefused:
    """What a mesh does not divide is named, with both numbers."""

    def test_rows(self) -> None:
        model, policy = TWO_ROWS.put(tiny_decoder()), get_policy("tova")
        said = "a batch of 3 cannot be spread over the 2 devices along data=2"
        with pytest.raises(ValueError, match=said):
            init_decode_state(model, policy, 4, batch=3, sharding=TWO_ROWS)
        with pytest.raises(ValueError, match=said):
            generate(model, [[1], [2], [3]], policy, 4, max_new_tokens=1, sharding=TWO_ROWS)
        with pytest.raises(ValueError, match=said):
            perplexity(model, np.ones((3, 4), np.int32), policy, 4, sharding=TWO_ROWS)

    def test_heads(self) -> None:
        config = tiny_decoder().config
        odd = jax.eval_shape(lambda: init_state(config, get_policy("tova-kv_head"), [[4, 5]] * 2))
        assert [part.kv_heads for part in odd] == [1, 1]  # a head alone stays whole
        TWO_HEADS.shardings(odd)
        three = type(config)(61, 36, 48, num_layers=1, num_heads=6, num_kv_heads=3, head_dim=8)
        with pytest.raises(ValueError, match="the model's 3 kv heads cannot be spread over the 2 devices along tensor"):
            TWO_HEADS.check(three)
        ShardingRules(make_mesh("tensor=2"), kv_heads=None).check(three)

    def test_arrays(self) -> None:
        with pytest.raises(ValueError, match=r"mlp of layers.mlp.up.kernel, 49 in \[2, 32, 49\], cannot be spread"):
            TWO_HEADS.weight("layers.mlp.up.kernel", (2, 32, 49))

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (("--mesh", "tensor=2"), "the model's 3 kv heads cannot be spread over the 2 devices along tensor=2"),
            (("--mesh", "data=2"), "a batch of 1 cannot be spread over the 2 devices along data=2"),
            (("--mesh", "rows=2"), "a mesh is written data=2,tensor=4"),
            (("--processes", "2"), "--coordinator, --processes and --process-id are for --mesh"),
            (("--mesh", "data=2", "--processes", "2"), "coordinator, process_id is missing"),
        ],
    )
    def test_flags(self, flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["generate", "--prompt", "def", "--max-new-tokens", "1", *flags]) == 2
        assert said in capsys.readouterr().err


def test_processes() -> None:
    assert not launched({})
    assert not launched({"SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "host"})
    assert launched({"SLURM_NTASKS": "2"})
    assert launched({"OMPI_COMM_WORLD_SIZE": "8"})
    assert launched({"TPU_WORKER_HOSTNAMES": "a,b"})
    with pytest.raises(ValueError, match="process_id 2 is none of 2 processes"):
        join("localhost:1", 2, 2)


def test_without_rules_nothing_is_placed() -> None:
    state = init_decode_state(tiny_decoder(), get_policy("tova"), 4)
    assert len(state.kv[0].positions.devices()) == 1
    assert jnp.all(state.kv[0].positions == -1)
