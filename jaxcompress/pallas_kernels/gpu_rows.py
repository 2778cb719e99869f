"""The layout of key and value rows in GPU registers, and the launch of GPU kernels.

A row of D numbers is spread over 16 lanes, 4 adjacent numbers each, so that a warp takes two rows and a warpgroup
eight. A product with a query is a sum over 16 lanes. Nothing is padded, for any number of queries.

Arrays in this layout are [8, D], sums over D are [8], sums over the rows are [D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

MASKED = -1e30  # as in `jaxcompress.recurrence.attention`
UNIT = 8  # rows that a warpgroup processes at once

_TILES = fragmented_array.Tiling(((UNIT, 64), (2, 64), (4,)))
ROWS = plgpu.Layout.TILED(_TILES, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
PER_ROW, PER_COLUMN = ROWS.reduce(1), ROWS.reduce(0)

_OLD = jax.__version_info__ < (0, 11)  # loads take an index in these versions


def load_rows(ref: Any, layout: Any) -> Array:
    """Loads rows from global or shared memory into registers."""
    return plgpu.load(ref, *[()] * _OLD, layout=layout, optimized=False)


def transposed(ref: Any) -> Any:
    """The transpose of a matrix in shared memory."""
    return plgpu.transpose_ref(ref, (1, 0)) if _OLD else ref.transpose((1, 0))


def full(shape: tuple[int, ...], value: float, layout: Any, dtype: Any = jnp.float32) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)


def along_rows(x: Array, width: int) -> Array:
    """[8] -> [8, D]"""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, (UNIT, width), [0]), ROWS)


def along_columns(x: Array) -> Array:
    """[D] -> [8, D]"""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, (UNIT, *x.shape), [1]), ROWS)


def numbers(x: Array, dtype: str) -> Array:
    """Stored numbers -> float32; float8 numbers are divided by 256, as in `jaxcompress.state.storage`."""
    if dtype != "float8_e4m3fn":
        return x.astype(jnp.float32)
    bits = x.astype(jnp.uint16)
    return jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16).astype(jnp.float32)


def launch(
    body: Callable[..., None], out: Any, grid: Sequence[int], names: Sequence[str], scratch: dict[str, Any],
    name: str, interpret: Any,
) -> Callable[..., Any]:  # fmt: skip
    """A kernel over a grid of blocks of one warpgroup. Arguments that are `jax.Ref`s are changed in place.

    Threads synchronise only where the body requests it (`plgpu.commit_smem`), and in sums over rows.

    Args:
      body: the kernel function, called with (arguments, outputs, **scratch).
      scratch: shared memory and barriers.
      interpret: False, True, or the parameters of the interpreter.

    Raises:
      ValueError: `interpret` is set, but this JAX version cannot interpret the kernel.
    """
    if interpret and _OLD:
        raise ValueError(f"interpreting a GPU kernel takes JAX 0.11 or later, this is {jax.__version__}")
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()  # pyright: ignore

    def whole(*refs: Any) -> None:
        keys = tuple(scratch)
        pl.run_scoped(lambda *given: body(*refs, **dict(zip(keys, given, strict=True))), *scratch.values())

    return functools.partial(
        pl.kernel(
            whole,
            out_type=out,
            mesh=plgpu.Mesh(grid=tuple(grid), grid_names=tuple(names)),
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                reduction_scratch_bytes=4096,
                unsafe_no_auto_barriers=True,
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
            interpret=interpret,
            name=name,
        )
    )
