"""Compiles the kernels for accelerators without having them, and checks the code that the compilers produce.

    make aot
    python experiments/aot_kernels.py --devices v5e v6e --json table.json

Every case is `jaxcompress.recurrence.advance.advance` under a scan over layers, as a model runs it, with the stacked
state as the carry, donated. Checked in the compiled program:

  the state is written in place: as many bytes are aliased as the state has, and K and V are never copied
  temporary memory is at most 1 % of the state, plus, for a segment, the size of the inputs
  a layer is one kernel
  chips send each other nothing, except the mean over heads where heads on different chips share a set

Nothing is executed. Bytes come from XLA's cost analysis of a program of one layer. A kernel is counted by the blocks
that it requests.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, replace
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is used

import jax
import jax.numpy as jnp
from command import Command, arguments, need
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.pallas_kernels.types import Backend, On
from jaxcompress.policies.names import get_policy
from jaxcompress.recurrence.advance import advance
from jaxcompress.state.kv_state import KVState


@dataclass(frozen=True)
class Arguments(Command):
    """Prints a table and any failed checks. The exit code is 1 if a check fails."""

    devices: tuple[str, ...] = ("v5e", "v6e")
    """TPU generations."""
    only: tuple[int, ...] | None = None
    """Numbers of the cases to run; all if not given."""
    json: Path | None = None
    """Also write the table here."""
    needs: bool = False
    """Print the packages that pip has to install, and stop."""


QUICK = Arguments(quick=True, devices=("v5e",), only=(0, 16))

LAYERS, HEADS, KV_HEADS, WIDTH = 32, 32, 8, 128  # of Llama 3 8B
MOST_TEMPORARY = 0.01  # of the state


class Case(NamedTuple):
    """A case to compile.

    Attributes:
      slots: number of allocated slots, including the incoming token's and those that stay free.
      tokens, chunk: sizes of a read; 1 and 1 are a decoding step.
      spread: whether the state is sharded over a 2 x 2 mesh, by rows and by kv heads.
      layers: number of layers; fewer where the state of all layers would not fit.
      spare: slots that stay free, because rows of 8 lie together.
      backend: `jnp` is for comparison; nothing is checked then.
    """

    policy: str
    slots: int
    batch: int
    dtype: str = "bfloat16"
    tokens: int = 1
    chunk: int = 1
    spread: bool = False
    layers: int = LAYERS
    spare: int = 0
    backend: Literal["tpu", "jnp"] = "tpu"

    @property
    def what(self) -> str:
        return "step" if self.tokens == 1 else "segment" if self.chunk == 1 else "block"


CASES = (
    Case("tova", 512, 8), Case("tova", 512, 8, backend="jnp"),
    Case("h2o-kv_head", 512, 8), Case("h2o-kv_head", 512, 8, backend="jnp"),
    Case("window+4", 512, 8), Case("observed_attention", 512, 8), Case("tova", 128, 64),
    Case("tova", 512, 8, "float32"), Case("tova", 512, 8, "int8"), Case("tova-kv_head", 512, 8, "float8_e4m3fn"),
    Case("observed_attention", 512, 8, "int8"), Case("tova", 24, 64), Case("tova", 8192, 1),
    Case("tova", 32768, 1, layers=4), Case("tova-kv_head", 32768, 1, "int8", layers=4),
    Case("tova", 136, 8, spare=7), Case("tova-kv_head", 512, 8, "int8", spare=31),
    Case("tova", 136, 8, tokens=512, spare=7),
    Case("tova", 512, 8, tokens=512), Case("tova", 512, 8, tokens=512, backend="jnp"),
    Case("h2o-kv_head", 512, 8, tokens=512), Case("window+4", 512, 8, tokens=512),
    Case("tova", 8192, 1, tokens=64, layers=4),
    Case("tova", 512, 8, tokens=512, chunk=128), Case("tova", 512, 8, tokens=512, chunk=128, backend="jnp"),
    Case("h2o-kv_head", 512, 2, tokens=2048, chunk=2048, layers=4),
    Case("tova-kv_head", 512, 8, spread=True), Case("tova", 512, 8, spread=True),
    Case("tova", 512, 8, tokens=512, spread=True), Case("h2o-kv_head", 512, 8, tokens=512, spread=True),
)  # fmt: skip


class Found(NamedTuple):
    """Measurements of the compiled program, per chip. `wrong` is empty if all checks pass."""

    device: str
    case: Case
    state: int  # bytes
    aliased: float  # of the state
    temporary: float  # of the state
    copies: int  # of K or V
    kernels: int  # of a layer
    collectives: dict[str, int]  # kind -> the most numbers in one
    moved: float  # bytes accessed / bytes that must move
    wrong: list[str]


def compiled_for(topology: str, case: Case) -> Any:
    """The program of a case for a device, its state and mesh."""
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    device = described.devices[0]
    kind = AbstractDevice(device.device_kind, 1, "tpu")  # type: ignore
    policy = get_policy(case.policy)
    config = DecoderConfig(8, HEADS * WIDTH, 8, case.layers, HEADS, KV_HEADS, WIDTH)
    context = AbstractMesh((), (), abstract_device=kind)
    capacity = case.slots - 1 - case.spare
    with jax.sharding.use_abstract_mesh(context):
        state = jax.eval_shape(lambda: init_state(config, policy, capacity, batch=case.batch, dtype=case.dtype)[0])
    shape = lambda heads: jax.ShapeDtypeStruct((case.batch, case.tokens, heads, WIDTH), query_dtype(case))
    block = shape(HEADS), shape(KV_HEADS), shape(KV_HEADS), jax.ShapeDtypeStruct((case.batch, case.tokens), jnp.int32)

    backend: Backend = case.backend
    if case.spread:
        mesh = topologies.make_mesh(described, (2, 2), ("data", "model"))
        context = AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, abstract_device=kind)
        backend = On("tpu", context, "data", "model")
        on = lambda x, *axes: place(x, NamedSharding(mesh, PartitionSpec(*axes)))
        block = *(on(x, "data", None, "model") for x in block[:3]), on(block[3], "data")
        sets = "model" if state.sets > 1 else None
        per_head, per_set = (lambda x: on(x, None, "data", "model")), (lambda x: on(x, None, "data", sets))
        state = replace(
            state, keys=jax.tree.map(per_head, state.keys), values=jax.tree.map(per_head, state.values),
            positions=per_set(state.positions), stats=jax.tree.map(per_set, state.stats),
            seen=on(state.seen, "data"), layer=on(state.layer),
        )  # fmt: skip
    else:
        block, state = jax.tree.map(lambda x: place(x, SingleDeviceSharding(device)), (block, state))

    def model(state: KVState, q: Any, k: Any, v: Any, positions: Any) -> Any:
        def layer(carry: Any, index: Any) -> Any:
            q, state = carry
            done = advance(q, k, v, positions, state, index, policy, chunk=case.chunk, backend=backend)
            return (done.out, done.state), done.freed

        (out, state), freed = jax.lax.scan(layer, (q, state), jnp.arange(case.layers))
        return replace(state, seen=state.seen + case.tokens), out, freed

    with jax.sharding.use_abstract_mesh(context):
        traced = jax.jit(model, donate_argnums=0).trace(state, *block)
        return traced.lower(lowering_platforms=("tpu",)).compile(), state


def place(x: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def query_dtype(case: Case) -> str:
    return "float32" if case.dtype == "float32" else "bfloat16"


def look(device: str, case: Case) -> Found:
    """Compiles a case and checks it."""
    program, state = compiled_for(f"{device}:2x2", case)
    text, memory = program.as_text(), program.memory_analysis()
    chips = 4 if case.spread else 1
    leaf_bytes = lambda x: x.size * x.dtype.itemsize // (chips if x.ndim > 2 else 1)
    size = sum(map(leaf_bytes, jax.tree.leaves(state)))
    vectors = sum(map(leaf_bytes, jax.tree.leaves((state.keys, state.values))))
    codes = jax.tree.leaves(state.keys)[0]
    dims = [codes.shape[1] // (2 if case.spread else 1), codes.shape[2] // (2 if case.spread else 1), *codes.shape[3:]]
    of_state = re.compile(r"= \(?\w+\[(?:\d+,)?" + ",".join(map(str, dims)) + r"\]\S* .*\bcopy(?:-start)?\(")
    copies = sum(1 for line in text.splitlines() if of_state.search(line))
    kernels = text.count('custom_call_target="tpu_custom_call"')
    collectives: dict[str, int] = {}
    for shape, kind in re.findall(
        r"= \(?\w+\[([\d,]*)\]\S* .*?\b(all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", text
    ):
        count = 1
        for n in shape.split(","):
            count *= int(n or 1)
        collectives[kind] = max(count, collectives.get(kind, 0))

    size_of_query = jnp.dtype(query_dtype(case)).itemsize
    incoming = 2 * case.batch * case.tokens * (HEADS + KV_HEADS) * WIDTH * size_of_query // chips  # and outgoing
    aliased, temporary = memory.alias_size_in_bytes / size, memory.temp_size_in_bytes / size

    wrong = []
    if not 1 <= aliased <= 1.005:  # more, where memory is padded
        wrong.append(f"{aliased:.4f} of the state are aliased")
    if case.what != "block":  # in a block, jnp writes the slots after attention
        if copies:
            wrong.append(f"{copies} copies of K or V")
        if memory.temp_size_in_bytes > MOST_TEMPORARY * size + (case.tokens > 1) * incoming:
            wrong.append(f"{temporary:.4f} of the state is allocated beside it")
    elif memory.temp_size_in_bytes > 4 * case.batch * HEADS * case.chunk * (case.slots + case.chunk):
        wrong.append("as much is allocated as a matrix of all queries by all keys")
    if kernels != 1:
        wrong.append(f"{kernels} kernels in a layer")
    shared = case.spread and state.sets == 1
    allowed = case.batch * case.slots if shared else 0
    if any(count > allowed or kind != "all-reduce" for kind, count in collectives.items()):
        wrong.append(f"chips send {collectives}")

    # A program of one layer has no loop whose number of iterations would have to be guessed.
    single = program if case.layers == 1 else compiled_for(f"{device}:2x2", case._replace(layers=1))[0]
    numbers = (size - vectors) // case.layers  # positions and a policy's own, which are read and written
    must = (1 + (case.what == "segment")) * vectors // case.layers + 2 * numbers + incoming
    moved = single.cost_analysis().get("bytes accessed", 0.0) / must
    wrong = wrong if case.backend == "tpu" else []
    return Found(device, case, size, aliased, temporary, copies, kernels, collectives, moved, wrong)


def needs() -> list[str]:
    """The packages to install, as arguments of pip."""
    wanted = [one for one in requires("jax") or () if one.startswith("libtpu")]
    return [one.split(";")[0].strip().replace(" ", "") for one in wanted[:1]]


def main(args: Arguments) -> None:
    if args.needs:
        return print(*needs())
    need("libtpu", install="make aot, or pip install " + " ".join(needs()))
    print(f"jax {version('jax')}, libtpu {version('libtpu')}; {HEADS} query heads, {KV_HEADS} kv heads of {WIDTH}\n")
    columns = ("device", "case", "policy", "state", "slots", "batch", "layers", "tokens, chunk", "by", "aliased",
               "temporary", "copies", "kernels", "moved / must", "sent")  # fmt: skip
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    table = []
    for device in args.devices:
        for case in CASES if args.only is None else [CASES[i] for i in args.only]:
            try:
                found = look(device, case)
            except Exception as error:
                found = Found(device, case, 0, 0, 0, 0, 0, {}, 0, [f"{type(error).__name__}: {str(error)[:300]}"])
            table.append(found)
            sent = ", ".join(f"{kind} of {count}" for kind, count in found.collectives.items()) or "-"
            row = (
                device + " x 4" * case.spread, case.what, case.policy, case.dtype, case.slots, case.batch, case.layers,
                f"{case.tokens}, {case.chunk}", case.backend, f"{found.aliased:.4f}", f"{found.temporary:.4f}",
                found.copies, found.kernels, f"{found.moved:.2f}", sent,
            )  # fmt: skip
            print("|", " | ".join(map(str, row)), "|", *(f"**{one}**" for one in found.wrong), flush=True)
    if args.json:
        args.json.write_text(json.dumps([one._replace(case=one.case._asdict())._asdict() for one in table], indent=1))
    failed = [found for found in table if found.wrong]
    print(f"\n{len(table) - len(failed)} of {len(table)} as they should be")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(arguments(QUICK))
