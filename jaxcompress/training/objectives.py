"""Objectives of the trainer for decoders.

Frozen models (teachers, weights below adapters) are passed to the compiled step by reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp

from jaxcompress.models.decoder import Decoder
from jaxcompress.models.init_state import Slots
from jaxcompress.policies.cache_view import Scope
from jaxcompress.policies.learned import Retention
from jaxcompress.policies.policy import Policy
from jaxcompress.recurrence.advance import Step
from jaxcompress.state.placement import Placement
from jaxcompress.training.data import Batch
from jaxcompress.training.distillation import distilled_value_and_grad
from jaxcompress.training.forget_heads import counted
from jaxcompress.training.lora import ALPHA, Adapter, add_lora, kernel_of, lora_changes
from jaxcompress.training.loss import check_weights, token_losses
from jaxcompress.training.recurrent import bounded_value_and_grad
from jaxcompress.training.retention_heads import retention_loss
from jaxcompress.training.trainer import Metrics, Objective


def causal() -> Objective:
    """Language modelling with plain causal attention over the whole row. The parameters are a `Decoder`."""

    def loss(model: Decoder, batch: Batch) -> jax.Array:
        check_weights(batch.weights, batch.tokens)
        losses = token_losses(model(batch.tokens[:, :-1]), batch.tokens[:, 1:])
        return (losses * batch.weights).sum() / jnp.maximum(batch.weights.sum(), 1e-9)

    def objective(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        return {"loss": value}, gradient

    return objective


def bounded(
    policy: Policy,
    slots: Slots,
    *,
    segment: int,
    bptt_segments: int | None = None,
    chunk: int = 1,
    placement: Placement | None = None,
) -> Objective:
    """Language modelling through a bounded state. The arguments are those of `bounded_value_and_grad`."""
    how: dict[str, Any] = dict(segment=segment, bptt_segments=bptt_segments, chunk=chunk, placement=placement)

    def objective(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
        value, gradient = bounded_value_and_grad(params, batch.tokens, policy, slots, weights=batch.weights, **how)
        return {"loss": value}, gradient

    return objective


class DistillationOptions(TypedDict, total=False):
    """Keywords of `distilled_value_and_grad`."""

    segment: Required[int]
    bptt_segments: int | None
    chunk: int
    placement: Placement | None
    recurrence: Step | None
    student: Callable[[Any], Decoder]
    teacher: Decoder | None
    language: float
    hidden: float
    temperature: float


def distilled(policy: Policy, slots: Slots, **how: Unpack[DistillationOptions]) -> Objective:
    """A student with a bounded state learns to predict what a teacher with the full cache predicts.

    Args:
      how: keywords of `distilled_value_and_grad`; `segment` must be given.
    """

    def objective(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
        return distilled_value_and_grad(params, batch.tokens, policy, slots, weights=batch.weights, **how)

    return objective


def joint_retention(
    model_objective: Callable[[Policy], Objective],
    *,
    scope: Scope = "kv_head",
    block: int = 64,
    horizon: float | None = 128.0,
    recent: int = 0,
    watched: int | None = None,
) -> Objective:
    """Trains a model and a retention head together.

    The model is trained by `model_objective(policy)`, where the policy uses the current head. The head is trained by
    `retention_loss` on the current model. No gradient flows between the two. The parameters are (model, head), with the
    head of `init_retention`.

    Args:
      model_objective: (policy) -> an objective of a decoder, such as
        `partial(distilled, slots=128, segment=256, teacher=before)`.
      scope, block, horizon, recent: see `retention_loss`.
      watched: how many rows of a batch the head is trained on; all if None. They take a forward pass of their own.
    """

    def objective(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
        model, head = params
        policy = Retention(jax.lax.stop_gradient(head), scope, recent)
        metrics, slope = model_objective(policy)(model, batch, step, key)
        tokens, valid = batch.tokens[:watched, :-1], counted(batch.weights)[:watched]
        how: dict[str, Any] = dict(scope=scope, valid=valid, block=block, horizon=horizon, recent=recent)
        watch = lambda head: retention_loss(model, tokens, head, **how)
        apart, change = jax.value_and_grad(watch)(head)
        return {**metrics, "retention": apart}, (slope, change)

    return objective


def adapted(objective: Objective, base: Decoder, *, alpha: float = ALPHA) -> Objective:
    """Turns an objective of a decoder into one of its adapters (see `jaxcompress.training.lora`), which are trained.

    Args:
      base: the frozen weights below the adapters. They may be the objective's teacher as well.
      alpha: as for `add_lora`.
    """

    def through(params: dict[str, Adapter], batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
        metrics, gradient = objective(add_lora(base, params, alpha=alpha), batch, step, key)
        return metrics, _slope(params, gradient, alpha)

    return through


def adapted_jointly(objective: Objective, base: Decoder, *, alpha: float = ALPHA) -> Objective:
    """Turns an objective of (decoder, network), such as `joint_retention`, into one of (adapters, network).

    Args:
      base, alpha: as for `adapted`.
    """

    def through(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
        adapters, network = params
        metrics, (gradient, change) = objective((add_lora(base, adapters, alpha=alpha), network), batch, step, key)
        return metrics, (_slope(adapters, gradient, alpha), change)

    return through


def _slope(adapters: dict[str, Adapter], gradient: Decoder, alpha: float) -> dict[str, Adapter]:
    """The gradient of adapters, from that of the model that they were added to."""
    changes, back = jax.vjp(lambda adapters: lora_changes(adapters, alpha=alpha), adapters)
    (slope,) = back({name: kernel_of(gradient, name).astype(x.dtype) for name, x in changes.items()})
    return slope
