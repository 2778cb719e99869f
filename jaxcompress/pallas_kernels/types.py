"""The interface of kernels: what a call looks like, and what a backend has to offer.

A backend is a module of this package with four functions on arrays, `step`, `step_evict`, `block` and `segment` (see
`Kernels`), each of which may decline a call of a shape or type it was not made for. Letters are those of
`jaxcompress.state.shapes`; keys and values are as the state stores them (see `jaxcompress.state.storage`). No function
here or in a backend knows policies or models.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.storage import Quantised, Stored

Name = Literal["auto", "jnp", "tpu", "gpu", "tpu-interpret", "gpu-interpret"]
"""What computes.

  auto           what the environment variable JAXCOMPRESS_BACKEND names; without it a kernel where one has been
                 measured faster on this kind of device (see `measured`), else jnp
  jnp            XLA's own code: the reference, everywhere
  tpu, gpu       Pallas kernels
  *-interpret    the same kernels, interpreted, on any device: for tests, and slow
"""


NAMES: tuple[Name, ...] = get_args(Name)


Op = Literal["step", "step_evict", "block", "segment"]


class KernelCall(NamedTuple):
    """The static facts of a call. A kernel may decline a call because of them, and because of nothing else.

    Attributes:
      batch, kv_heads, group, slots, head_dim: B, K, G, S (of a block N), D.
      sets: P.
      tokens: T, 1 for a step.
      dtype: of keys and values, one of `jaxcompress.state.storage.DTYPES`.
      query: dtype of the queries.
      rule: which policy, where the kernel is to follow one.
    """

    batch: int
    kv_heads: int
    group: int
    slots: int
    head_dim: int
    sets: int
    tokens: int
    dtype: str
    query: str
    rule: EvictionRule | None = None


@runtime_checkable
class Limits(Protocol):
    """What the kernels of a backend can do."""

    needs: str  # the devices that can run them, in words

    def runs_on(self, platform: str, kind: str) -> bool: ...

    def declines(self, op: Op, call: KernelCall) -> str | None:
        """Why not, in words; None: they will do it."""
        ...


@runtime_checkable
class Kernels(Protocol):
    """The functions of a backend. `interpret` may be the parameters of an interpreter. Free slots are -1 in `held`.

    `stored` is (keys, values), stacks [L, B, K, S, D] of which one layer is read and written in place: jit with the
    state donated moves nothing else. `new` is (key, value) as stored. `index` [B, P] is the slot to write, S for none.
    Rows in which no query is `present` give zeros, and nothing of theirs changes.
    """

    def step(
        self,
        q: Float[Array, "B K G D"],
        new: tuple[Stored, Stored],  # [B, K, D]
        stored: tuple[Stored, Stored],  # [L, B, K, S, D]
        layer: Int[Array, ""],
        index: Int[Array, "B P"],
        visible: Bool[Array, "B P S"],  # the slot just written included
        present: Bool[Array, " B"],
        *,
        interpret: Any = False,
    ) -> tuple[Float[Array, "B K G D"], Float[Array, "B K G S"], tuple[Stored, Stored]]:
        """Writes one token per row into its slot, and attends.

        Returns the output in the dtype of q, the probability of each slot in float32, and the stored stacks.
        """
        ...

    def step_evict(
        self,
        q: Float[Array, "B K G D"],
        new: tuple[Stored, Stored],
        stored: tuple[Stored, Stored],
        layer: Int[Array, ""],
        index: Int[Array, "B P"],
        held: Int[Array, "B P S"],  # positions, the new token's included
        numbers: Float[Array, "B P S"] | None,  # the new token's is 0; None where the rule folds nothing
        present: Bool[Array, " B"],
        rule: EvictionRule,
        *,
        interpret: Any = False,
    ) -> tuple[Float[Array, "B K G D"], Float[Array, "B P S"] | None, Int[Array, "B P"], tuple[Stored, Stored]]:
        """As `step`, and evicts by the rule.

        Returns the output, the numbers, the slot of each set to free, and the stored stacks. The slot is a free one
        where
        there is any: freeing it is a no-op.
        """
        ...

    def block(
        self,
        q: Float[Array, "B T K G D"],
        at: Int[Array, "B T"],  # positions of the queries, -1: padding
        keys: Stored,  # [B, K, N, D]
        values: Stored,
        held: Int[Array, "B P N"],
        window: Int[Array, ""] | None,
        *,
        interpret: Any = False,
    ) -> tuple[Float[Array, "B T K G D"], Float[Array, "B K G N"], Float[Array, "B K G N"]]:
        """Attends with a block of queries. A query sees the tokens at its own and earlier positions.

        Returns the output, the probabilities of each row's newest query, and the sum over the row's queries, in
        float32.
        """
        ...

    def segment(
        self,
        q: Float[Array, "B T K G D"],
        new: tuple[Stored, Stored],  # [B, T, K, D]
        stored: tuple[Stored, Stored],  # [L, B, K, S, D]
        layer: Int[Array, ""],
        positions: Int[Array, "B T"],  # -1: padding
        held: Int[Array, "B P S"],
        numbers: Float[Array, "B P S"] | None,  # None where the rule folds nothing
        window: Int[Array, ""] | None,
        rule: EvictionRule,
        *,
        interpret: Any = False,
    ) -> tuple[
        Float[Array, "B T K G D"],
        tuple[Stored, Stored],
        Int[Array, "B P S"],
        Float[Array, "B P S"] | None,
        Int[Array, "B P T"],
    ]:
        """The recurrence over T tokens in one launch: what leaves the window is freed, the token goes into the first
        free slot, attends, is observed, and the lowest score goes. Output, what is stored, held and numbered then, and
        the position that each token's coming freed, -1 for none."""
        ...


class On(NamedTuple):
    """A backend for sharded arrays: each device runs the kernel on its own rows and heads.

    Attributes:
      name: which.
      mesh: its devices.
      rows, heads: axes of the mesh over which B and K are spread; None: they are not.
    """

    name: Name
    mesh: Any
    rows: str | None = None
    heads: str | None = None


class Here(NamedTuple):
    """A backend for arrays on a known device, the one that `devices.device` names (see `by_device`)."""

    backend: Name | On


Backend = Name | On | Here
"""What computes, by name or with a mesh; hashable."""


class Chosen(NamedTuple):
    """A backend that accepted a call; hashable."""

    kernels: Kernels
    interpret: bool
    on: On | None


def stored_as(stored: Stored) -> str:
    """What vectors are stored as, one of `jaxcompress.state.storage.DTYPES`."""
    return stored.dtype if isinstance(stored, Quantised) else stored.dtype.name
