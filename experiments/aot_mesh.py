"""Compiles a decoding step of Llama 3 for several TPU chips without having them, and checks what they exchange.

    make aot
    python experiments/aot_mesh.py --cases 0

Every case is the loop that `jaxcompress.generation.decode` runs, with weights and state placed by `ShardingRules`.
Checked in the compiled program:

  in a layer, chips add up the outputs of attention and of the MLP, and for a policy whose heads share their tokens the
  mean of their scores; but for a flag for each row, and with fsdp weights and activations of the layer, nothing else
  is exchanged there
  no exchange has keys or values of tokens: not of those that are held, nor of the new one
  a chip's arguments are its share of weights and state, and the state is written in place

Nothing is executed.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is used

import jax
from aot_kernels import needs
from command import Command, arguments, need
from jax.experimental import mesh_utils, topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from paper_tables import markdown
from sharded_step import LLAMA, decode_step, model_shapes, shape_of, state_shapes

from jaxcompress.distributed import Collective, ShardingRules, collectives
from jaxcompress.distributed.mesh import AXES
from jaxcompress.models.config import DecoderConfig
from jaxcompress.policies import get_policy


@dataclass(frozen=True)
class Arguments(Command):
    """Prints a table and any failed checks. The exit code is 1 if a check fails."""

    cases: tuple[int, ...] | None = None
    """Numbers of the cases to run; all if not given."""


QUICK = Arguments(quick=True, cases=(0,))


class Case(NamedTuple):
    """A case to compile; `slots` with the incoming token's."""

    chips: str
    mesh: str
    policy: str
    slots: int = 1024
    rows: int = 8
    model: str = "Llama 3 8B"


class Chips(NamedTuple):
    """Devices that are not here, as a mesh, with their kind and the platform that is compiled for."""

    devices: Any
    kind: AbstractDevice
    platform: str


Described = Callable[[Case, tuple[int, ...]], Chips]

CASES = (
    Case("v5e:2x2", "data=2,tensor=2", "tova"), Case("v5e:2x2", "tensor=4", "tova-kv_head"),
    Case("v5e:4x4", "data=2,tensor=8", "tova"), Case("v5e:4x4", "data=2,tensor=8", "h2o-kv_head"),
    Case("v5e:4x4", "fsdp=2,tensor=8", "tova", model="Llama 3 70B"),
)  # fmt: skip
MOST_PADDING = 1.02
"""Bytes that a chip's arguments take, beside those of their numbers."""


LANES = 128
"""Numbers of a vector register. A flag for each row (whether any head's scores are not finite) is padded to them."""


class Found(NamedTuple):
    """What the program has, on one chip. `wrong` is empty if all checks pass."""

    exchanges: tuple[Collective, ...]
    share: int
    arguments: int
    wrong: list[str]


def tpus(case: Case, shape: tuple[int, ...]) -> Chips:
    """TPUs as a mesh of this shape."""
    described = topologies.get_topology_desc(platform="tpu", topology_name=case.chips)
    devices = mesh_utils.create_device_mesh(shape, described.devices, allow_split_physical_axes=True)
    return Chips(devices, AbstractDevice(described.devices[0].device_kind, 1, "tpu"), "tpu")  # type: ignore


def look(case: Case, described: Described) -> Found:
    """What the program of a case has, compiled for the devices of `described`."""
    shape = shape_of(case.mesh)
    automatic = (AxisType.Auto,) * len(AXES)
    chips = described(case, shape)
    rules = ShardingRules(Mesh(chips.devices, AXES))
    config, policy = LLAMA[case.model], get_policy(case.policy)
    model = model_shapes(rules, config)
    state = state_shapes(rules, model, policy, case.slots - 1, case.rows)
    with jax.sharding.use_abstract_mesh(AbstractMesh(shape, AXES, axis_types=automatic, abstract_device=chips.kind)):
        program = decode_step(model, state, policy).lower(lowering_platforms=(chips.platform,)).compile()
    found, memory = collectives(program), program.memory_analysis()
    rows = case.rows // rules.ways("batch")
    sums = [(rows, 1, config.hidden_size)] * 2
    sums += [(rows, 1, case.slots)] * (state.kv[0].sets == 1 and rules.ways("kv_heads") > 1)
    share = rules.bytes_per_device((model, state.arrays))
    wrong = moving(found, config) + (amiss(found, sums, config.num_layers) if rules.ways("embed") == 1 else [])
    if not share <= memory.argument_size_in_bytes <= MOST_PADDING * share:
        wrong.append(f"a chip has {memory.argument_size_in_bytes:,} bytes of arguments, its share is {share:,}")
    if memory.alias_size_in_bytes < rules.bytes_per_device(state.kv):
        wrong.append(f"only {memory.alias_size_in_bytes:,} bytes are written in place")
    return Found(found, share, memory.argument_size_in_bytes, wrong)


def moving(found: tuple[Collective, ...], config: DecoderConfig) -> list[str]:
    """Exchanges of keys or values, whose last axis is the width of a head."""
    tokens = lambda shape: shape[-1:] == (config.head_dim,) and math.prod(shape) > LANES
    return [f"{one.kind} of keys or values, {one.shapes}" for one in found if any(map(tokens, one.shapes))]


def amiss(found: tuple[Collective, ...], sums: list[tuple[int, ...]], layers: int) -> list[str]:
    """What is exchanged in the loop over layers and should not be, or the other way round. Axes of 1 do not count."""
    layer = [one for one in found if one.times >= layers]
    told = [f"in a layer, {one.kind} of {one.shapes}" for one in layer if one.kind != "all-reduce"]
    sizes = lambda shapes: sorted(math.prod(shape) for shape in shapes)
    summed = [shape for one in layer if one.kind == "all-reduce" for shape in one.shapes]
    have = sizes(shape for shape in summed if math.prod(shape) > LANES)
    if have != sizes(sums):
        told.append(f"in a layer, sums of {have} numbers, not {sizes(sums)}")
    return told


def tell(cases: Sequence[Case], described: Described) -> bool:
    """Compiles cases and prints a table; returns whether a check failed."""
    lines, failed = [], False
    for case in cases:
        found = look(case, described)
        failed |= bool(found.wrong)
        layers = LLAMA[case.model].num_layers
        listed = lambda every: "; ".join(f"{one.kind} of {' '.join(map(str, one.shapes))}" for one in every) or "-"
        layer = listed(one for one in found.exchanges if one.times >= layers)
        rest = listed(one for one in found.exchanges if one.times < layers)
        lines.append([case.model, case.chips, case.mesh, case.policy, f"{found.share / 1e9:.3f}",
                      f"{found.arguments / 1e9:.3f}", layer, rest])  # fmt: skip
        print(*(f"{case.chips} {case.mesh} {case.policy}: {one}" for one in found.wrong or ["as it should be"]),
              sep="\n", flush=True)  # fmt: skip
    head = ["model", "chips", "mesh", "policy", "GB of a chip's share", "GB of its arguments", "in each layer", "else"]
    print("", *markdown(head, lines), sep="\n")
    return failed


def main(args: Arguments) -> None:
    need("libtpu", install="make aot, or pip install " + " ".join(needs()))
    print(f"jax {version('jax')}, libtpu {version('libtpu')}\n")
    sys.exit(tell(CASES if args.cases is None else [CASES[i] for i in args.cases], tpus))


if __name__ == "__main__":
    main(arguments(QUICK))
