"""Meshes of devices, and how they are written: data=2,tensor=4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import jax
from jax.sharding import AxisType, Mesh

from jaxcompress.inputs.scalars import whole

MeshAxis = Literal["data", "fsdp", "tensor"]
"""data: each device has rows of its own. fsdp: rows of its own, and a part of each weight. tensor: heads of its own."""

AXES: tuple[MeshAxis, ...] = get_args(MeshAxis)


def mesh_sizes(text: str) -> dict[MeshAxis, int]:
    """The sizes of the axes of a mesh, from text such as data=2,tensor=4.

    Raises:
      ValueError: an axis is unknown or named twice, or a size is no whole number of 1 or more.
    """
    known: dict[str, MeshAxis] = {axis: axis for axis in AXES}
    sizes: dict[MeshAxis, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        axis = known.get(name)
        if axis is None or axis in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"a mesh is written data=2,tensor=4, each axis ({', '.join(AXES)}) once and with a size of 1 or more; "
                f"{part!r} in {text!r} is none"
            )
        sizes[axis] = int(size)
    return sizes


def make_mesh(sizes: Mapping[MeshAxis, int] | str) -> Mesh:
    """A mesh of the devices of all processes, whose axes the compiler shards over (`AxisType.Auto`).

    Devices along `tensor` are neighbours: they exchange the most. One process may leave devices out; several use all.

    Args:
      sizes: of the axes, or text as for `mesh_sizes`. Axes that are left out have size 1.

    Raises:
      ValueError: there are fewer devices, or more and several processes; other cases as for `mesh_sizes`.

    Examples:
      >>> mesh = make_mesh("data=1")
      >>> mesh.shape["data"], mesh.shape["tensor"]
      (1, 1)
    """
    given = mesh_sizes(sizes) if isinstance(sizes, str) else sizes
    if unknown := [name for name in given if name not in AXES]:
        raise ValueError(f"unknown axis of a mesh {unknown[0]!r}; known: {', '.join(AXES)}")
    shape = tuple(whole(given.get(axis, 1), f"the size of axis {axis}", least=1) for axis in AXES)
    needed, there = math.prod(shape), jax.device_count()
    if needed > there or (needed < there and jax.process_count() > 1):
        written = ",".join(f"{name}={size}" for name, size in given.items())
        raise ValueError(
            f"the mesh {written} has {needed} devices, this run has {there} in {jax.process_count()} process(es); give "
            "sizes whose product is the number of devices"
        )
    devices = jax.devices()[:needed]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
