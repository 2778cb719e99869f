"""Learned policies as objectives of the trainer: what is trained, for what, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast, get_args

import jax
from jaxtyping import Array

from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.cache_view import Scope
from jaxcompress.policies.forget_head import ForgetHead
from jaxcompress.policies.policy import Policy
from jaxcompress.training.data import Batch
from jaxcompress.training.forgetting import (
    dms_loss,
    init_dms,
    init_retention,
    retention_loss,
    share_schedule,
    temperature_schedule,
)
from jaxcompress.training.merging import init_gates, merging_loss
from jaxcompress.training.objectives import joint_retention
from jaxcompress.training.trainer import Metrics, Objective

LEARNABLE = ("retention", "retention-layer", "retention-pool", "dms", "dms-pool", "dmc")
"""Names for `learning`: a kind and, after a dash, the scope, where it is not per kv head."""

FIRM = 0.1  # temperature of decisions in the end


class Learning(NamedTuple):
    """How a policy is learned.

    Attributes:
      kind, settings: for `jaxcompress.policies.learned_policy`.
      params: what is trained.
      objective: for `make_step`.
      parts: of trained params: the model, and the policy's own weights.
    """

    kind: str
    settings: dict[str, Any]
    params: Any
    objective: Objective
    parts: Callable[[Any], tuple[Decoder, ForgetHead]]


def learning(
    name: str,
    model: Decoder,
    key: Array,
    *,
    steps: int,
    ratio: float = 8.0,
    window: int = 16,
    pressure: float = 5.0,
    hidden: int = 64,
    through: Callable[[Policy], Objective] | None = None,
) -> Learning:
    """What to train for a policy of `LEARNABLE`.

    `retention` trains its head and leaves the model alone, or trains both (see `through`). `dms` and `dmc` train both;
    the share of tokens kept goes down to 1 / ratio, and the temperature to 0.1, over the first two thirds of the steps.

    Args:
      window: tokens before `dms` evicts.
      pressure: weight of the share that is kept too much.
      hidden: width of the network that reads a token's key and value.
      through: for `retention`, what the model is trained for with this policy (see `joint_retention`); None: it stays
        as it is.

    Raises:
      ValueError: an unknown name, `through` for something else than `retention`, fewer than 2 steps, or numbers out of
        range (see `jaxcompress.training.forgetting`).
    """
    if name not in LEARNABLE:
        raise ValueError(f"unknown learned policy {name!r}; known: {', '.join(LEARNABLE)}")
    if steps < 2:
        raise ValueError(f"learning to forget takes at least 2 steps, not {steps}")
    kind, _, scope = name.partition("-")
    scope = cast(Scope, scope or "kv_head")
    assert scope in get_args(Scope)
    if through is not None and kind != "retention":
        raise ValueError(f"{name} trains the model by a loss of its own; `through` is for retention")
    if kind == "retention":
        watched = model  # by reference: there is no second copy of it
        block_of = lambda batch: min(61, max((batch.tokens.shape[1] - 1) // 2, 1))

        def watch(head: Any, batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
            tokens, block = batch.tokens[:, :-1], block_of(batch)
            loss = lambda head: retention_loss(watched, head, tokens, scope=scope, block=block)
            value, slope = jax.value_and_grad(loss)(head)
            return {"loss": value}, slope

        head = init_retention(model.config, key, hidden=hidden)
        if through is not None:

            def both(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
                return joint_retention(through, scope=scope, block=block_of(batch))(params, batch, step, key)

            return Learning(kind, {"scope": scope}, (model, head), both, lambda params: params)
        return Learning(kind, {"scope": scope}, head, watch, lambda head: (watched, head))

    down = max(steps * 2 // 3, 1)
    share: Any = share_schedule(ratio, down)
    temperature: Any = temperature_schedule(1.0, FIRM, down)

    def forget(params: Any, batch: Batch, step: Any, key: Any) -> tuple[Metrics, Any]:
        how: dict[str, Any] = dict(share=share(step), temperature=temperature(step), pressure=pressure, key=key)

        def loss(params: Any) -> Any:
            model, head = params
            if kind == "dms":
                return dms_loss(model, head, batch.tokens, batch.weights, window=window, **how)
            return merging_loss(model, head, batch.tokens, batch.weights, **how)

        (value, parts), slope = jax.value_and_grad(loss, has_aux=True)(params)
        return {"loss": value, **parts}, slope

    if kind == "dms":
        head, settings = init_dms(model.config, key, hidden=hidden), {"window": window, "scope": scope}
    else:
        head, settings = init_gates(model.config, key, hidden=hidden), {}
    return Learning(kind, settings, (model, head), forget, lambda params: params)
