"""What a run of `train` trains, for what, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxcompress.cli.train.arguments import TrainFlags

if TYPE_CHECKING:
    from jaxcompress.checkpoints import SavedPolicy
    from jaxcompress.models.decoder import Decoder
    from jaxcompress.policies.forget_head import ForgetHead
    from jaxcompress.policies.policy import Policy
    from jaxcompress.training.policy_objectives import PolicyObjective
    from jaxcompress.training.trainer import Objective

LANGUAGE = 0.5
"""Weight of the loss on the text beside that on the teacher."""

_NATS = {"loss": ("loss", "nats per token")}
_DISTILLED = {
    "language": _NATS["loss"],
    "divergence": ("divergence", "nats per token, from the full cache before training"),
}
_FORESIGHT = ("foresight", "cross-entropy of attention to come, nats per set of slots and look")
_SHARE = {"kept": ("share kept", "of all tokens")}
_BESIDE = {  # by the kind of policy, what is told of it beside the loss of the text
    "retention": {"loss": _FORESIGHT},
    "dms": {"prediction": ("divergence while tokens fade", "nats per token, from the full cache"), **_SHARE},
    "dmc": {"prediction": ("prediction while tokens fade", "nats per token"), **_SHARE},
}


class Task(NamedTuple):
    """What a run does.

    Attributes:
      params: what is trained.
      objective: what is minimised.
      measured: the objective whose metrics are told for held-out rows.
      told: by metric, the name and the unit under which it is told.
      parts: from trained params to the model, and the policy's own weights if it has any.
      learned: how the policy is learned, if it is.
      own: the policy that the model had, if it is trained through that one.
    """

    params: Any
    objective: Objective
    measured: Objective
    told: dict[str, tuple[str, str]]
    parts: Callable[[Any], tuple[Decoder, ForgetHead | None]]
    learned: PolicyObjective | None
    own: SavedPolicy | None = None


def task_of(how: TrainFlags, model: Decoder, policy: Policy | None, dtype: str, own: SavedPolicy | None = None) -> Task:
    """The task of these flags.

    Args:
      model: float32.
      policy: through which the model is trained; None: plain attention, or a policy that is learned.
      dtype: in which models compute.
      own: the policy that the model has, for --from-learned and --policy learned.

    Raises:
      ValueError: rows shorter than a segment, a policy of the model's own that is another one, or as the objectives.
    """
    import jax

    from jaxcompress.training.lora import add_lora, init_lora
    from jaxcompress.training.objectives import adapted, causal
    from jaxcompress.training.policy_objectives import TRAINABLE

    frozen = jax.tree.map(lambda x: x.astype(dtype), model)  # what stays as it is needs no master weights
    if how.policy in TRAINABLE:
        return _learning(how, model, frozen, own)
    teacher, told = (frozen, _DISTILLED) if how.distill else (None, _NATS)
    objective = causal() if policy is None else _through(policy, how=how, teacher=teacher)
    own = own if how.policy == "learned" else None
    if how.lora is None:
        return Task(model, objective, objective, told, lambda params: (params, None), None, own)
    adapters = init_lora(model, jax.random.key(how.seed), rank=how.lora)
    objective = adapted(objective, frozen)
    return Task(adapters, objective, objective, told, lambda params: (add_lora(model, params), None), None, own)


def _learning(how: TrainFlags, model: Decoder, frozen: Decoder, own: SavedPolicy | None) -> Task:
    """The task of a policy that is learned: with the model, or beside one that stays as it is."""
    import jax

    from jaxcompress.training.policy_objectives import policy_objective

    through = partial(_through, how=how, teacher=frozen) if how.distill else None
    begin = partial(
        policy_objective, frozen if how.network_alone else model, how.policy, jax.random.key(how.seed),
        steps=how.steps, ratio=how.ratio, window=how.window, horizon=how.horizon, recent=how.recent,
        model_objective=through,
    )  # fmt: skip
    learned = begin()
    if how.from_learned:
        learned = begin(network=_network_of(own, learned))
    if through is not None:
        told = _DISTILLED | {"retention": _FORESIGHT}
        if how.lora is not None:
            learned = _with_adapters(learned, model, frozen, how)
        return Task(learned.params, learned.objective, learned.objective, told, learned.parts, learned)
    parts = (lambda head: (model, head)) if how.network_alone else learned.parts
    told = {"language": _NATS["loss"]} | _BESIDE[learned.kind]
    return Task(learned.params, learned.objective, _with_language(how, learned), told, parts, learned)


def _network_of(own: SavedPolicy | None, learned: PolicyObjective) -> ForgetHead:
    """The network of the model's own policy, which is to be the policy that is learned."""
    import jax.numpy as jnp

    from jaxcompress.policies.forget_head import ForgetHead
    from jaxcompress.policies.registry import learned_policy

    if own is None:
        raise ValueError("--from-learned: the model has no policy of its own; without the flag a new one is learned")
    _, new = learned.parts(learned.params)
    asked, has = learned_policy(learned.kind, new._asdict(), **learned.settings).name, own.make().name
    if asked != has:
        raise ValueError(f"--from-learned: the model's own policy is {has}, and the one to be learned {asked}")
    return ForgetHead(**{name: jnp.asarray(array, jnp.float32) for name, array in own.weights.items()})


def _with_adapters(learned: PolicyObjective, model: Decoder, frozen: Decoder, how: TrainFlags) -> PolicyObjective:
    """The same, where adapters are trained in place of the model."""
    import jax

    from jaxcompress.training.lora import add_lora, init_lora
    from jaxcompress.training.objectives import adapted_jointly

    assert how.lora is not None
    _, head = learned.params
    return learned._replace(
        params=(init_lora(model, jax.random.key(how.seed), rank=how.lora), head),
        objective=adapted_jointly(learned.objective, frozen),
        parts=lambda both: (add_lora(model, both[0]), both[1]),
    )


def _through(policy: Policy, *, how: TrainFlags, teacher: Decoder | None) -> Objective:
    """What a model is trained for with a policy that evicts."""
    from jaxcompress.training.objectives import bounded, distilled

    if how.length < how.segment:
        raise ValueError(f"--length {how.length} is less than one --segment of {how.segment} tokens")
    segments, window = -(-how.length // how.segment), how.bptt_segments
    if window is not None and segments % window:
        longer = -(-segments // window) * window * how.segment
        raise ValueError(
            f"--length {how.length} has {segments} of --segment {how.segment}, which cannot be cut into windows of "
            f"{window} (--bptt-segments): give --bptt-segments 1, or --length {longer}"
        )
    reading: dict[str, Any] = dict(
        segment=how.segment, bptt_segments=how.bptt_segments, chunk=how.chunk_length, placement=how.placement
    )
    if teacher is None:
        return bounded(policy, how.capacity, **reading)
    return distilled(policy, how.capacity, teacher=teacher, language=LANGUAGE, **reading)


def _with_language(how: TrainFlags, learned: PolicyObjective) -> Objective:
    """The metrics of a policy that is learned, and the loss of the text when it is used as a policy."""
    from jaxcompress.policies.registry import learned_policy
    from jaxcompress.training.objectives import bounded

    reading: dict[str, Any] = dict(
        segment=min(how.segment, how.length), chunk=how.chunk_length, placement=how.placement
    )

    def objective(params: Any, batch: Any, step: Any, key: Any) -> tuple[dict[str, Any], None]:
        model, head = learned.parts(params)
        policy = learned_policy(learned.kind, head._asdict(), **learned.settings)
        read = bounded(policy, how.capacity, **reading)
        metrics = learned.objective(params, batch, step, key)[0]
        return {**metrics, "language": read(model, batch, step, key)[0]["loss"]}, None

    return objective
