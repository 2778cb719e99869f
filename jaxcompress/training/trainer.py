"""Training: one jitted step and one loop around it.

An `Objective` computes a loss and its gradient. It computes the gradient itself, because truncated backpropagation
through time takes gradients inside a scan. Optimizers are optax's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxcompress._extras import extra
from jaxcompress.distributed.rules import ShardingRules, placed
from jaxcompress.inputs.scalars import whole
from jaxcompress.models.int8 import check_float
from jaxcompress.training.checkpointing import Checkpoints
from jaxcompress.training.compiled import Compiled
from jaxcompress.training.data import Batch
from jaxcompress.training.metrics import Throughput

with extra("train"):
    import optax
    from tqdm import tqdm

Metrics = dict[str, Any]
"""Scalars by name."""

Objective = Callable[[Any, Batch, Any, Any], tuple[Metrics, Any]]
"""(params, batch, step, key) -> metrics, gradient. Pure; it is compiled with the step.

`metrics["loss"]` is the mean over the batch with `batch.weights` as weights (0 if they are all 0), and the gradient,
a pytree like `params`, is that of this mean: microbatches are then averaged by the sum of their weights, which gives
the mean over the whole batch. Other metrics are averaged in the same way. `step` is an int32 scalar, `key` a key of its
own for every step and microbatch.

An objective may close over frozen weights, such as a teacher's. They become arguments of the compiled step, not
constants of its program (see `jaxcompress.training.compiled`).
"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The complete state of a training run.

    Attributes:
      params: float32 master weights, any pytree; an NNX module is one.
      optimizer: state of the optimizer.
      step: int32, how many steps were taken.
      key: `jax.random.key_data` of the key of all randomness. It never changes; the step is folded in.
    """

    params: Any
    optimizer: Any
    step: Any
    key: Any


Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@runtime_checkable
class Resumable(Protocol):
    """An iterator of batches that can save and restore its position, as those of `grain` can."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...


def init_train_state(params: Any, optimizer: optax.GradientTransformation, *, seed: int = 0) -> TrainState:
    """The state before the first step. Weights are copied and converted to float32.

    Raises:
      ValueError: weights are held in int8.
    """
    check_float(params, "trained")
    params = jax.tree.map(jnp.copy, _cast(params, jnp.float32))
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), key)


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    compute_dtype: DTypeLike | None = None,
    sharding: ShardingRules | None = None,
) -> Compiled:
    """The compiled training step. It donates its input state: use the state that it returns.

    Besides the objective's metrics it returns `tokens` (the sum of weights), `gradient_norm`, before any clipping, and
    `parameter_norm`, after the update. If any weight is not finite, neither is `parameter_norm`.

    Args:
      accumulate: number of microbatches into which the batch is cut: of n, the first has rows 0, n, 2 n, ... They run
        one after the other, and their gradients are summed in float32. The number of rows must be a multiple of it, and
        with `sharding` the rows of a microbatch one of the devices that have rows of their own. The result is that of
        the whole batch, except for rounding, where the loss is a mean over tokens. It is not for `dms_loss` and
        `merging_loss`: each microbatch has noise of its own, and a penalty for its own share of tokens kept.
      compute_dtype: weights are cast to it before the objective sees them. Gradients are cast to float32 before they
        are summed or given to the optimizer. None: no cast.
      sharding: where rows, weights and the optimizer's state go and stay; give it a state that is there:
        `sharding.init(lambda: init_train_state(params, optimizer))`, or `init_train_state` of placed params for weights
        that are too large for one device.

    Raises:
      ValueError: `accumulate` is below 1.
    """
    whole(accumulate, "accumulate", least=1)

    def part(params: Any, batch: Any, state: TrainState, index: Any, total: jax.Array) -> tuple[Metrics, Any]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step), index)
        share = batch.weights.sum() / total
        done = objective(params, batch, state.step, key)
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) * share, done)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        batch = placed(batch, sharding)
        params = _cast(state.params, compute_dtype)
        tokens = jnp.maximum(batch.weights.sum(), 1e-9)
        if accumulate == 1:
            metrics, gradient = part(params, batch, state, 0, tokens)
        else:
            micro = jax.tree.map(partial(_cut, n=accumulate), batch)
            one = jax.tree.map(lambda x: x[0], micro)
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, params, one, state, 0, tokens))

            def add(done: Any, item: Any) -> tuple[Any, None]:
                rows = placed(item[0], sharding)
                return jax.tree.map(jnp.add, done, part(params, rows, state, item[1], tokens)), None

            (metrics, gradient), _ = jax.lax.scan(add, zeros, (micro, jnp.arange(accumulate)))
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        new: Any = optax.apply_updates(state.params, updates)
        metrics |= dict(tokens=tokens, gradient_norm=optax.tree.norm(gradient), parameter_norm=optax.tree.norm(new))
        after = replace(state, params=new, optimizer=optimizer_state, step=state.step + 1)
        return placed(after, sharding), metrics

    return Compiled(step, donate=True)


def _cast(tree: Any, dtype: DTypeLike | None) -> Any:
    """Casts floating-point leaves to `dtype`; casts nothing if `dtype` is None."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _cut(x: jax.Array, n: int) -> jax.Array:
    """Microbatches [n, rows, ...] whose rows lie as far apart as can be: each has rows of every device, which then stay
    there."""
    if x.shape[0] % n:
        raise ValueError(f"{x.shape[0]} rows cannot be cut into {n} microbatches: give a number that divides them")
    return x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)


def fit(  # nine parameters: the parts of every run, and the settings of logs and checkpoints
    state: TrainState,
    step: Step,
    data: Resumable,
    *,
    steps: int,
    checkpoints: Checkpoints | None = None,
    save_every: int = 100,
    log: Iterable[Callable[[int, Mapping[str, Any]], None]] = (),
    flops_per_token: float | None = None,
    bar: bool = True,
) -> TrainState:
    """Trains until `steps` steps are taken in total; returns the state.

    A state from a checkpoint continues its run if `data` continues too: on a CPU of the same kind, the steps are then
    bit by bit those of a run that was never stopped.

    The numbers of a step are read while the next step runs. Before a checkpoint is saved, all numbers up to it are
    checked and logged. So no checkpoint has weights that are not finite, and a log is never behind a checkpoint.

    Args:
      state: donated; it must not be used afterwards.
      step: from `make_step`.
      data: an iterator; its items are the second argument of `step`.
      steps: total number of steps, including those in `state.step`.
      checkpoints: where the state is saved, every `save_every` steps and at the end, in the background.
      log: functions, each called with the step (from 1) and its numbers: the step's metrics as floats,
        `tokens_per_second` and `mfu`, None where not known.
      flops_per_token: for `mfu`; see `jaxcompress.training.metrics.flops_per_token`.
      bar: show progress on standard error where that is a terminal.

    Raises:
      FloatingPointError: loss, gradient or weights are not finite; names the step. Nothing of that step is saved.
      SaveFailed: a checkpoint could not be written.
      ValueError: the data ended before the steps; a checkpoint has the steps that were taken. `save_every` is below 1.
    """
    whole(save_every, "save_every", least=1)
    done = taken = int(state.step)
    throughput = Throughput(flops_per_token, devices=len(state.step.sharding.device_set))
    pending: tuple[int, Metrics, int] | None = None
    progress = tqdm(total=steps, initial=done, unit="step", disable=not (bar and sys.stderr.isatty()))

    def settle() -> None:
        """Waits for the last step, checks it and logs it."""
        nonlocal pending
        if pending is None:
            return
        number, metrics, tokens = pending
        pending = None
        numbers: dict[str, Any] = {name: float(value) for name, value in jax.device_get(metrics).items()}
        _check_finite(number, numbers, checkpoints)
        numbers |= throughput(tokens)
        for sink in log:
            sink(number, numbers)
        progress.update()
        progress.set_postfix_str(_summary(numbers))

    try:
        while taken < steps and (batch := next(data, None)) is not None:
            state, metrics = step(state, batch)
            settle()
            taken += 1
            pending = taken, metrics, _tokens(batch)
            if checkpoints is not None and (taken % save_every == 0 or taken == steps):
                settle()
                checkpoints.save(taken, state, data.get_state())
        settle()
        if checkpoints is not None:
            if done < taken < steps and taken % save_every:
                checkpoints.save(taken, state, data.get_state())
            checkpoints.wait()
    finally:
        progress.close()
    if taken < steps:
        raise ValueError(f"the data ended after {taken} of {steps} steps; repeat it or ask for fewer")
    return state


def make_measure(
    objective: Objective,
    *,
    compute_dtype: DTypeLike | None = None,
    step: int = 0,
    seed: int = 0,
    sharding: ShardingRules | None = None,
) -> Callable[[Any, Iterable[Batch]], dict[str, float]]:
    """A function of weights and batches of one shape: the mean metrics, weighted by token. Nothing is trained.

    Without batches, or if no token counts, there are no metrics. With `sharding`, rows of a batch are spread so.

    Args:
      step: for objectives with a schedule: the metrics are those of this step.
    """

    def metrics_of(params: Any, batch: Any, key: jax.Array) -> Metrics:
        return objective(_cast(params, compute_dtype), placed(batch, sharding), jnp.asarray(step, jnp.int32), key)[0]

    compiled = Compiled(metrics_of)  # the unused gradient is not computed

    def measure(params: Any, batches: Iterable[Batch]) -> dict[str, float]:
        totals: dict[str, float] = {}
        tokens = 0.0
        for batch in batches:
            weight = float(np.sum(batch.weights, dtype=np.float64))
            for name, value in compiled(params, batch, jax.random.key(seed)).items():
                totals[name] = totals.get(name, 0.0) + weight * float(value)
            tokens += weight
        return {name: total / tokens for name, total in totals.items()} if tokens else {}

    return measure


def make_evaluate(
    objective: Objective, *, compute_dtype: DTypeLike | None = None, seed: int = 0
) -> Callable[[Any, Iterable[Batch]], float]:
    """As `make_measure`, but returns the loss alone; NaN where there is none."""
    loss = lambda *given: ({"loss": objective(*given)[0]["loss"]}, None)  # only the loss is computed
    measure = make_measure(loss, compute_dtype=compute_dtype, seed=seed)
    return lambda params, batches: measure(params, batches).get("loss", math.nan)


def _tokens(batch: Any) -> int:
    """How many tokens a step reads: all weights count, including those of padding."""
    return int(np.size(batch.weights)) if isinstance(batch, Batch) else 0


def _check_finite(number: int, numbers: Mapping[str, float], checkpoints: Checkpoints | None) -> None:
    told = {name: numbers[name] for name in ("loss", "gradient_norm", "parameter_norm")}
    if all(map(math.isfinite, told.values())):
        return
    kept = ""
    if checkpoints is not None:
        checkpoints.wait()
        last = checkpoints.latest
        kept = (
            "; there is no checkpoint yet"
            if last is None
            else f"; the last good checkpoint is {checkpoints.folder / str(last)}"
        )
    what = ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in told.items())
    raise FloatingPointError(f"step {number} is not finite: {what}{kept}. A lower learning rate may help")


def _summary(numbers: Mapping[str, Any]) -> str:
    parts = [f"loss {numbers['loss']:.4f}"]
    if numbers["tokens_per_second"] is not None:
        parts.append(f"{numbers['tokens_per_second']:,.0f} tok/s")
    if numbers["mfu"] is not None:
        parts.append(f"MFU {numbers['mfu']:.1%}")
    return ", ".join(parts)
