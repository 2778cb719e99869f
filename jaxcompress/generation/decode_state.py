"""The state of sequences between two tokens of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from jaxcompress.distributed.processes import on_host
from jaxcompress.distributed.rules import ShardingRules, made
from jaxcompress.generation.sampling import check_seed, row_keys
from jaxcompress.inputs.described import described
from jaxcompress.inputs.scalars import whole
from jaxcompress.models.checks import check_fits
from jaxcompress.models.decoder import Decoder, check_decoder
from jaxcompress.models.init_state import Slots, init_state
from jaxcompress.policies.checks import check_placed, check_policy
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import State, runs
from jaxcompress.state.placement import Placement


class DecodeArrays(NamedTuple):
    """The arrays of a `DecodeState`: they change with each token, and jitted functions donate them."""

    kv: State
    logits: Float[Array, "B V"]
    appeared: Bool[Array, "B V"]
    keys: Key[Array, " B"]
    done: Bool[Array, " B"]
    broken: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The state of B sequences between two tokens: everything needed to continue them.

    A state can be used once: `prefill`, `prefill_stream`, `decode` and `decode_stream` donate its memory, so that there
    is never a second copy, and return a new state. To continue twice from one state, copy it first:

        context = prefill(model, [text], init_decode_state(model, policy, slots))
        for question in questions:
            asked = prefill(model, [question], context.copy())
            answer, _ = decode(model, asked, 64)

    Attributes:
      kv: the bounded state after the last token.
      logits: [B, V] float32, for the next token.
      appeared: [B, V] bool, tokens that prompt or output contain (for the repetition penalty).
      keys: [B] random keys, one per row, so that a row's tokens do not depend on its neighbours.
      done: [B] bool, rows whose newest token is a stop token. They generate nothing more until they read new tokens:
        continue a conversation with `prefill`.
      broken: [B] int32, position after which logits were first not finite, -1 while they are. The state cannot be
        repaired: it holds values that are not finite, and every call that continues from it raises FloatingPointError.
      policy: the policy that the state was made for.
      placement: the positions that RoPE uses for tokens in the state; None: the policy's placement (static).
    """

    kv: State
    logits: Float[Array, "B V"]
    appeared: Bool[Array, "B V"]
    keys: Key[Array, " B"]
    done: Bool[Array, " B"]
    broken: Int[Array, " B"]
    policy: Policy
    placement: Placement | None = field(default=None, metadata={"static": True})

    @property
    def arrays(self) -> DecodeArrays:
        """The arrays that change from token to token."""
        return DecodeArrays(self.kv, self.logits, self.appeared, self.keys, self.done, self.broken)

    def copy(self) -> DecodeState:
        """A copy in separate memory: both states can be used."""
        check_unused(self)
        return replace(self, **jax.tree.map(jnp.copy, self.arrays)._asdict())


def init_decode_state(
    model: Decoder,
    policy: Policy,
    slots: Slots,
    *,
    batch: int = 1,
    seeds: Sequence[int] | int = 0,
    dtype: DTypeLike | None = None,
    placement: Placement | None = None,
    sharding: ShardingRules | None = None,
) -> DecodeState:
    """The state of B sequences before any token is read.

    Args:
      slots: capacity of the state, see `jaxcompress.init_state`.
      seeds: one per row, or one from which the seeds of all rows are derived.
      dtype: of keys and values, one of `jaxcompress.state.storage.DTYPES`; the model's by default. `int8`,
        `float8_e4m3fn` and `int4` store each vector as small codes with its own scale.
      placement: the positions that RoPE uses; by default those of the policy's publication.
      sharding: where the arrays go, each device making its own part; the model must be there too.

    Raises:
      ValueError: `model` is no decoder, `policy` is no policy, the placement is unknown or not that of a pool, or the
        number of seeds is not the number of rows; the mesh does not divide the batch or the heads; other cases as for
        `jaxcompress.init_state`.
    """
    check_decoder(model)
    check_policy(policy)
    check_placed(policy, placement)
    batch = whole(batch, "batch", least=1)
    several = isinstance(seeds, Sequence | np.ndarray)
    rows = list(seeds) if several else [check_seed(seeds) + row for row in range(batch)]
    if len(rows) != batch:
        raise ValueError(f"{len(rows)} seeds were given for a batch of {batch}")
    checked = [check_seed(seed) for seed in rows]

    def make() -> DecodeState:
        return DecodeState(
            kv=init_state(model.config, policy, slots, batch=batch, dtype=dtype or model.dtype),
            **_unread(batch, model.config.vocab_size),
            keys=row_keys(checked),
            policy=policy,
            placement=placement,
        )

    return made(make, model.config, batch, sharding)


@partial(jax.jit, static_argnums=(0, 1))
def _unread(batch: int, vocabulary: int) -> dict[str, Array]:
    """What a state knows of the next token before any token is read."""
    return dict(
        logits=jnp.zeros((batch, vocabulary), jnp.float32), appeared=jnp.zeros((batch, vocabulary), bool),
        done=jnp.zeros(batch, bool), broken=jnp.full(batch, -1, jnp.int32),
    )  # fmt: skip


def check_room(model: Decoder, state: DecodeState, tokens: int, *, prompt: int | None = None) -> None:
    """Raises ValueError if a policy that cannot make room would overflow.

    Args:
      tokens: number of tokens that will be read or generated.
      prompt: number of them that a fresh state reads at once.
    """
    if not state.policy.forgets:
        held = most_held(model, state)
        check_fits(model.config, state.policy, state.kv, tokens, prompt=prompt, held=held)


def most_held(model: Decoder, state: DecodeState) -> list[int] | None:
    """The number of tokens that each layer holds, in the row that holds most; None for a fresh state."""
    if not int(state.kv[0].seen.max()):
        return None
    pool = lambda part: 1 if part.owner is None else model.config.num_kv_heads
    most = [[-(-part.occupancy().max(axis=(1, 2)) // pool(part)) for part in parts] for _, parts in runs(state.kv)]
    return [int(n) for run in most for n in np.max(run, axis=0)]


def check_usable(model: Decoder, state: DecodeState) -> None:
    """Checks a state; every call that continues from a state runs this first.

    Raises:
      ValueError: `model` is no decoder, `state` is no state, or the state belongs to another model or was used before.
      FloatingPointError: its logits are not finite.
    """
    check_decoder(model)
    if not isinstance(state, DecodeState):
        raise ValueError(f"a DecodeState is expected, as init_decode_state makes it, not {described(state)}")
    check_unused(state)
    if state.logits.shape[1] != model.config.vocab_size:
        raise ValueError(
            f"the state was made for another model: it has {state.logits.shape[1]} tokens to choose from, this model "
            f"{model.config.vocab_size}"
        )
    raise_if_broken(state)


def check_begun(state: DecodeState) -> None:
    """Raises ValueError if a row of the state has read nothing, so that there is nothing to continue."""
    if not int(state.kv[0].seen.min()):
        raise ValueError(
            "nothing was read yet, so there is no next token to choose: prefill first, as in prefill(model, prompts, "
            "state); for a text from nothing, give a prompt of the BOS token alone"
        )


def check_unused(state: DecodeState) -> None:
    """Raises ValueError if the memory of a state was donated."""
    if any(x.is_deleted() for x in jax.tree.leaves(state.arrays) if isinstance(x, jax.Array)):
        raise ValueError(
            "this state was used before: prefill and decode donate the memory of the state they are given and return a "
            "new one. Go on with that, or give state.copy() where the same point is needed again"
        )


def first_broken(broken: Array, logits: Array, state: State) -> Array:
    """`DecodeState.broken` after new logits."""
    finite = jnp.isfinite(logits).all(axis=-1)
    return jnp.where((broken < 0) & ~finite, state[0].seen - 1, broken)


def raise_if_broken(state: DecodeState) -> None:
    """Raises FloatingPointError if logits were not finite."""
    raise_if_any(state.broken)


def raise_if_any(broken: Array) -> None:
    positions = on_host(broken)
    if (positions >= 0).any():
        row = int((positions >= 0).argmax())
        raise FloatingPointError(f"non-finite logits, first in row {row} by position {positions[row]}")
