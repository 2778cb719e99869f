"""What fits on chips that are not here, and how fast it could be at most: Llama 3 through a bounded state.

    python experiments/plan.py --out plan.jsonl
    python experiments/plan.py --out plan.jsonl --table experiments/results/plan.md

Nothing is allocated or executed. Bytes are those of the library's own weights, states and optimizers, as shapes with
their shardings. What chips send each other is read from the program of the step, compiled for as many virtual devices
of a CPU, which sends float32 where accelerators send bfloat16. The speed is a roofline: the slowest of reading weights
and state from memory once per step, multiplying at the peak rate, and sending, which is not planned for training.
Latencies, launches and what a kernel does not reach are left out: a step is slower than this, not faster. Where sending
is the slowest, that does not hold (the table has ~ there): activations are counted with up to twice their bytes, so a
step may be up to twice as fast. Sums of scores are float32 on accelerators too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from command import arguments, stop
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from paper_tables import OfTable, Plan, markdown, of_experiment, run
from sharded_step import LLAMA, decode_step, model_shapes, shape_of, state_shapes

from jaxcompress._extras import extra
from jaxcompress.distributed import Collective, ShardingRules, collectives, make_mesh
from jaxcompress.distributed.mesh import AXES
from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder, read
from jaxcompress.models.init_state import init_state
from jaxcompress.policies import Policy, get_policy
from jaxcompress.training.loss import token_losses
from jaxcompress.training.metrics import flops_per_token, mean_attended
from jaxcompress.training.recurrent import exact_gradient
from jaxcompress.training.trainer import init_train_state

with extra("train"):
    import optax

GB = 1e9
USED = 0.9
"""The part of a chip's memory that is planned with; the rest is for the compiler's own."""
SEGMENT = 512
"""Tokens of a segment in training; the gradient goes back over one."""


class Chip(NamedTuple):
    """Published peaks of one chip: bytes of memory, bytes/s from it, FLOP/s in bfloat16, bytes/s to others, one way.

    v5e: Google Cloud, "TPU v5e" (400 GB/s both ways together). H100 SXM: NVIDIA, "H100 Tensor Core GPU" data sheet
    (1,979 TFLOP/s with sparsity, half without; NVLink 900 GB/s both ways together).
    """

    memory: float
    bandwidth: float
    flops: float
    links: float


V5E = Chip(16 * GB, 819 * GB, 197e12, 200 * GB)
H100 = Chip(80 * GB, 3350 * GB, 989e12, 450 * GB)


class Machine(NamedTuple):
    """Chips and the meshes over them, in the order in which they are tried: weights take at most half of what there
    is, or the last mesh counts."""

    chip: Chip
    decode: tuple[str, ...]
    train: tuple[str, ...]


MACHINES = {
    "v5e-8": Machine(V5E, ("tensor=8",), ("fsdp=8",)),
    "v5e-64": Machine(V5E, ("data=8,tensor=8", "fsdp=8,tensor=8"), ("fsdp=64",)),
    "1 H100": Machine(H100, ("data=1",), ("data=1",)),
    "8 H100": Machine(H100, ("tensor=8",), ("fsdp=8",)),
}


@dataclass(frozen=True, kw_only=True)
class Arguments(OfTable):
    """Prints a line per plan, and the tables."""

    models: tuple[str, ...] = tuple(LLAMA)
    machines: tuple[str, ...] = tuple(MACHINES)
    contexts: tuple[int, ...] = (131_072, 1_048_576)
    slots: tuple[int, ...] = (1024, 4096)
    """Fixed sizes of the state, beside the full cache and 1/8 of it."""


QUICK = Arguments(quick=True, models=("Llama 3 8B",), machines=("1 H100",), contexts=(131_072,), slots=(1024,))


def plan(args: Arguments) -> Plan:
    for flag, given, known in (("--models", args.models, LLAMA), ("--machines", args.machines, MACHINES)):
        if unknown := [name for name in given if name not in known]:
            stop(f"unknown name {unknown[0]!r} in {flag}; known: {', '.join(known)}")

    def cells() -> Iterator[Cell]:
        # A fixed state is the same for every context.
        fixed = [("tova", slots, max(args.contexts)) for slots in args.slots]
        of_context = [(("full", n, n), ("tova", n // 8, n)) for n in args.contexts]
        for task, states in (("decode", [*(one for both in of_context for one in both), *fixed]), ("train", fixed)):
            for model in args.models:
                for machine in args.machines:
                    for policy, slots, context in states:
                        yield cell(task, model, machine, policy, slots, context)

    return cells(), measure


def cell(task: str, model: str, machine: str, policy: str, slots: int, context: int) -> Cell:
    config = str(LLAMA[model])
    return Cell(
        experiment="plan", task=task, model=model, model_hash=f"shapes of {config}", policy=policy, slots=slots,
        context=context, dtype="bfloat16", settings=dict(machine=machine, used=USED, segment=SEGMENT),
    )  # fmt: skip


def measure(cell: Cell) -> Iterable[Figure]:
    machine, kind = MACHINES[cell.settings["machine"]], Training if cell.task == "train" else Decoding
    work = kind(LLAMA[cell.model], get_policy(cell.policy), int(str(cell.slots)), cell.context)
    chip, room = machine.chip, USED * machine.chip.memory
    tried = []
    for mesh in machine.train if kind is Training else machine.decode:
        rules = ShardingRules(AbstractMesh(shape_of(mesh), AXES, axis_types=(AxisType.Auto,) * 3))
        tried.append((mesh, rules, *work.held(rules)))
        if tried[-1][2] < room / 2:  # with more there is little room for rows
            break
    mesh, rules, fixed, row = tried[-1]
    ways, chips = rules.ways("batch"), math.prod(shape_of(mesh))
    rows = max(0, int((room - fixed) // row)) * ways
    told: dict[str, Any] = dict(mesh=mesh, fixed=fixed, row=row)
    speed = 0.0
    if rows:
        found = work.exchanges(ShardingRules(make_mesh(mesh)), rows) if chips > 1 else ()
        seconds = dict(
            memory=work.read_bytes(fixed, row * rows // ways) / chip.bandwidth,
            compute=work.flops(rows) / chips / chip.flops,
            links=sum(wire_bytes(one, chips) for one in found) / chip.links,
        )
        bound = max(seconds, key=lambda name: seconds[name])
        speed = work.tokens(rows) / seconds[bound]
        told |= dict(seconds=seconds, bound=bound, sent=[one._asdict() for one in found])
    yield Figure(
        metric="tokens per second at most", value=speed, tokens=work.tokens(max(rows, 1)), samples=rows,
        state_bytes=row, details=told,
    )  # fmt: skip


def wire_bytes(one: Collective, chips: int) -> float:
    """Bytes that a chip sends in one step, by the usual ring algorithms over at most so many chips."""
    apart = (chips - 1) / chips
    by_kind = {"all-reduce": 2 * apart, "reduce-scatter": chips - 1, "collective-permute": 1}
    return one.times * one.nbytes * by_kind.get(one.kind, apart)


@dataclass(frozen=True)
class Decoding:
    """A step of decoding, at a full state."""

    config: DecoderConfig
    policy: Policy
    slots: int
    context: int

    def held(self, rules: ShardingRules) -> tuple[int, int]:
        """Bytes on a chip: of the weights, and of one row of the state for each part that rows are cut into."""
        model = model_shapes(rules, self.config)
        state = state_shapes(rules, model, self.policy, self.slots, rules.ways("batch"))
        return rules.bytes_per_device(model), rules.bytes_per_device(state.arrays)

    def exchanges(self, rules: ShardingRules, rows: int) -> tuple[Collective, ...]:
        model = model_shapes(rules, self.config)
        state = state_shapes(rules, model, self.policy, self.slots, rows)
        return collectives(decode_step(model, state, self.policy).lower().compile())

    def read_bytes(self, fixed: int, rows: int) -> int:
        """What a step reads: everything that is held, once (the embedding too)."""
        return fixed + rows

    def flops(self, rows: int) -> float:
        model = jax.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0)))
        return rows * flops_per_token(model, self.slots) / 3  # a third of training's: no backward pass

    def tokens(self, rows: int) -> int:
        return rows


@dataclass(frozen=True)
class Training(Decoding):
    """A step of training through the state over whole rows, the gradient going back over one segment."""

    def held(self, rules: ShardingRules) -> tuple[int, int]:
        """Bytes on a chip: of weights, optimizer and gradients, and what each row adds: states and activations."""
        model = model_shapes(rules, self.config, "float32")
        state = jax.eval_shape(lambda model: init_train_state(model, optax.adamw(1e-4)), model)
        narrow = model_shapes(rules, self.config)
        # `through_time` holds the sum of gradients and that of one window; the step casts the weights.
        fixed = rules.bytes_per_device(state) + 2 * rules.bytes_per_device(model) + rules.bytes_per_device(narrow)
        ways = rules.ways("batch")
        kv = jax.eval_shape(lambda: init_state(self.config, self.policy, self.slots, batch=ways, dtype="bfloat16"))
        activations = self.residuals(2) - self.residuals(1)
        return fixed, 2 * rules.bytes_per_device(kv) + activations

    def residuals(self, rows: int) -> int:
        """Bytes that one segment keeps for its gradient; what does not depend on the rows is weights."""
        model = jax.eval_shape(lambda: Decoder(self.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        tokens = jax.ShapeDtypeStruct((rows, SEGMENT), jnp.int32)
        recurrence = exact_gradient(self.policy)

        def kept(model: Decoder, tokens: Any) -> Any:
            state = init_state(self.config, self.policy, self.slots, batch=rows, dtype="bfloat16")

            def loss(model: Decoder) -> Any:
                done = read(model, tokens, state, self.policy, chunk=1, recurrence=recurrence)
                return token_losses(model.logits(done.hidden), tokens).sum()

            return jax.vjp(loss, model)[1]

        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(kept, model, tokens)))

    def exchanges(self, rules: ShardingRules, rows: int) -> tuple[Collective, ...]:
        """Not planned: a CPU's compiler adds up whole gradients where accelerators scatter the sums."""
        return ()

    def read_bytes(self, fixed: int, rows: int) -> int:
        """The weights of all layers for each segment, forward and backward, and the states in and out."""
        model = jax.eval_shape(lambda: Decoder(self.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))
        return self.context // SEGMENT * 2 * (weights + rows)

    def flops(self, rows: int) -> float:
        model = jax.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0)))
        return self.tokens(rows) * flops_per_token(model, mean_attended(self.context, self.slots))

    def tokens(self, rows: int) -> int:
        return rows * self.context


def table(rows: Sequence[Row]) -> list[str]:
    """Decoding, training, and what chips send in a decoding step."""
    found = of_experiment(rows, "plan")
    head = ["model", "chips", "state", "mesh", "GB of weights per chip", "GB of a row per chip", "rows",
            "tokens/s at most", "bound by"]  # fmt: skip
    lines = ["## Decoding", "", *markdown(head, (entry(row) for row in found if row.cell.task == "decode"))]
    head[4] = "GB of weights, optimizer and gradients per chip"
    lines += ["", "## Training through the state", ""]
    lines += markdown(head, (entry(row) for row in found if row.cell.task == "train"))
    lines += ["", "## What a chip exchanges in a decoding step", ""]
    sent = ["model", "chips", "state", "rows", "exchanges (times, kind, shapes)", "MB of results"]
    return lines + markdown(sent, (exchanged(row) for row in found if row.figure.details.get("sent")))


def entry(row: Row) -> list[str]:
    said, speed = row.figure.details, row.figure.value
    name = f"full, {row.cell.slots:,}" if row.cell.policy == "full" else f"{row.cell.slots:,} slots"
    about = "~" if speed and said["bound"] == "links" else ""  # no bound: a CPU sends activations as float32
    rest = [f"{about}{speed:,.0f}", said["bound"]] if speed else ["does not fit", ""]
    return [row.cell.model, row.cell.settings["machine"], name, said["mesh"], f"{said['fixed'] / GB:,.2f}",
            f"{said['row'] / GB:,.3f}", f"{row.figure.samples:,}", *rest]  # fmt: skip


def exchanged(row: Row) -> list[str]:
    total: dict[str, int] = {}
    for one in row.figure.details["sent"]:
        shapes = " ".join(str(list(shape)) for shape in one["shapes"])
        total[f"{one['kind']} of {shapes}"] = total.get(f"{one['kind']} of {shapes}", 0) + one["times"]
    size = sum(one["times"] * one["nbytes"] for one in row.figure.details["sent"]) / 1e6
    name = f"{row.cell.policy}, {row.cell.slots:,}" + (", training" if row.cell.task == "train" else "")
    listed = "; ".join(f"{times} x {what}" for what, times in total.items())
    return [row.cell.model, row.cell.settings["machine"], name, str(row.figure.samples), listed, f"{size:,.1f}"]


def line(row: Row) -> str:
    return f"{row.cell.task}: " + ", ".join(filter(None, entry(row)))


def main(args: Arguments) -> None:
    if not args.quick:
        jax.config.update("jax_num_cpu_devices", max(math.prod(shape_of(one.decode[0])) for one in MACHINES.values()))
    run(args, lambda: plan(args), table, line, experiment="plan", apart=("model", "context", "machine"))


if __name__ == "__main__":
    main(arguments(QUICK))
