"""Limits of the TPU kernels: supported devices and calls, and the sizes of their blocks."""

from __future__ import annotations

from jaxcompress.pallas_kernels import tuning
from jaxcompress.pallas_kernels.tuning import Sizes
from jaxcompress.pallas_kernels.types import KernelCall, Op

needs = "a TPU (v5e or later)"

PLAIN = ("float32", "bfloat16")
QUANTISED = ("int8", "float8_e4m3fn")
_MIB = 2**20
VMEM = 64 * _MIB  # available to a kernel, out of the 128 MiB of a v5e or v6e core
_BYTES = {"float32": 4, "bfloat16": 2}  # 1 for other dtypes


def group_rows(dtype: str) -> int:
    """The number of rows that a TPU writes together in a state of this dtype."""
    return 32 if dtype in QUANTISED else 8


def runs_on(platform: str, kind: str) -> bool:
    return platform == "tpu" and not any(old in kind for old in ("v2", "v3", "v4"))


def declines(op: Op, call: KernelCall) -> str | None:
    if call.dtype not in PLAIN + QUANTISED:
        return f"a state of {call.dtype} cannot be read in a kernel, only {', '.join(PLAIN + QUANTISED)}"
    if call.query not in PLAIN:
        return f"queries are {call.query}, not one of {', '.join(PLAIN)}"
    if call.head_dim % 128:
        return f"heads are {call.head_dim} wide, not a multiple of 128, the lanes of a TPU"
    rows = group_rows(call.dtype)
    if op != "block" and call.slots % rows:
        return (
            f"{call.slots} slots of {call.dtype} are not a multiple of the {rows} rows that go together in memory, and "
            f"the whole state would be copied: make it with init_state(..., slot_multiple={rows})"
        )
    if op == "segment":
        return _segment_declines(call)
    if op == "block":
        return _block_declines(call)
    if not _step_fits(op, call, step_sizes(op, call, measured=False)):
        return f"{call.kv_heads} kv heads that share {call.slots} slots do not fit into VMEM together"
    return None


def step_sizes(op: Op, call: KernelCall, *, measured: bool = True) -> Sizes:
    """The numbers of heads and slots in a grid step of `step` and `step_evict`."""
    width = call.head_dim * _BYTES.get(call.dtype, 1)
    slots = call.slots if call.slots <= 1024 else 1024
    if _together(op, call):
        heads = call.kv_heads
        while heads * slots * width > 2 * _MIB and slots > 128:
            slots = 128 if slots <= 256 else -(-slots // 256) * 128
    else:
        most = max(1, min(_MIB // (slots * width), 2 * _MIB // (4 * call.group * call.slots)))
        heads = max(n for n in range(1, call.kv_heads + 1) if call.kv_heads % n == 0 and n <= most)
    default = dict(heads=heads, slots=slots)
    return tuning.sizes(op, call, default, lambda found: _step_fits(op, call, found)) if measured else default


def _together(op: Op, call: KernelCall) -> bool:
    """Whether all heads of a row must be in one block: heads that share a set under a rule, and quantised heads, whose
    scales are adjacent in memory."""
    return call.dtype in QUANTISED or (op == "step_evict" and call.sets == 1)


def _step_fits(op: Op, call: KernelCall, size: Sizes) -> bool:
    heads, slots = size["heads"], size["slots"]
    if heads < 1 or call.kv_heads % heads or (_together(op, call) and heads != call.kv_heads):
        return False
    if slots > call.slots or (slots % 128 and slots != call.slots) or slots < 1:
        return False
    tiles = 4 * heads * slots * call.head_dim * _BYTES.get(call.dtype, 1)  # K and V, double-buffered for the pipeline
    masses = (2 if op == "step" else 1) * heads * -(-call.group // 8) * 8 * call.slots * 4
    return tiles + masses <= VMEM // 2


def segment_sizes(call: KernelCall) -> Sizes:
    """The number of tokens in a grid step of `segment`."""
    default = dict(tokens=min(call.tokens, 32))
    return tuning.sizes("segment", call, default, lambda found: 0 < found["tokens"] <= min(call.tokens, 256))


def block_sizes(call: KernelCall) -> Sizes:
    """The numbers of queries and keys in a tile of `block`."""
    default = dict(tokens=min(128, -(-call.tokens // 16) * 16), keys=min(call.slots, 512))
    return tuning.sizes("block", call, default, lambda found: _block_fits(call, found))


def _block_fits(call: KernelCall, size: Sizes) -> bool:
    tokens, keys = size["tokens"], size["keys"]
    if tokens % 16 or not 16 <= tokens <= 512 or not 1 <= keys <= call.slots or (keys % 128 and keys != call.slots):
        return False
    group = -(-call.group // 8) * 8
    return 4 * group * call.slots * 4 + 8 * tokens * keys * 4 + 4 * call.group * tokens * call.head_dim * 4 <= VMEM // 2


def _block_declines(call: KernelCall) -> str | None:
    if call.dtype not in PLAIN:
        return f"a block attends to keys of {', '.join(PLAIN)}, not {call.dtype}"
    if not _block_fits(call, dict(tokens=16, keys=min(call.slots, 512))):
        return f"the mass of {call.slots} keys does not fit into VMEM"
    return None


def _segment_declines(call: KernelCall) -> str | None:
    if call.dtype not in PLAIN:
        return f"a segment is streamed through a state of {', '.join(PLAIN)}, not {call.dtype}"
    if call.batch * call.tokens > 2**16:
        return f"{call.batch} rows of {call.tokens} tokens are too many at once"
    row = 2 * call.kv_heads * call.slots * call.head_dim * _BYTES[call.dtype]
    if row > VMEM // 2:
        return f"the {call.slots} slots of {call.kv_heads} kv heads take {row // _MIB} MiB, which VMEM does not hold"
    return None


def candidates(op: Op, call: KernelCall) -> list[Sizes]:
    """Sizes to try (see `tuning.tune`)."""
    if op == "segment":
        return [dict(tokens=n) for n in (8, 16, 32, 64, 128) if n <= call.tokens]
    slots = sorted({n for n in (128, 256, 512, 1024, 2048, 4096) if n < call.slots} | {call.slots})
    if op == "block":
        tokens = [n for n in (16, 32, 64, 128, 256, 512) if n < call.tokens + 16]
        tried = [dict(tokens=n, keys=m) for n in tokens for m in slots]
        return [size for size in tried if _block_fits(call, size)]
    heads = [n for n in range(1, call.kv_heads + 1) if call.kv_heads % n == 0]
    return [size for n in heads for m in slots if _step_fits(op, call, size := dict(heads=n, slots=m))]
