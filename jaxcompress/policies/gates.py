"""Merging gates: each token of a kv head takes a new slot, or is joined to the token before it.

Dynamic memory compression (Nawrot et al. 2024, "Dynamic Memory Compression: Retrofitting LLMs for Accelerated
Inference", section 3.1). A slot then holds the weighted mean of a run of tokens. Keys are averaged before rotation,
since the mean of keys that are rotated differently is the key of no position; the mean stands where the run's last
token stands.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcompress.policies.cache_view import CacheView, Entering, IncomingTokens, LayerContext
from jaxcompress.policies.entry import Gates
from jaxcompress.policies.forget_head import ForgetHead, check_used, token_numbers
from jaxcompress.policies.policy import Policy, leaf, policy
from jaxcompress.policies.tova import TOVA
from jaxcompress.policies.wrapper import wrapper
from jaxcompress.state.kv_state import Memory, Stats
from jaxcompress.state.shapes import SlotScores
from jaxcompress.state.values import value

APART = (-5.0, 0.0)
"""What `DMC` starts from: no token joins another, and all weigh the same."""


@policy
class gated(wrapper):
    """A policy around which gates join tokens as they enter; the policy chooses among the joined ones.

    A token with a positive logit joins the token before it: it takes that token's slot, and holds the mean of both.
    Joining depends on the gates alone, never on what is held, so runs are the same in every mode.

    Raises:
      ValueError: the policy's heads share a set, or it changes what enters or what stays itself.
    """

    gates: Gates = leaf()

    @property
    def name(self) -> str:
        return f"{self.policy.name}/{self.gates.name}"

    def check(self) -> None:
        one = self.policy
        if not isinstance(one, Policy) or one.layers:
            raise ValueError(f"gates go around one plain policy, not around {one!r}")
        if one.scope != "kv_head":
            raise ValueError(
                f"gates join tokens in each kv head: {one.name} with scope {one.scope} chooses for several"
            )
        if one.gates or one.reduction:
            raise ValueError(f"gates come before a policy that only evicts; {one.name} merges or summarises")

    def memory(self, held: CacheView) -> Memory:
        b, kv, _, d = held.keys.shape
        self.gates.check_model(held.context, d)
        return self.policy.memory(held), jnp.zeros((b, kv, 1 + 2 * d), jnp.float32)

    def remember(self, memory: Memory, incoming: IncomingTokens) -> Memory:
        return self.policy.remember(memory[0], incoming), memory[1]

    def init(self, incoming: CacheView) -> Stats:
        return self.policy.init(incoming._replace(memory=incoming.memory[0]))

    def score(self, stats: Stats, held: CacheView) -> SlotScores:
        return self.policy.score(stats, held._replace(memory=held.memory[0]))


def join_tokens(
    policy: Policy, memory: Memory, incoming: IncomingTokens, layer: Array, context: LayerContext
) -> Entering:
    """What goes into slots instead of the tokens, for a policy that has gates: `gated`, or what goes around one.

    Args:
      memory: the policy's.
      incoming: all tokens of a read at once.
      layer: index of the layer in the model, a scalar.
    """
    assert policy.gates is not None
    if policy.reduction is not None:  # it comes after the gates, and has put a memory of its own beside theirs
        inside, reduced = memory
    else:
        inside, reduced = memory, None
    logits, weights = policy.gates(incoming, layer, context)
    joins = logits > 0
    sums = running_sums(inside[1], incoming, joins.astype(jnp.float32), weights)
    k, v = means(sums, incoming)
    after = inside[0], sums[:, -1]
    there = (incoming.positions >= 0)[..., None]
    return Entering(k, v, joins & there, after if policy.reduction is None else (after, reduced))


@value
class LearnedGates(Gates):
    """Gates that were learned (see `jaxcompress.training.merging`).

    Attributes:
      head: R = 2, the logit of joining and the logarithm of the weight.

    Raises:
      ValueError: weights that give another number of numbers; when they are used, a model whose layers or heads the
        weights are not for.
    """

    label = "dmc"

    head: ForgetHead = leaf()

    def check(self) -> None:
        if self.head.outer_bias.shape[-1] != len(APART):
            raise ValueError(
                f"gates need {len(APART)} numbers per token, the weights give {self.head.outer_bias.shape[-1]}"
            )

    def check_model(self, context: LayerContext, head_dim: int) -> None:
        check_used(self.head, context.which, head_dim, context.layers)

    def __call__(
        self, incoming: IncomingTokens, layer: Array, context: LayerContext
    ) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
        which = jnp.array(context.which)
        return gate_numbers(jax.tree.map(lambda x: x[layer][which], self.head), incoming)


def dmc(head: ForgetHead, policy: Policy | None = None) -> Policy:
    """Learned gates before a policy: TOVA per kv head if none is given.

    Two differences from the paper: a full state evicts, instead of growing with the number of runs; and gates read a
    token's key and value instead of borrowed neurons of its key and query.

    Args:
      head: R = 2, the logit of joining and the logarithm of the weight.

    Raises:
      ValueError: see `gated`; weights that give another number of numbers.
    """
    return gated(TOVA("kv_head") if policy is None else policy, LearnedGates(head))


def gate_numbers(head: ForgetHead, incoming: IncomingTokens) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
    """Logits and weights of tokens; `head` is of this layer, without the axis L."""
    k, v = (x.swapaxes(1, 2) for x in (incoming.k, incoming.v))
    numbers = token_numbers(head, k, v).swapaxes(1, 2)
    return numbers[..., 0], jnp.exp(numbers[..., 1].clip(-8, 8))


def running_sums(
    start: Float[Array, "B K N"], incoming: IncomingTokens, joins: Float[Array, "B T K"], weights: Float[Array, "B T K"]
) -> Float[Array, "B T K N"]:
    """Weights, weighted keys and weighted values of the run that each token ends, summed; [..., 1 + 2 D], float32.

    sum_t = joins_t * sum_{t-1} + weight_t * (1, k_t, v_t), for all t at once. `joins` may lie between 0 and 1.
    """
    present = (incoming.positions >= 0)[..., None]
    keep = jnp.where(present, joins, 1.0)[..., None]
    one = jnp.ones((*joins.shape, 1))
    what = jnp.concatenate([one, incoming.k.astype(jnp.float32), incoming.v.astype(jnp.float32)], axis=-1)
    what = what * jnp.where(present, weights, 0.0)[..., None]
    what = what.at[:, 0].add(keep[:, 0] * start)

    def follow(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * second[0], first[1] * second[0] + second[1]

    return jax.lax.associative_scan(follow, (keep, what), axis=1)[1]


def means(
    sums: Float[Array, "B T K N"], incoming: IncomingTokens
) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
    """Keys and values of the runs, in the dtype of the tokens."""
    mean = sums[..., 1:] / jnp.maximum(sums[..., :1], 1e-9)
    k, v = jnp.split(mean, 2, axis=-1)
    return k.astype(incoming.k.dtype), v.astype(incoming.v.dtype)
