"""Learned policies as objectives of the trainer: the trained parameters, the loss, and the resulting policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast, get_args

import jax
from jaxtyping import Array

from jaxcompress.inputs.scalars import whole
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.cache_view import Scope
from jaxcompress.policies.forget_head import ForgetHead, check_head
from jaxcompress.policies.policy import Policy
from jaxcompress.policies.registry import learned_policy
from jaxcompress.training.data import Batch
from jaxcompress.training.delayed_eviction import dms_loss, init_dms, share_schedule, temperature_schedule
from jaxcompress.training.forget_heads import counted
from jaxcompress.training.merging import init_gates, merging_loss
from jaxcompress.training.objectives import joint_retention
from jaxcompress.training.retention_heads import check_horizon, init_retention, retention_loss
from jaxcompress.training.trainer import Metrics, Objective

TRAINABLE = ("retention", "retention-layer", "retention-pool", "dms", "dms-pool", "dmc")
"""Names for `policy_objective`: a kind and, after a dash, the scope if it is not per kv head."""

FINAL_TEMPERATURE = 0.1
"""The last temperature of the decisions of `dms` and `dmc`."""

_LARGEST_BLOCK = 61  # tokens between two block ends of a retention head


class PolicyObjective(NamedTuple):
    """How a policy is trained.

    Attributes:
      kind, settings: for `jaxcompress.policies.learned_policy`.
      params: the trained parameters.
      objective: for `make_step`.
      parts: (trained params) -> the model, and the policy's own weights.
    """

    kind: str
    settings: dict[str, Any]
    params: Any
    objective: Objective
    parts: Callable[[Any], tuple[Decoder, ForgetHead]]


def policy_objective(  # twelve parameters: the settings of three ways to train are all keywords
    model: Decoder,
    name: str,
    key: Array,
    *,
    steps: int,
    ratio: float = 8.0,
    window: int = 64,
    pressure: float = 5.0,
    horizon: float | None = 128.0,
    recent: int = 0,
    hidden: int = 64,
    network: ForgetHead | None = None,
    model_objective: Callable[[Policy], Objective] | None = None,
) -> PolicyObjective:
    """The objective of a policy of `TRAINABLE`.

    `retention` trains its head alone, or head and model (see `model_objective`). `dms` trains its head alone, as the
    published code does: the model stays as it is and its full cache is the teacher. `dmc` trains head and model on the
    next token. For both, over the first two thirds of the steps, the share of tokens kept falls to 1 / ratio and the
    temperature to 0.1. (The published code has other schedules, which take more steps: see the guide.)

    Args:
      name: from `TRAINABLE`.
      key: for the initial weights of the network.
      steps: of the run, for the schedules of `dms` and `dmc`.
      ratio: of tokens to tokens kept, for `dms` and `dmc`.
      window: number of tokens before `dms` evicts.
      pressure: weight of the penalty for keeping too many tokens, for `dms` and `dmc`.
      horizon: tokens over which `retention` discounts attention to come (see `watched_attention`).
      recent: newest tokens that `retention` protects.
      hidden: width of the network that reads a token's key and value.
      network: what training begins with, such as the `head` of a policy that was trained before; None: a new network.
      model_objective: for `retention`, the objective that trains the model with this policy (see `joint_retention`).
        None: the model stays as it is.

    Raises:
      ValueError: an unknown name, `model_objective` for a policy other than `retention`, fewer than 2 steps, numbers
        out of range, or a network that is not for the model or the policy.
    """
    if name not in TRAINABLE:
        raise ValueError(f"unknown learned policy {name!r}; known: {', '.join(TRAINABLE)}")
    if steps < 2:
        raise ValueError(f"training a policy takes at least 2 steps, not {steps}")
    kind, _, given = name.partition("-")
    scope = cast(Scope, given or "kv_head")
    assert scope in get_args(Scope)
    if model_objective is not None and kind != "retention":
        raise ValueError(f"{name} trains the model by a loss of its own; `model_objective` is for retention")
    new = {"retention": init_retention, "dms": init_dms, "dmc": init_gates}[kind]
    whole(hidden, "hidden, the width of the network,", least=1)
    head = new(model.config, key, hidden=hidden) if network is None else network
    check_head(head, layers=model.config.num_layers, kv_heads=model.config.num_kv_heads, head_dim=model.config.head_dim)
    settings: dict[str, Any] = dict(
        retention=dict(scope=scope, recent=recent), dms=dict(window=window, scope=scope), dmc={}
    )[kind]
    learned_policy(kind, head._asdict(), **settings)  # which refuses settings and weights that make no policy
    if kind == "retention":
        check_horizon(horizon)
        if model_objective is None:
            return _retention(model, head, horizon, settings)
        return _retention_and_model(model, head, horizon, settings, model_objective)
    if not 0 <= pressure < math.inf:
        raise ValueError(f"pressure is the weight of a penalty, 0 or more, not {pressure}")
    falls = max(steps * 2 // 3, 1)
    share, temperature = share_schedule(ratio, falls), temperature_schedule(1.0, FINAL_TEMPERATURE, falls)
    if kind == "dms":
        loss = lambda head, tokens, **how: dms_loss(model, tokens, head, window=window, teacher=model, **how)
        objective = _keeping_less(loss, share, temperature, pressure)
        return PolicyObjective(kind, settings, head, objective, lambda head: (model, head))
    loss = lambda both, tokens, **how: merging_loss(both[0], tokens, both[1], **how)
    objective = _keeping_less(loss, share, temperature, pressure)
    return PolicyObjective(kind, settings, (model, head), objective, lambda both: both)


def _retention(model: Decoder, head: ForgetHead, horizon: float | None, settings: dict[str, Any]) -> PolicyObjective:
    """Trains a head on a model's attention. The objective refers to the model and copies nothing."""

    def objective(head: Any, batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
        tokens, valid = batch.tokens[:, :-1], counted(batch.weights)
        how: dict[str, Any] = dict(settings, valid=valid, block=_block(batch), horizon=horizon)
        loss = lambda head: retention_loss(model, tokens, head, **how)
        value, gradient = jax.value_and_grad(loss)(head)
        return {"loss": value}, gradient

    return PolicyObjective("retention", settings, head, objective, lambda head: (model, head))


def _retention_and_model(
    model: Decoder,
    head: ForgetHead,
    horizon: float | None,
    settings: dict[str, Any],
    model_objective: Callable[[Policy], Objective],
) -> PolicyObjective:
    def objective(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
        how: dict[str, Any] = dict(settings, block=_block(batch), horizon=horizon)
        return joint_retention(model_objective, **how)(params, batch, step, key)

    return PolicyObjective("retention", settings, (model, head), objective, lambda both: both)


def _block(batch: Batch) -> int:
    return min(_LARGEST_BLOCK, max((batch.tokens.shape[1] - 1) // 2, 1))


def _keeping_less(
    loss: Callable[..., Any],
    share: Callable[[Any], Any],
    temperature: Callable[[Any], Any],
    pressure: float,
) -> Objective:
    """The objective of a network whose decisions keep ever fewer tokens, by `dms_loss` or `merging_loss`."""

    def objective(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
        how: dict[str, Any] = dict(
            weights=batch.weights, share=share(step), temperature=temperature(step), pressure=pressure, key=key
        )
        of = lambda params: loss(params, batch.tokens, **how)
        (value, parts), gradient = jax.value_and_grad(of, has_aux=True)(params)
        return {"loss": value, **parts}, gradient

    return objective
