"""The rules of sharding: which axis of the mesh each logical axis is spread over.

The compiler does the rest: jitted functions follow the shardings of their arguments. Model and policies know nothing of
devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxcompress.distributed.axes import Axes, Axis, axes_of, state_axes
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder
from jaxcompress.state.kv_state import KVState

Tree = TypeVar("Tree")

MeshAxes = str | tuple[str, ...] | None
"""Axes of a mesh; None for none."""

_TOGETHER: tuple[tuple[Axis, Axis], ...] = (
    ("embed", "kv_heads"), ("embed", "mlp"), ("embed", "vocabulary"), ("batch", "kv_heads"),
)  # fmt: skip
"""Logical axes that arrays have together."""


@dataclass(frozen=True)
class ShardingRules:
    """How weights, states, optimizers and batches are spread over a mesh; hashable.

    Each field but the first names the axes of the mesh for a logical axis. Axes that the mesh lacks count as size 1.
    Slots are never spread. A vocabulary that its axes do not divide stays whole, since its size is arbitrary; for other
    axes that is an error.

    Attributes:
      mesh: the devices (see `make_mesh`); an `AbstractMesh` where only shapes and places are asked for.
      batch: rows of states and batches.
      kv_heads: kv heads, with the query heads that read them.
      embed: the width of the residual stream, in weights and the optimizer only.
      mlp: the width of the feed-forward networks.
      vocabulary: rows of the embedding, columns of the output projection.

    Raises:
      ValueError: an array would have one axis of the mesh twice.

    Examples:
      >>> rules = ShardingRules(make_mesh("data=1"))
      >>> loaded = load("Qwen/Qwen3-0.6B", sharding=rules.weight)  # doctest: +SKIP
      >>> state = rules.init(lambda: init_state(loaded.config, TOVA(), 128, batch=8))  # doctest: +SKIP
    """

    mesh: Mesh | AbstractMesh
    batch: MeshAxes = ("data", "fsdp")
    kv_heads: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    mlp: MeshAxes = "tensor"
    vocabulary: MeshAxes = "tensor"

    def __post_init__(self) -> None:
        for one, other in _TOGETHER:
            if twice := set(self._over(one)) & set(self._over(other)):
                raise ValueError(
                    f"axis {min(twice)} of the mesh is given to both {one} and {other}, which arrays have together; "
                    "give one of them another axis, or None"
                )

    @property
    def one_row(self) -> ShardingRules:
        """For the state of one sequence: its heads go where these rules say, its row is on every device."""
        return replace(self, batch=None)

    def _over(self, axis: Axis) -> tuple[str, ...]:
        """The axes of the mesh for a logical axis, without those of size 1."""
        given: MeshAxes = getattr(self, axis)
        names = (given,) if isinstance(given, str) else given or ()
        return tuple(name for name in names if self.mesh.shape.get(name, 1) > 1)

    def ways(self, axis: Axis) -> int:
        """The number of parts that a logical axis is cut into."""
        return math.prod(self.mesh.shape[name] for name in self._over(axis))

    def check(self, config: DecoderConfig, *, batch: int | None = None) -> None:
        """Checks that a model, and so many rows, can be spread so.

        Raises:
          ValueError: a size is not a multiple of the devices it is to be spread over; names both.
        """
        self._check_divides("kv_heads", config.num_kv_heads, f"the model's {config.num_kv_heads} kv heads")
        self._check_divides("mlp", config.intermediate_size, f"an intermediate size of {config.intermediate_size}")
        self._check_divides("embed", config.hidden_size, f"a hidden size of {config.hidden_size}")
        if batch is not None:
            self._check_divides("batch", batch, f"a batch of {batch}")

    def _check_divides(self, axis: Axis, size: int, what: str) -> None:
        if size % self.ways(axis):
            over = ", ".join(f"{name}={self.mesh.shape[name]}" for name in self._over(axis))
            raise ValueError(
                f"{what} cannot be spread over the {self.ways(axis)} devices along {over} of the mesh: give a mesh in "
                f"which that divides {size}, or ShardingRules({axis}=None)"
            )

    def sharding(self, axes: Axes, shape: tuple[int, ...], name: str = "an array") -> NamedSharding:
        """Where an array with these logical axes goes.

        Raises:
          ValueError: an axis is not a multiple of the devices it is to be spread over.
        """
        entries: list[Any] = []
        for axis, size in zip(axes, shape, strict=True):
            whole = axis is None or size == 1 and axis != "batch" or axis == "vocabulary" and size % self.ways(axis)
            if axis is not None and not whole:
                self._check_divides(axis, size, f"{axis.replace('_', ' ')} of {name}, {size} in {list(shape)},")
            entries.append(None if axis is None or whole else self._over(axis) or None)
        return NamedSharding(self.mesh, PartitionSpec(*entries))

    def weight(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where the array of a dotted name goes: `load(..., sharding=rules.weight)`.

        Raises:
          ValueError: as `sharding`.
        """
        return self.sharding(axes_of(name, len(shape)), shape, name)

    def shardings(self, tree: Tree) -> Tree:
        """Where each array of a pytree goes; the same structure.

        Args:
          tree: of arrays or shapes: models, states, optimizer states, batches, or several of them.

        Raises:
          ValueError: as `check`.
        """

        def placed(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if isinstance(leaf, KVState):
                put = lambda x, axes: self.sharding(axes, x.shape, "the state")
                return jax.tree.map(put, leaf, state_axes(leaf))
            if isinstance(leaf, Decoder):
                self.check(leaf.config)
                return jax.tree_util.tree_map_with_path(placed, leaf)
            return self.weight(name, leaf.shape)

        known = lambda x: isinstance(x, KVState | Decoder)
        return jax.tree_util.tree_map_with_path(placed, tree, is_leaf=known)

    def abstract(self, make: Callable[[], Tree]) -> Tree:
        """Shapes, dtypes and shardings of what `make` returns. Nothing is computed or allocated."""
        shapes = jax.eval_shape(make)
        described = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        return jax.tree.map(described, shapes, self.shardings(shapes))

    def bytes_per_device(self, tree: Any) -> int:
        """How much of a pytree one device holds.

        Args:
          tree: as for `shardings`. Shapes will do.

        Raises:
          ValueError: as `check`.
        """
        share = lambda x, where: math.prod(where.shard_shape(x.shape)) * x.dtype.itemsize
        return sum(jax.tree.leaves(jax.tree.map(share, tree, self.shardings(tree))))

    def init(self, make: Callable[[], Tree]) -> Tree:
        """What `make` returns, made in parts: each device makes its own. `make` is traced, so it may not look at
        values."""
        return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make)))()

    def put(self, tree: Tree) -> Tree:
        """The arrays of a pytree, put where they belong."""
        return jax.device_put(tree, self.shardings(tree))

    def constrain(self, tree: Tree) -> Tree:
        """The same inside a jitted function: the compiler puts the arrays there."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def __str__(self) -> str:
        rules = (f"{field.name} over {', '.join(self._over(field.name))}" for field in fields(self)[1:])  # type: ignore[arg-type]
        return f"{dict(self.mesh.shape)}: {'; '.join(rules)}"


def made(make: Callable[[], Tree], config: DecoderConfig, batch: int, sharding: ShardingRules | None) -> Tree:
    """What `make` returns for `batch` rows of a model; with rules each device makes its own part.

    Raises:
      ValueError: the mesh does not divide rows or heads.
    """
    if sharding is None:
        return make()
    sharding.check(config, batch=batch)
    return sharding.init(make)


def placed(tree: Tree, sharding: ShardingRules | None) -> Tree:
    """`sharding.constrain(tree)`; the tree itself without rules."""
    return tree if sharding is None else sharding.constrain(tree)
