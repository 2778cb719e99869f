"""Compiles the GPU kernels for an H100 without having one, and checks the code that XLA and ptxas produce.

    make aot-gpu        # Python 3.12; installs JAX's CUDA plugin, its compilers and libraries, 4 GB

Every case is `jaxcompress.recurrence.advance.advance` under a scan over layers, as a model runs it, with the stacked
state as the carry, donated. Checked in the compiled program:

  the state is written in place: as many bytes are aliased as the state has, and K and V are never copied
  temporary memory is at most 1 % of the state, plus the size of inputs and outputs
  a layer is one launch of a kernel (a block of queries: two), and no thread's registers spill into memory

Nothing is executed. XLA does not analyse programs for a device that is not present. So "moved" counts the arguments and
results of all launches in a program of one layer. Keys and values count once for a kernel that reads them once; a step
writes only one row, so its keys and values do not count as written. "Moved" is empty where a layer loops over tokens or
chunks.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from command import Command, arguments, stop

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # on standard output: registers and spills


def compilers() -> None:
    """Finds ptxas and its libraries in the wheels of the CUDA plugin. Call it before JAX is imported."""
    for root in find_spec("nvidia").submodule_search_locations or () if find_spec("nvidia") else ():  # type: ignore
        for cuda in glob.glob(f"{root}/*/nvvm"):
            folder = os.path.dirname(cuda)
            os.environ["PATH"] = f"{folder}/bin:{os.environ.get('PATH', '')}"
            flags = f"--xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
            return
    stop("this script needs a CUDA compiler, not installed here: make aot-gpu")


compilers()

import jax  # noqa: E402  after the compilers were found
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh  # noqa: E402

from jaxcompress.models.config import DecoderConfig  # noqa: E402
from jaxcompress.models.init_state import init_state  # noqa: E402
from jaxcompress.policies.names import get_policy  # noqa: E402
from jaxcompress.recurrence.advance import advance  # noqa: E402


@dataclass(frozen=True)
class Arguments(Command):
    """Prints a table and any failed checks. The exit code is 1 if a check fails."""

    only: tuple[int, ...] | None = None
    """Numbers of the cases to run; all if not given."""
    json: Path | None = None
    """Also write the table here."""


QUICK = Arguments(quick=True, only=(0, 13))

# The device as OpenXLA describes it, or as JAX reports it if it is present.
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
HEADS, KV_HEADS, WIDTH = 32, 8, 128  # of Llama 3 8B
MOST_TEMPORARY = 0.01  # of the state


class Case(NamedTuple):
    """A case to compile. `jnp` cases are for comparison and are not checked."""

    policy: str
    slots: int
    batch: int
    dtype: str = "bfloat16"
    tokens: int = 1
    chunk: int = 1
    heads: int = HEADS
    layers: int = 32
    backend: str = "gpu"


CASES = (
    Case("tova", 513, 8), Case("tova", 513, 8, backend="jnp"), Case("tova", 513, 8, heads=64), Case("tova", 129, 64),
    Case("h2o-kv_head", 513, 8), Case("window+4", 513, 8), Case("observed_attention", 513, 8),
    Case("tova", 513, 8, "float32"), Case("tova", 513, 8, "int8"), Case("tova", 513, 8, "int8", backend="jnp"),
    Case("tova-kv_head", 513, 8, "float8_e4m3fn"), Case("tova", 8193, 1), Case("tova", 32769, 1, layers=8),
    Case("tova-kv_head", 257, 8, tokens=512), Case("tova-kv_head", 257, 8, tokens=512, backend="jnp"),
    Case("h2o-kv_head", 257, 8, tokens=512), Case("window+4", 257, 8, tokens=512),
    Case("h2o-kv_head", 513, 8, "int8", tokens=512),
    Case("tova", 513, 8, tokens=512, chunk=128), Case("tova", 513, 8, tokens=512, chunk=128, backend="jnp"),
    Case("h2o-kv_head", 513, 2, tokens=2048, chunk=2048, layers=4),
)  # fmt: skip


class Found(NamedTuple):
    """Measurements of the compiled program. `wrong` is empty if all checks pass."""

    case: Case
    state: int  # bytes
    aliased: float  # of the state
    temporary: float  # of the state
    copies: int  # of K or V
    launches: int  # of our kernels, in a layer
    others: int  # of XLA's, in a layer
    registers: int
    spilled: int  # bytes
    moved: float  # bytes / bytes that must move
    wrong: list[str]


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Captures what native code prints on standard output and error."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        before = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield lines
        finally:
            for number, old in zip((1, 2), before, strict=True):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def compiled(case: Case) -> Any:
    """The program of a case, its state, and the largest arguments beside it."""
    described = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    policy = get_policy(case.policy)
    config = DecoderConfig(8, case.heads * WIDTH, 8, case.layers, case.heads, KV_HEADS, WIDTH)
    state = jax.eval_shape(lambda: init_state(config, policy, case.slots - 1, batch=case.batch, dtype=case.dtype)[0])
    query = "float32" if case.dtype == "float32" else "bfloat16"
    shape = lambda heads: jax.ShapeDtypeStruct((case.batch, case.tokens, heads, WIDTH), query)
    block = shape(case.heads), shape(KV_HEADS), shape(KV_HEADS)
    args = state, *block, jax.ShapeDtypeStruct((case.batch, case.tokens), jnp.int32)
    on = SingleDeviceSharding(described.devices[0])
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), args)

    def model(state: Any, q: Any, k: Any, v: Any, positions: Any) -> Any:
        def layer(carry: Any, index: Any) -> Any:
            q, state = carry
            backend: Any = case.backend
            done = advance(q, k, v, positions, state, index, policy, chunk=case.chunk, backend=backend)
            return (done.out, done.state), done.freed

        (out, state), freed = jax.lax.scan(layer, (q, state), jnp.arange(case.layers))
        return state, out, freed

    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        program = jax.jit(model, donate_argnums=0).trace(*args).lower(lowering_platforms=("cuda",)).compile()
    return program, state, sum(map(size_of, block))


def size_of(x: Any) -> int:
    return x.size * x.dtype.itemsize


def look(case: Case) -> Found:
    """Compiles a case and checks it."""
    with captured() as said:
        program, state, incoming = compiled(case)
    text, memory = program.as_text(), program.memory_analysis()
    size = sum(map(size_of, jax.tree.leaves(state)))
    vectors = sum(map(size_of, jax.tree.leaves((state.keys, state.values))))
    codes = jax.tree.leaves(state.keys)[0]
    dims = ",".join(map(str, codes.shape[1:]))
    flat = f"{codes.shape[0] * codes.shape[1] * codes.shape[2]},{codes.shape[3]},{codes.shape[4]}"
    of_state = re.compile(rf"= \(?\w+\[(?:(?:\d+,)?{dims}|{flat})\]\S* .*\bcopy(?:-start)?\(")
    copies = sum(1 for line in text.splitlines() if of_state.search(line))
    body = layer_of(text)
    kernel = lambda line: "mosaic_gpu" in line and "custom-call(" in line
    ours = sum(map(kernel, text.splitlines()))
    others = sum(bool(re.search(r"\b(fusion|custom-call|sort|copy)\(", line)) and not kernel(line) for line in body)
    registers = max((int(n) for line in said for n in re.findall(r"Used (\d+) registers", line)), default=0)
    spilled = sum(int(n) for line in said for n in re.findall(r"(\d+) bytes spill", line))
    aliased, temporary = memory.alias_size_in_bytes / size, memory.temp_size_in_bytes / size

    with captured():
        single = compiled(case._replace(layers=1))[0]
    numbers = (size - vectors) // case.layers
    outgoing = incoming * case.heads // (case.heads + 2 * KV_HEADS)
    must = (1 + (case.tokens > 1)) * vectors / case.layers + 2 * numbers + incoming + outgoing
    moved = program_bytes(single.as_text(), vectors / case.layers if case.tokens == 1 else 0.0) / must

    copied = 3 * incoming  # queries, keys and values, in the order of the kernel
    wrong = []
    if not 1 <= aliased <= 1.005:
        wrong.append(f"{aliased:.4f} of the state are aliased")
    if case.chunk == 1:  # in a block, jnp writes the slots after attention
        if copies:
            wrong.append(f"{copies} copies of K or V")
        if memory.temp_size_in_bytes > MOST_TEMPORARY * size + 2 * incoming * (case.tokens > 1):
            wrong.append(f"{temporary:.4f} of the state is allocated beside it")
    elif memory.temp_size_in_bytes > 4 * case.batch * case.heads * case.chunk * (case.slots + case.chunk) + copied:
        wrong.append("as much is allocated as a matrix of all queries by all keys")
    if ours != (1 if case.chunk == 1 else 2):
        wrong.append(f"{ours} launches of kernels in a layer")
    if spilled:
        wrong.append(f"{spilled} bytes of registers spill")
    wrong = wrong if case.backend == "gpu" else []
    return Found(case, size, aliased, temporary, copies, ours, others, registers, spilled, moved, wrong)


def layer_of(text: str) -> list[str]:
    """The lines of the computation with the most launches of a scan's body; all lines if there is no scan."""
    computations = re.split(r"\n(?=(?:ENTRY )?%?\S+ \()", text)
    bodies = [one for one in computations if re.search(r"region_|body|while", one.split("(")[0])]
    launches = lambda one: len(re.findall(r"\b(?:fusion|custom-call)\(", one))
    best = max(bodies or computations, key=lambda one: (one.count("mosaic_gpu"), launches(one)))
    return best.splitlines()


_BYTES = dict(pred=1, s8=1, u8=1, f8e4m3fn=1, bf16=2, f16=2, s16=2, u16=2, f32=4, s32=4, u32=4, f64=8, s64=8, u64=8)
_ONE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(.*)$")


def program_bytes(text: str, row_writes: float) -> float:
    """Bytes that a program's launches read and write: their arguments and results.

    For an argument that a fusion or the kernel changes in place, only the bytes read count.

    Args:
      row_writes: bytes that the kernel returns without having written them.
    """
    computations = {}
    for one in re.split(r"\n(?=(?:ENTRY )?%?[\w.-]+ \()", text):
        head, *lines = one.splitlines()
        computations[head.removeprefix("ENTRY ").split(" ")[0].lstrip("%")] = [x for x in map(_ONE.match, lines) if x]
    fused = {name for lines in computations.values() for x in lines for name in re.findall(r"calls=%?([\w.-]+)", x[5])}
    total = 0.0
    for name, lines in computations.items():
        if name in fused:
            continue
        sizes = {x[1]: bytes_of(x[2]) for x in lines}
        for x in lines:
            if x[3] not in ("fusion", "custom-call", "copy", "sort", "scatter", "dynamic-update-slice"):
                continue
            operands = [sizes.get(y.strip().lstrip("%"), 0) for y in x[4].split(",")]
            called = [z[3] for y in re.findall(r"calls=%?([\w.-]+)", x[5]) for z in computations.get(y, [])]
            result = sizes[x[1]]
            if {"scatter", "dynamic-update-slice"} & {x[3], *called} and result in operands:
                operands.remove(result)
                result = 0
            total += sum(operands) + result - (row_writes if "mosaic_gpu" in x[0] else 0)
    return total


def bytes_of(kind: str) -> int:
    """The size of a type as XLA prints it."""
    arrays = re.findall(r"\b(\w+)\[([\d,]*)\]", kind)
    return sum(_BYTES.get(name, 4) * math.prod(int(n) for n in dims.split(",") if n) for name, dims in arrays)


def once(case: Case) -> bool:
    """Whether every launch in a layer runs once (no loop over tokens or chunks), so that bytes can be counted."""
    return case.tokens == case.chunk or (case.chunk == 1 and case.backend == "gpu")


def main(args: Arguments) -> None:
    print(f"jax {version('jax')}, jax-cuda13-plugin {version('jax-cuda13-plugin')}, ptxas of nvidia-cuda-nvcc "
          f"{version('nvidia-cuda-nvcc')}; {KV_HEADS} kv heads of {WIDTH}\n")  # fmt: skip
    columns = ("policy", "state", "slots", "batch", "queries of a group", "layers", "tokens, chunk", "by", "aliased",
               "temporary", "copies", "kernels", "other launches", "registers", "moved / must")  # fmt: skip
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    table = []
    for case in CASES if args.only is None else [CASES[i] for i in args.only]:
        try:
            found = look(case)
        except Exception as error:
            found = Found(case, 0, 0, 0, 0, 0, 0, 0, 0, 0, [f"{type(error).__name__}: {str(error)[:300]}"])
        table.append(found)
        row = (
            case.policy, case.dtype, case.slots, case.batch, case.heads // KV_HEADS, case.layers,
            f"{case.tokens}, {case.chunk}", case.backend, f"{found.aliased:.4f}", f"{found.temporary:.4f}",
            found.copies, found.launches, found.others, found.registers or "",
            f"{found.moved:.2f}" if once(case) else "",
        )  # fmt: skip
        print("|", " | ".join(map(str, row)), "|", *(f"**{one}**" for one in found.wrong), flush=True)
    if args.json:
        args.json.write_text(json.dumps([one._replace(case=one.case._asdict())._asdict() for one in table], indent=1))
    failed = [found for found in table if found.wrong]
    print(f"\n{len(table) - len(failed)} of {len(table)} as they should be")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(arguments(QUICK))
