"""Kernels on this machine's device: first their correctness, then their speed beside the alternatives.

    python experiments/speed_kernels.py            # on a TPU or a GPU; some minutes
    python experiments/speed_kernels.py --quick    # anywhere: tiny shapes, interpreted; its numbers mean nothing

  right     every kernel that the device can run, against float64 or against the recurrence; one that is wrong is not
            timed, and the exit code is 1
  step      a decoding step of 8 kv heads of 128 numbers, by slots and rows of the batch: the kernel, the jnp path in
            the same compiled loop, `jax.nn.dot_product_attention` over as many keys, and, where PyTorch has the device
            too, its `scaled_dot_product_attention`; the last two neither write the token nor return mass
  segment   the exact recurrence over a segment: one launch against a scan of the jnp path
  block     queries over slots and their own keys, with the mass

A step is timed in a loop inside one compiled function, over the layers of a stacked state that is several times larger
than the cache, so no layer is still cached from the iteration before. Each iteration depends on the result of the one
before. Seconds are medians of repeats, with all sides run alternately. On a GPU, the launch durations that the driver
records (CUPTI) are shown too, if available. "Of copying" is: bytes that must move (keys and values once, a row of each,
queries, output and mass) / seconds, over bytes / seconds of copying a large array, measured in the same run. Rows that
do not fit into the allowed minutes are left out, and the script says so.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from command import Command, arguments

from jaxcompress import policies
from jaxcompress.pallas_kernels import devices, dispatch, tpu_limits
from jaxcompress.pallas_kernels.types import KernelCall
from jaxcompress.recurrence.advance import advance
from jaxcompress.recurrence.attention import call_of, slot_step
from jaxcompress.state.kv_state import empty, with_numbers
from jaxcompress.state.storage import Stored, load_vectors, store_vectors, zeros


@dataclass(frozen=True)
class Arguments(Command):
    """Prints tables in markdown."""

    minutes: float = 7.5
    """Start no new rows after so many minutes."""
    slots: tuple[int, ...] = (128, 512, 2048, 8192)
    rows: tuple[int, ...] = (1, 8, 64, 256)
    group: int = 4
    """Query heads per kv head."""
    dtypes: tuple[str, ...] = ("bfloat16", "int8")
    repeats: int = 7
    out: Path | None = None
    """Also write the results here (JSON)."""


QUICK = Arguments(quick=True, slots=(16, 40), rows=(1, 2))


@dataclass(frozen=True)
class Bench:
    """Settings of the measurements.

    Attributes:
      name: the backend; None where no kernel can run.
      heads, width, group: K, D, G.
      cache: bytes that a stacked state must exceed.
      most: bytes that a stacked state may have at most.
      steps, repeats: iterations of the loop, and how often the loop is run.
      until: the time after which no new rows are started.
    """

    name: Any
    heads: int
    width: int
    group: int
    cache: int
    most: int
    steps: int
    repeats: int
    until: float


def bench(args: Arguments) -> Bench:
    """The settings for this machine's device."""
    where, kind = devices.device()
    able = [name for name in ("gpu", "tpu") if dispatch.limits(name).runs_on(where, kind)]
    until = time.monotonic() + 60 * args.minutes
    if args.quick:
        interpreter = "gpu-interpret" if jax.__version_info__ >= (0, 11) else "tpu-interpret"
        return Bench(able[0] if able else interpreter, 2, 128, args.group, 0, 2**20, 2, 1, until)
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 8 * 2**30)
    return Bench(able[0] if able else None, 8, 128, args.group, 4 * 2**26, memory // 3, 64, args.repeats, until)


def allocated(on: Bench, capacity: int, dtype: str) -> int:
    """Slots of a state of so many tokens and the one that comes in, as the kernels take them: on a TPU in whole groups
    of rows."""
    multiple = tpu_limits.group_rows(dtype) if (on.name or "").startswith("tpu") else 1
    return -(-(capacity + 1) // multiple) * multiple


def late(on: Bench) -> bool:
    return time.monotonic() > on.until


# --- a step ---


def a_state(on: Bench, slots: int, rows: int, dtype: str, layers: int) -> tuple[Stored, Stored]:
    """Random keys and values [L, B, K, S, D], made on the device."""
    shape = layers, rows, on.heads, slots, on.width

    @jax.jit
    def make(key: jax.Array) -> Stored:
        one = lambda key: store_vectors(jax.random.normal(key, shape[1:]), zeros((1, on.width), dtype))
        return jax.lax.map(one, jax.random.split(key, layers))

    return make(jax.random.key(0)), make(jax.random.key(1))


def a_token(on: Bench, rows: int, dtype: str) -> tuple[jax.Array, tuple[Stored, Stored]]:
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    query = jnp.float32 if dtype == "float32" else jnp.bfloat16
    new = [store_vectors(draw(seed, rows, on.heads, 1, on.width), zeros((1, on.width), dtype)) for seed in (2, 3)]
    return draw(4, rows, on.heads, on.group, on.width).astype(query), (new[0], new[1])


def must_move(on: Bench, slots: int, rows: int, stored: Stored, layers: int) -> float:
    """Bytes that a step must move: keys and values of a layer, a row of each written, query, output, mass."""
    layer = 2 * sum(x.nbytes for x in jax.tree.leaves(stored)) / layers
    heads = rows * on.heads * on.group
    return layer * (1 + 1 / slots) + heads * (2 * 2 * on.width + 4 * slots)


def stepper(on: Bench, backend: Any, slots: int, rows: int, dtype: str, layers: int, steps: int) -> Callable[..., Any]:
    """A loop of decoding steps over the layers in turn. The state is donated and returned."""

    @partial(jax.jit, donate_argnums=0)
    def loop(stored: Any, q: jax.Array, new: Any) -> Any:
        visible = jnp.ones((rows, 1, 1, slots), bool)
        present = jnp.ones(rows, bool)

        def turn(i: Any, carry: Any) -> Any:
            q, stored, mass = carry
            index = jnp.full((rows, 1, 1), i % slots, jnp.int32)
            out, weights, stored = slot_step(q, new, stored, i % layers, index, visible, present, backend=backend)
            return (q + out * 1e-3).astype(q.dtype), stored, mass + weights.mean((1, 2))  # as a policy would

        q, stored, mass = jax.lax.fori_loop(0, steps, turn, (q, stored, jnp.zeros((rows, slots))))
        return stored, q, mass

    return loop


def sdpa(on: Bench, rows: int, layers: int, steps: int) -> Callable[..., Any]:
    """A loop of JAX's attention of one query over as many keys, in the layout that it requires."""

    @jax.jit
    def loop(stored: Any, q: jax.Array) -> Any:
        def turn(i: Any, q: jax.Array) -> jax.Array:
            k, v = (jax.lax.dynamic_index_in_dim(x, i % layers, keepdims=False) for x in stored)
            return (q + jax.nn.dot_product_attention(q, k, v) * 1e-3).astype(q.dtype)

        return jax.lax.fori_loop(0, steps, turn, q)

    return loop


def torch_sdpa(on: Bench, slots: int, rows: int, layers: int) -> float | None:
    """Seconds of PyTorch's attention by its own events; None without PyTorch or its GPU."""
    try:
        import torch  # pyright: ignore
    except ImportError:
        return None
    if not torch.cuda.is_available() or jax.default_backend() != "gpu":
        return None
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    q = make(rows, on.heads * on.group, 1, on.width)
    layers = max(1, min(layers, int(torch.cuda.mem_get_info()[0] // 2 // (4 * rows * on.heads * slots * on.width))))
    keys, values = (make(layers, rows, on.heads, slots, on.width) for _ in range(2))
    attend = partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)
    seconds = []
    for repeat in range(on.repeats + 1):
        begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for i in range(on.steps):
            attend(q, keys[i % layers], values[i % layers])
        done.record()
        torch.cuda.synchronize()
        if repeat:
            seconds.append(begun.elapsed_time(done) / 1e3 / on.steps)
    del keys, values
    torch.cuda.empty_cache()
    return statistics.median(seconds)


def in_turn(repeats: int, **runs: Callable[[], Any]) -> dict[str, float]:
    """Median seconds of each, run one after the other, again and again; the first round, which compiles, is not
    counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begun = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values) for name, values in seconds.items()}


def recorded(run: Callable[[], Any]) -> float | None:
    """Seconds that the driver records for a run's launches; None if it records none."""
    if jax.default_backend() != "gpu":
        return None
    try:
        from jax.experimental.mosaic.gpu import profiler

        milliseconds = profiler.measure(run)()[1]
    except Exception as error:  # another profiler, no permission, no such library: a convenience only
        print(f"(launches are not recorded: {str(error).splitlines()[0] if str(error) else error!r})", file=sys.stderr)
        return None
    return None if milliseconds is None else milliseconds / 1e3


def copying(on: Bench) -> float:
    """Bytes per second of copying: read and written."""
    x = jnp.zeros(2**16 if on.cache == 0 else min(2**29, on.most // 16), jnp.float32)

    @partial(jax.jit, donate_argnums=0)
    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 8, lambda i, x: x + 1, x)

    held = [x]

    def run() -> jax.Array:
        held[0] = loop(held[0])
        return held[0]

    return 8 * 2 * x.nbytes / in_turn(on.repeats, copy=run)["copy"]


def time_step(on: Bench, slots: int, rows: int, dtype: str, copy: float) -> dict[str, Any] | None:
    """A row of the table; None where no such state fits into memory."""
    one = sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(lambda: a_state(on, slots, rows, dtype, 1)))
    )
    layers = max(1, min(-(-on.cache // one), 1024))
    if layers * one > on.most:
        return None
    steps = max(on.steps, layers) if on.cache else on.steps
    stored, (q, new) = a_state(on, slots, rows, dtype, layers), a_token(on, rows, dtype)
    held = [stored]

    def stepping(backend: Any) -> Callable[[], Any]:
        loop = stepper(on, backend, slots, rows, dtype, layers, steps)

        def run() -> Any:
            held[0], *rest = loop(held[0], q, new)
            return rest

        return run

    runs: dict[str, Callable[[], Any]] = dict(jnp=stepping("jnp"))
    call = call_of(q[:, None], stored[0], 1)
    declined = "no kernel runs here" if on.name is None else dispatch.limits(on.name).declines("step", call)
    if declined is None:
        runs["kernel"] = stepping(on.name)
    seconds = in_turn(on.repeats, **runs)
    moved = must_move(on, slots, rows, stored[0], layers)
    row: dict[str, Any] = dict(slots=slots, rows=rows, dtype=dtype, state_mib=one / 2**20, layers=layers)
    for name, total in seconds.items():
        row[name] = total / steps
        row[f"{name}_of_copying"] = moved / (total / steps) / copy
    if declined is None:
        row["kernel_recorded"] = (lambda x: x and x / steps)(recorded(runs["kernel"]))
    else:
        row["declined"] = declined
    del runs
    if dtype == "bfloat16":
        flat = q.reshape(rows, 1, on.heads * on.group, on.width)
        keys = jax.tree.map(lambda x: x.swapaxes(2, 3), held[0])
        held.clear()
        attend = partial(sdpa(on, rows, layers, steps), keys, flat)
        row["sdpa"] = in_turn(on.repeats, sdpa=attend)["sdpa"] / steps
        del keys, attend
        row["torch_sdpa"] = torch_sdpa(on, slots, rows, layers)
    return row


# --- right? ---


def step_error(on: Bench, dtype: str) -> tuple[float, float]:
    """Largest error of output and mass of the kernel's step, against float64; over that of the jnp path, at least one
    rounding of the output."""
    rows, slots, layers = 3, allocated(on, 64, dtype), 2
    stored, (q, new) = a_state(on, slots, rows, dtype, layers), a_token(on, rows, dtype)
    index = jnp.array([3, 64, slots], jnp.int32)[:, None, None]
    visible = (jax.random.uniform(jax.random.key(5), (rows, 1, 1, slots)) < 0.8) | (jnp.arange(slots) == index[:, None])
    present = jnp.array([True, True, False])
    errors = []
    for backend in (on.name, "jnp"):
        step = jax.jit(partial(slot_step, backend=backend))
        out, mass, after = step(q, new, stored, jnp.int32(1), index, visible, present)
        keys, values = (np.asarray(load_vectors(jax.tree.map(lambda x: x[1], x)), np.float64) for x in after)
        scores = np.einsum("bkgd,bksd->bkgs", np.asarray(q, np.float64), keys) * on.width**-0.5
        scores = np.where(np.asarray(visible), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights *= np.asarray(present)[:, None, None, None] / weights.sum(-1, keepdims=True)
        expected = np.einsum("bkgs,bksd->bkgd", weights, values)
        error = lambda a, b: float(np.abs(np.asarray(a, np.float64) - b).max())
        errors.append((error(out, expected), error(mass, weights)))
        expected_row = load_vectors(jax.tree.map(lambda x: x[0, :, 0], new[0]))
        if not np.array_equal(np.asarray(keys[0, :, 3]), np.asarray(expected_row, np.float64)):
            return float("inf"), float("inf")
    ours, theirs = errors
    unit = 2**-7 if q.dtype == jnp.bfloat16 else 2**-20
    return ours[0] / max(theirs[0], unit), ours[1] / max(theirs[1], 2**-20)


def a_segment(on: Bench, policy: policies.Policy, slots: int, rows: int, tokens: int) -> tuple[Any, ...]:
    state = empty(
        layers=range(1), batch=rows, heads=on.heads, sets=on.heads, capacity=slots,
        slots=allocated(on, slots, "bfloat16"), head_dim=on.width, dtype="bfloat16",
    )  # fmt: skip
    state = with_numbers(state, jax.ShapeDtypeStruct((rows, on.heads, 1), jnp.float32), ())
    draw = lambda seed, heads: jax.random.normal(jax.random.key(seed), (rows, tokens, heads, on.width), jnp.bfloat16)
    positions = jnp.broadcast_to(jnp.arange(tokens), (rows, tokens))
    return draw(0, on.heads * on.group), draw(1, on.heads), draw(2, on.heads), positions, state


def reader(policy: policies.Policy, backend: Any, chunk: int) -> Callable[..., Any]:
    return jax.jit(lambda q, k, v, at, state: advance(q, k, v, at, state, 0, policy, chunk=chunk, backend=backend)[:3])


SEGMENT, BLOCK = policies.TOVA("kv_head"), policies.H2O(0.5, "kv_head")


def same_tokens(on: Bench, policy: policies.Policy, slots: int, tokens: int, chunk: int) -> tuple[float, float]:
    """Share of the tokens kept by the kernel that the jnp path keeps too, and the largest difference of outputs while
    both have kept the same tokens. In bfloat16, near ties may be decided either way."""
    args = a_segment(on, policy, slots, 2, tokens)
    (ours, state, freed), (theirs, then, freed_then) = (
        reader(policy, backend, chunk)(*args) for backend in (on.name, "jnp")
    )
    ours_held, theirs_held = (np.asarray(x.positions[0]) for x in (state, then))
    flat = lambda held: held.reshape(-1, held.shape[-1])
    pairs = zip(flat(ours_held), flat(theirs_held), strict=True)
    both = np.mean([len(np.intersect1d(a[a >= 0], b[b >= 0])) / max((b >= 0).sum(), 1) for a, b in pairs])
    differs = (np.asarray(freed) != np.asarray(freed_then)).any((1, 2, 3))
    until = int(np.argmax(differs)) * chunk if differs.any() else tokens
    gap = np.abs(np.asarray(ours, np.float32) - np.asarray(theirs, np.float32))[:, : until + 1]
    return float(both), float(gap.max())


# --- all of it ---

STEP_COLUMNS = dict(
    slots="slots",
    rows="rows",
    dtype="dtype",
    state_mib="MiB of a layer",
    kernel="kernel",
    kernel_of_copying="of copying",
    kernel_recorded="launches",
    jnp="jnp",
    jnp_of_copying="of copying",
    ratio="kernel / jnp",
    sdpa="jax.nn",
    torch_sdpa="torch",
)


def table(title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    if not rows:
        return
    print(f"\n{title}\n\n| {' | '.join(columns.values())} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(shown(name, row.get(name)) for name in columns)} |")
    sys.stdout.flush()


def shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if name.endswith(("of_copying", "ratio", "state_mib")):
        return f"{value:.3g}"
    return f"{value * 1e6:.1f}"


def main(args: Arguments) -> int:
    on = bench(args)
    slots, batches = args.slots, args.rows
    versions = {name: version(name) for name in ("jax", "jaxlib", "torch", "jaxcompress")}
    where, kind = devices.device()
    about = (
        dict(device=kind, platform=where, backend=on.name, python=platform.python_version(), quick=args.quick)
        | versions
    )
    about["date"] = time.strftime("%Y-%m-%d")
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    if args.quick:
        print("A quick run: it shows that this script works here. No number below means anything.")
    results: dict[str, Any] = dict(about=about, left_out=[])

    wrong = []
    if on.name is not None:
        for dtype in args.dtypes:
            out, mass = step_error(on, dtype)
            ok = out <= 4 and mass <= 4
            print(f"step, {dtype}: error / error of jnp (or of one rounding): output {out:.2f}, mass {mass:.2f}"
                  f" -> {'right' if ok else 'WRONG'}")  # fmt: skip
            wrong += [] if ok else [f"step {dtype}"]
        for op, policy, chunk in (("segment", SEGMENT, 1), ("block", BLOCK, 8)):
            why = declined(on, op, policy, 16)
            if why:
                print(f"{op}: declined, {why}")
                continue
            share, gap = same_tokens(on, policy, 16, 24 if args.quick else 256, chunk)
            ok = share > 0.9 and gap < 0.1
            print(
                f"{op}: keeps {share:.1%} of what jnp keeps, outputs within {gap:.3g} -> {'right' if ok else 'WRONG'}"
            )
            wrong += [] if ok else [op]
    else:
        print("no kernel can run on this device: jnp and JAX's own attention only")

    copy = copying(on)
    print(f"copying: {copy / 1e9:.0f} GB/s")
    results["copy_bytes_per_second"] = copy
    steps = []
    for dtype in args.dtypes:
        for c in slots:
            for b in batches:
                if f"step {dtype}" in wrong or late(on):
                    results["left_out"].append(f"step {dtype} {c} slots {b} rows")
                    continue
                row = time_step(on, allocated(on, c, dtype), b, dtype, copy)
                if row is None:
                    results["left_out"].append(f"step {dtype} {c} slots {b} rows: memory")
                    continue
                row["ratio"] = row["kernel"] / row["jnp"] if "kernel" in row else None
                steps.append(row)
    table("A decoding step, microseconds", steps, STEP_COLUMNS)
    results["step"] = steps

    for op, policy, chunk in (("segment", SEGMENT, 1), ("block", BLOCK, 0)):
        done = []
        for c in (16,) if args.quick else (64, 128, 256):
            for b in (1,) if args.quick else (1, 16):
                tokens = 24 if args.quick else 1024
                why = ""
                if op in wrong or late(on) or (why := declined(on, op, policy, c)):
                    results["left_out"].append(
                        f"{op} {c} slots {b} rows" + (f": {why}" if op not in wrong and not late(on) else "")
                    )
                    continue
                arrays = a_segment(on, policy, c, b, tokens)
                runs = {name: partial(reader(policy, backend, chunk or tokens), *arrays)
                        for name, backend in (("kernel", on.name), ("jnp", "jnp"))}  # fmt: skip
                seconds = {name: x / tokens for name, x in in_turn(min(on.repeats, 3), **runs).items()}
                done.append(dict(slots=c, rows=b, tokens=tokens, **seconds, ratio=seconds["kernel"] / seconds["jnp"]))
        table(f"A {op}, microseconds per token", done, dict(
            slots="slots", rows="rows", tokens="tokens", kernel="kernel", jnp="jnp", ratio="kernel / jnp"))  # fmt: skip
        results[op] = done

    if results["left_out"]:
        print(f"\nleft out: {'; '.join(results['left_out'])}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))
    if wrong:
        print(f"\nwrong, and not timed: {', '.join(wrong)}")
    return bool(wrong)


def declined(on: Bench, op: Any, policy: policies.Policy, slots: int) -> str | None:
    """Why the kernel declines a call; None if it does not."""
    if on.name is None:
        return "no kernel runs here"
    rule = policy.rule(slots)
    call = KernelCall(
        2, on.heads, on.group, allocated(on, slots, "bfloat16"), on.width, on.heads, 24, "bfloat16", "bfloat16", rule
    )
    return dispatch.limits(on.name).declines(op, call)


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    raise SystemExit(main(arguments(QUICK)))
