"""Where sequences stand between two tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from jaxcompress.generation.sampling import row_keys
from jaxcompress.inputs.described import described
from jaxcompress.inputs.scalars import whole
from jaxcompress.models.checks import check_fits
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.init_state import Slots, init_state
from jaxcompress.policies.checks import check_policy
from jaxcompress.policies.policy import Policy
from jaxcompress.state.kv_state import State, runs
from jaxcompress.state.placement import Placement


class DecodeArrays(NamedTuple):
    """The arrays of a `DecodeState`: what changes, and what jitted functions donate."""

    kv: State
    logits: Float[Array, "B V"]
    appeared: Bool[Array, "B V"]
    keys: Key[Array, " B"]
    done: Bool[Array, " B"]
    broken: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Where B sequences stand between two tokens; everything needed to go on.

    A state can be used once: `prefill`, `prefill_stream`, `decode` and `decode_stream` donate its memory, so that
    there is never a second copy, and return a new state. For two things from one point, copy it first:

        context = prefill(model, [text], init_decode_state(model, policy, slots))
        for question in questions:
            asked = prefill(model, [question], context.copy())
            answer, _ = decode(model, asked, 64)

    Attributes:
      kv: the bounded state after the last token.
      logits: [B, V] float32, for the next token.
      appeared: [B, V] bool, tokens that prompt or output contain (for the repetition penalty).
      keys: [B] random keys, one per row, so that a row's tokens do not depend on its neighbours.
      done: [B] bool, rows whose newest token is a stop token. Nothing more is written to them until they have read
        something: a conversation goes on with `prefill`.
      broken: [B] int32, position after which logits were first not finite, -1 while they are. There is no way back:
        the state holds what is no number, and whatever would go on from it raises FloatingPointError.
      policy: what the state was made for.
      placement: where the tokens in the state stand for RoPE, None where the policy puts them (static).
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
        """What changes from token to token."""
        return DecodeArrays(self.kv, self.logits, self.appeared, self.keys, self.done, self.broken)

    def copy(self) -> DecodeState:
        """The same in memory of its own: each of the two can be used."""
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
) -> DecodeState:
    """B sequences of which nothing has been read yet.

    Args:
      slots: capacity of the state, see `jaxcompress.init_state`.
      seeds: one per row, or one from which every row's is derived.
      dtype: of keys and values, one of `jaxcompress.state.storage.DTYPES`; the model's by default. `int8`,
        `float8_e4m3fn` and `int4` store each vector as small codes with a scale of its own.
      placement: where tokens stand for RoPE; as the policy was published by default.

    Raises:
      ValueError: something that is no decoder or no policy, see `jaxcompress.init_state`, an unknown placement, or not
        one seed for each row.
    """
    check_decoder(model)
    check_policy(policy)
    check_placement(placement)
    batch = whole(batch, "batch", least=1)
    several = isinstance(seeds, Sequence | np.ndarray)
    rows = list(seeds) if several else [check_seed(seeds) + row for row in range(batch)]
    if len(rows) != batch:
        raise ValueError(f"{len(rows)} seeds were given for a batch of {batch}")
    vocabulary = model.config.vocab_size
    return DecodeState(
        kv=init_state(model.config, policy, slots, batch=batch, dtype=dtype or model.embedding[...].dtype),
        logits=jnp.zeros((batch, vocabulary), jnp.float32),
        appeared=jnp.zeros((batch, vocabulary), bool),
        keys=row_keys([check_seed(seed) for seed in rows]),
        done=jnp.zeros(batch, bool),
        broken=jnp.full(batch, -1, jnp.int32),
        policy=policy,
        placement=placement,
    )


def check_room(model: Decoder, state: DecodeState, tokens: int, *, prompt: int | None = None) -> None:
    """Raises ValueError if a policy that cannot make room would overflow.

    Args:
      tokens: that will be read or written.
      prompt: how many of them a fresh state reads at once.
    """
    if not state.policy.forgets:
        held = most_held(model, state)
        check_fits(model.config, state.policy, state.kv, tokens, prompt=prompt, held=held)


def most_held(model: Decoder, state: DecodeState) -> list[int] | None:
    """How many tokens each layer holds, in the row that holds most; None of a fresh state."""
    if not int(state.kv[0].seen.max()):
        return None
    pool = lambda part: 1 if part.owner is None else model.config.num_kv_heads
    most = [[-(-part.occupancy().max(axis=(1, 2)) // pool(part)) for part in parts] for _, parts in runs(state.kv)]
    return [int(n) for run in most for n in np.max(run, axis=0)]


def check_usable(model: Decoder, state: DecodeState) -> None:
    """The gate of every call that goes on from a state.

    Raises:
      ValueError: something that is no decoder or no state, a state of another model, or one that was used before.
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


def check_unused(state: DecodeState) -> None:
    """Raises ValueError if the memory of a state was donated."""
    if any(x.is_deleted() for x in jax.tree.leaves(state.arrays) if isinstance(x, jax.Array)):
        raise ValueError(
            "this state was used before: prefill and decode donate the memory of the state they are given and return a "
            "new one. Go on with that, or give state.copy() where the same point is needed again"
        )


def check_decoder(model: Any) -> None:
    """Raises ValueError if something is no decoder; says where it has one."""
    if isinstance(model, Decoder):
        return
    hint = next((f"; give its .{name}" for name in ("model", "decoder") if hasattr(model, name)), "")
    raise ValueError(f"the first argument must be a Decoder, not {described(model)}{hint}")


def check_placement(placement: Any) -> None:
    """Raises ValueError if tokens cannot stand in a way of that name."""
    if placement is not None and placement not in get_args(Placement):
        raise ValueError(f"unknown placement {placement!r}; known: {', '.join(get_args(Placement))}")


def check_seed(given: Any) -> int:
    """A whole number.

    Raises:
      ValueError: anything else.
    """
    try:
        return index(given)
    except TypeError:
        raise ValueError(f"seeds must be a whole number, or one for each row, not {described(given)}") from None


def first_broken(broken: Array, logits: Array, state: State) -> Array:
    """`DecodeState.broken` after new logits."""
    finite = jnp.isfinite(logits).all(axis=-1)
    return jnp.where((broken < 0) & ~finite, state[0].seen - 1, broken)


def raise_if_broken(state: DecodeState) -> None:
    """Raises FloatingPointError if logits were not finite."""
    raise_if_any(state.broken)


def raise_if_any(broken: Array) -> None:
    positions = np.asarray(broken)
    if (positions >= 0).any():
        row = int((positions >= 0).argmax())
        raise FloatingPointError(f"non-finite logits, first in row {row} by position {positions[row]}")
