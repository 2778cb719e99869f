"""The command `train`: from flags to a finished run."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from jaxcompress.cli.mesh import is_first
from jaxcompress.cli.runtime import chosen_policy, open_weights, tell, write_json
from jaxcompress.cli.train.arguments import TrainFlags
from jaxcompress.cli.train.data import packed_rows
from jaxcompress.cli.train.record import recorded_settings, unchanged
from jaxcompress.cli.train.saving import save_trained
from jaxcompress.cli.train.task import Task, task_of

if TYPE_CHECKING:
    from jaxcompress.checkpoints import Loaded
    from jaxcompress.distributed import ShardingRules
    from jaxcompress.training.checkpointing import Checkpoints
    from jaxcompress.training.data import PackedRows
    from jaxcompress.training.trainer import TrainState

HEAD_RATE = 10
"""A network that starts from nothing learns so many times faster than the model that is trained with it."""

FAR = 1.5
"""A share kept of so many times what --ratio allows is told."""

TOLD_EVERY = 30
"""Seconds between two lines of a run."""

Sink = Callable[[int, Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Train(TrainFlags):
    """Trains a model further on text, through a state of so many slots or with plain attention (policy full).

    Writes into --out: checkpoints/, metrics.jsonl, run.json (the settings) and, at the end, model/, a folder in Hugging
    Face's format with the policy in it. The last rows of the data are held out, and their loss is told before and after
    training. A policy learned together with the model: dmc. Learned beside a model that stays as it is: dms, dms-pool,
    and, unless --distill is given, retention, retention-layer, retention-pool.

    A run that was stopped, even by kill -9, continues with `jaxcompress train --out runs/x --resume`, and ends as one
    that was not stopped. With more --steps a finished run continues too. Flags win over --config, which wins over the
    run.

    Example: jaxcompress train --data books/ --policy tova --slots 128 --steps 200 --out runs/books
    """

    def run(self) -> None:
        self.check()
        rules = self.rules()
        from jaxcompress.generation.text import Tokenizer
        from jaxcompress.training.data import read_documents

        # A wrong --tokenizer or --data is told before the model is loaded.
        tokenizer = Tokenizer(self.tokenizer) if self.tokenizer else None
        documents = read_documents(self.data, field=self.field, split=self.split)
        loaded = open_weights(self.model, "float32", rules)
        if rules is not None:
            rules.check(loaded.config, batch=self.rows // self.accumulate)
        from jaxcompress.checkpoints import config_dtype
        from jaxcompress.evaluation.policy_hash import policy_settings
        from jaxcompress.models.checks import warn_of_positions
        from jaxcompress.models.fingerprint import fingerprint
        from jaxcompress.pallas_kernels.devices import device
        from jaxcompress.policies.names import get_policy
        from jaxcompress.training.checkpointing import Checkpoints
        from jaxcompress.training.policy_objectives import TRAINABLE

        tokenizer = tokenizer or loaded.tokenizer
        dtype = self.compute_dtype or ("float32" if device()[0] == "cpu" else "bfloat16")
        policy = None
        if self.policy != "full" and self.policy not in TRAINABLE:
            policy = chosen_policy(self.policy, loaded.model, loaded.folder)
        task = task_of(self, loaded.model, policy, dtype, loaded.saved_policy)
        rows = packed_rows(documents, tokenizer, loaded.config.vocab_size, self.length)
        del documents  # the rows have the tokens
        stored = config_dtype(loaded.settings) or "float32"
        made = dict(base=fingerprint(loaded.model)) | (policy_settings(self.policy, policy) if policy else {})
        flops = self._flops(loaded)
        with Checkpoints(self.out / "checkpoints", keep=self.keep) as checkpoints:
            run = _Run(self, task, rows, dtype, made, checkpoints, rules)
            # What is learned reads its rows with plain attention.
            warn_of_positions(loaded.config, policy or get_policy("full"), self.placement, self.length)
            task = task._replace(params=None)  # the state has its own copy
            del loaded
            run.train(flops)
        run.tell_after()
        if run.record.get("saved") != self.steps or not (self.out / "model").exists():
            save_trained(self, task, run.state.params, self.out / "model", stored, tokenizer.folder)
            _record(run.record | dict(saved=self.steps), self.out / "run.json")
        print(f"saved in {self.out / 'model'}; try: {self.tried}")

    @property
    def tried(self) -> str:
        """The command that reads as the model was trained."""
        reading: list[str] = []
        if self.policy != "full":
            policy = self.policy if ":" in self.policy else "learned"  # a checkpoint runs no code
            reading = ["--policy", policy, "--slots", *map(str, self.slots)]
            for name in ("placement", "chunk"):
                if (value := getattr(self, name)) is not None:
                    reading += [f"--{name}", str(value)]
            reading += ["--mode", self.mode] if self.mode != "streaming" else []
        return shlex.join(["jaxcompress", "generate", "--model", str(self.out / "model"), *reading]) + " --prompt ..."

    def _flops(self, loaded: Loaded) -> float:
        """Operations per token of a step. Those of a teacher do not count."""
        from jaxcompress.training.metrics import flops_per_token, mean_attended
        from jaxcompress.training.policy_objectives import TRAINABLE

        plain = self.policy == "full" or (self.policy in TRAINABLE and not self.distill)
        slots = None if plain else round(sum(self.slots) / len(self.slots))
        both_ways = flops_per_token(loaded.model, mean_attended(self.length, slots))
        only_forward = self.policy.startswith("retention") and not self.distill
        return both_ways / 3 if only_forward else both_ways


class _Run:
    """A run that has begun or continues.

    Attributes:
      state: of training.
      record: what run.json says.
    """

    def __init__(
        self, how: Train, task: Task, rows: PackedRows, dtype: str, made: Mapping[str, str],
        checkpoints: Checkpoints, rules: ShardingRules | None,
    ):  # fmt: skip
        import jax

        from jaxcompress.training.data import batches, split
        from jaxcompress.training.trainer import init_train_state, make_measure, make_step

        self._how, self._told, self._checkpoints = how, task.told, checkpoints
        self._parts = split(rows, batch=how.rows, held_out=how.held_out, held_out_batch=how.rows // how.accumulate)
        self._data = batches(rows, batch=how.rows, seed=how.seed, train=self._parts.train)
        self._schedule, optimizer = _optimizer(how)
        self._step = make_step(
            task.objective, optimizer, accumulate=how.accumulate, compute_dtype=dtype, sharding=rules
        )
        last = how.steps - 1  # where schedules end: before and after are then told of the same decisions
        self._measure = make_measure(task.measured, compute_dtype=dtype, step=last, sharding=rules)
        facts = dict(tokens=len(rows.stream.tokens), checksum=rows.stream.checksum)
        begin = partial(init_train_state, task.params, optimizer, seed=how.seed)
        file, self._done = how.out / "run.json", checkpoints.latest or 0
        self.record: dict[str, Any]
        self.state: TrainState
        if self._done:
            self.state, where = checkpoints.restore(jax.eval_shape(begin) if rules is None else rules.abstract(begin))
            self.record = unchanged(how, file, facts, made, self._done)
            self._data.set_state(where)
            print(f"continuing from step {self._done}", flush=True)
        else:
            if how.resume:
                print(f"there is no {'checkpoint' if file.exists() else 'run'} in {how.out} yet: it begins")
            self.record = dict(data=facts, held_out=self._measure(task.params, self._parts.held_out))
            self.state = begin() if rules is None else _spread(rules, task.params, optimizer, how.seed)
        # What a device computes in is a part of the run, and the default of the next call, wherever that runs.
        self.record |= dict(settings=recorded_settings(how) | dict(compute_dtype=dtype), **made)
        _record(self.record, file)
        print(f"{facts['tokens']:,} tokens, {self._parts.train:,} rows to train on; see {how.out / 'metrics.jsonl'}")

    def train(self, flops: float) -> None:
        """Takes the steps that are left."""
        from jaxcompress.training.metrics import MetricsFile
        from jaxcompress.training.trainer import fit

        how = self._how
        if self._done < how.steps:
            print(self._rates(), flush=True)
        for metric, (name, unit) in self._told.items():
            if metric in self._before:
                print(f"held-out {name} before: {self._before[metric]:.4f} ({unit})", flush=True)
        with ExitStack() as opened:
            sinks: list[Sink] = []
            if is_first():
                sinks.append(opened.enter_context(MetricsFile(how.out / "metrics.jsonl", after=self._done)))
                sinks.extend([_tensorboard(how.out, self._done)] if how.tensorboard else [])
                sinks.append(_teller(self._done, how.steps))
            self.state = fit(
                self.state, self._step, self._data, steps=how.steps, checkpoints=self._checkpoints,
                save_every=how.save_every, log=[_with_rate(self._schedule, sink) for sink in sinks],
                flops_per_token=flops,
            )  # fmt: skip

    def tell_after(self) -> None:
        """Tells the metrics of held-out rows after training, and how they changed."""
        before, after = self._before, self._measure(self.state.params, self._parts.held_out)
        for metric, (name, unit) in self._told.items():
            if metric in after:
                moved = f"{after[metric] - before[metric]:+.4f}, " if metric in before else ""
                print(f"held-out {name} after {self._how.steps} steps: {after[metric]:.4f} ({moved}{unit})", flush=True)
        allowed = 1 / self._how.ratio
        if after.get("kept", 0.0) > FAR * allowed and is_first():
            tell(
                f"the share kept is {after['kept']:.2f}, far above the {allowed:.2f} of --ratio {self._how.ratio:g}: "
                "the network has not learned to let go; give more --steps or a higher --learning-rate"
            )

    @property
    def _before(self) -> dict[str, float]:
        return self.record.get("held_out", {})

    def _rates(self) -> str:
        """The learning rate from here to the end, in words."""
        from jaxcompress.training.optimizer import warmup_within

        how = self._how
        warm = warmup_within(how.warmup, how.steps)
        short = "" if warm == how.warmup else f" (--warmup {how.warmup} does not fit into {how.steps} steps)"
        course = f"to {how.rate:g} in {warm} steps{short}, then {how.schedule} to step {how.steps}"
        course += f", {HEAD_RATE} times that for the network" if how.network_and_model else ""
        return f"learning rate: {course}; {float(self._schedule(self._done)):.3g} at step {self._done + 1}"


def _spread(rules: ShardingRules, params: Any, optimizer: Any, seed: int) -> TrainState:
    """The first state of a run, each device having its part."""
    import jax

    from jaxcompress.training.trainer import init_train_state

    begin = lambda params: init_train_state(params, optimizer, seed=seed)
    return jax.jit(begin, out_shardings=rules.shardings(jax.eval_shape(begin, params)))(params)


def _record(record: Mapping[str, Any], file: Path) -> None:
    """run.json, written by one process."""
    if is_first():
        write_json(record, file)


def _optimizer(how: Train) -> tuple[Callable[[int], Any], Any]:
    """The learning rate by step, and the optimizer."""
    from jaxcompress._extras import extra
    from jaxcompress.training.optimizer import OPTIMIZERS, SCHEDULES

    with extra("train"):
        import optax
    of_rate = lambda rate: SCHEDULES[how.schedule](rate, how.steps, warmup=how.warmup)
    schedule = of_rate(how.rate)
    optimizer = OPTIMIZERS[how.optimizer](schedule, clip=how.clip, weight_decay=how.weight_decay)
    if how.network_and_model:
        head = OPTIMIZERS["adamw"](of_rate(HEAD_RATE * how.rate), clip=how.clip, weight_decay=0.0)
        optimizer = optax.partition({"model": optimizer, "head": head}, ("model", "head"))
    return schedule, optimizer


def _with_rate(schedule: Callable[[int], Any], sink: Sink) -> Sink:
    """The same sink, told the learning rate of each step too."""
    return lambda step, numbers: sink(step, {**numbers, "learning_rate": float(schedule(step - 1))})


def _teller(done: int, steps: int) -> Sink:
    """Tells every half a minute how far the run is."""
    begun = last = perf_counter()

    def sink(step: int, numbers: Mapping[str, Any]) -> None:
        nonlocal last
        now = perf_counter()
        if now - last >= TOLD_EVERY:
            left = (now - begun) / (step - done) * (steps - step)
            tell(f"step {step} of {steps}: loss {numbers['loss']:.4f}, {left:,.0f} s left")
            last = now

    return sink


def _tensorboard(out: Path, done: int) -> Sink:
    """Raises ImportError if a package is missing."""
    from jaxcompress.training.metrics import tensorboard

    return tensorboard(out / "tensorboard", after=done)
