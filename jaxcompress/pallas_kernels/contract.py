"""What a kernel is asked to do, and how one is picked.

A backend is a module of this package with four functions on arrays, `step`, `step_evict`, `block` and `segment` (see
`Kernels`), each of which may decline a call of a shape or type it was not made for. Letters are those of
`jaxcompress.shapes`; keys and values are as the state stores them (see `jaxcompress.storage`). No function here or in a
backend knows policies or models.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import jax
import jax.extend.backend
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.storage import Quantised, Stored

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


class Rule(NamedTuple):
    """A policy that a kernel can follow on its own: one number per slot, folded from mass.

    The lowest score goes, on a tie the youngest token, after each token (`evict="after"`). The score is the number, or
    minus the age where nothing is folded. Mass is the mean over the heads that share a set.

    Attributes:
      fold: `last`: the number is the mass that the newest query gave (TOVA); `sum`: what all queries gave so far
        (H2O); `age`: there are no numbers (Window).
      first: positions below this never go.
      recent: nor do so many of the newest.
      spare: slots that stay free for good: allocated beyond the capacity (see `together`).
    """

    fold: Literal["last", "sum", "age"]
    first: int = 0
    recent: int = 0
    spare: int = 0


class Call(NamedTuple):
    """What is known of a call before it runs, and all that a kernel may decline it for.

    Attributes:
      batch, kv_heads, group, slots, head_dim: B, K, G, S (of a block N), D.
      sets: P.
      tokens: T, 1 for a step.
      dtype: of keys and values, one of `jaxcompress.storage.DTYPES`.
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
    rule: Rule | None = None


@runtime_checkable
class Kernels(Protocol):
    """A backend. `interpret` may also be the parameters of an interpreter. Slots that hold no token are -1 in `held`.

    `stored` is (keys, values), stacks [L, B, K, S, D] of which one layer is read and written in place: jit with the
    state donated moves nothing else. `new` is (key, value) as stored. `index` [B, P] is the slot to write, S for none.
    Rows in which no query is `present` give zeros, and nothing of theirs changes.
    """

    needs: str  # the devices that can run it, in words

    def runs_on(self, platform: str, kind: str) -> bool: ...

    def declines(self, op: Op, call: Call) -> str | None:
        """Why not, in words; None: it will do it."""
        ...

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
        """Writes one token per row into its slot and attends: output (in the dtype of q), the probability that each
        slot received (float32), and what is stored then."""
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
        rule: Rule,
        *,
        interpret: Any = False,
    ) -> tuple[Float[Array, "B K G D"], Float[Array, "B P S"] | None, Int[Array, "B P"], tuple[Stored, Stored]]:
        """The same, and the rule followed: output, numbers, and the slot of each set that goes, a free one if there is
        any (so that nothing goes)."""
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
        """A block of queries, each of which sees what is held at its own and earlier positions: output, the
        probabilities of the row's newest query, and those of all its queries added up (float32)."""
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
        rule: Rule,
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
    """A backend for arrays that are spread over devices: each device runs the kernel on its own rows and heads.

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
    """A backend for arrays on a device that is known: the one that `device` tells (see `by_device`)."""

    backend: Name | On


Backend = Name | On | Here
"""What computes, by name or with a mesh; hashable."""


class Chosen(NamedTuple):
    """A backend that will do a call; hashable."""

    kernels: Kernels
    interpret: bool
    on: On | None


def choose(op: Op, call: Call, backend: Backend, never: str | None = None) -> Chosen | None:
    """What to compute with; None: jnp. Static, at trace time.

    A call that the kernels asked for decline goes to jnp, and one log line says so.

    Args:
      never: why no kernel can do it, whichever is asked for.

    Raises:
      ValueError: an unknown name, or kernels asked for by name that this device cannot run.
    """
    backend = backend.backend if isinstance(backend, Here) else backend
    name, on = (backend.name, backend) if isinstance(backend, On) else (backend, None)
    name = known(name)
    if name == "auto":
        from jaxcompress.pallas_kernels.measured import faster

        name = "jnp" if never else faster(op, call, *device())
    if name == "jnp":
        return None
    kernels, interpret = load(name), name.endswith("-interpret")
    if not interpret:
        check_device(name)
    mine = call if on is None else _share(call, on)
    why = never or (mine if isinstance(mine, str) else kernels.declines(op, mine))
    if why is None:
        return Chosen(kernels, interpret, on)
    _say(f"no {name} kernel for a {_WORDS[op]}, jnp instead: {why}")
    return None


def known(name: Name) -> Name:
    """The name, and what the environment says where it is `auto`.

    Raises:
      ValueError: an unknown name.
    """
    own = os.environ.get("JAXCOMPRESS_BACKEND", "") if name == "auto" else ""
    if (own or name) not in NAMES:
        where = " (environment variable JAXCOMPRESS_BACKEND)" * bool(own)
        raise ValueError(f"unknown backend {own or name!r}{where}; known: {', '.join(NAMES)}")
    return own or name  # type: ignore


_WORDS = {
    "step": "decoding step",
    "step_evict": "decoding step with eviction",
    "block": "block of queries",
    "segment": "streamed segment",
}


def load(name: Name) -> Any:
    """The module behind a name, a `Kernels`, though without functions for what it always declines.

    It imports Pallas, which takes a while, only inside the functions that compute.
    """
    return import_module(f"jaxcompress.pallas_kernels.{name.removesuffix('-interpret')}")


def device() -> tuple[str, str]:
    """Platform and kind of the device that is computed or compiled for: JAX's default one, unless arrays are known to
    be on another (see `by_device`)."""
    abstract = compiled_for()
    if abstract is not None:
        return abstract.platform or jax.default_backend(), abstract.device_kind
    return kind_of(jax.extend.backend.get_default_device())


def kind_of(found: jax.Device) -> tuple[str, str]:
    """Platform and kind of a device."""
    return found.platform, found.device_kind


def devices_here() -> dict[str, jax.Device]:
    """A device of every platform that JAX has found on this machine, by what JAX calls the platform when it compiles
    (`cuda`, not `gpu`)."""
    found = {platform: client.local_devices() for platform, client in jax.extend.backend.backends().items()}
    return {platform: devices[0] for platform, devices in found.items() if devices}


def compiled_for() -> Any:
    """The device that is compiled for ahead of time, which is not here; None: one of those here."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def together(dtype: str) -> int:
    """Slots that lie together in memory, in a state of a dtype, where a device of this machine has kernels that ask for
    it; which device a state will be on is not known when it is made.

    Where slots are a multiple of that, kernels write into the state in place. Elsewhere any number will do: 1.
    """
    kernels = load("tpu")
    able = [device()] if compiled_for() else [device(), *map(kind_of, devices_here().values())]
    return kernels.group_rows(dtype) if any(kernels.runs_on(*each) for each in able) else 1


def check_device(name: Name) -> None:
    """Raises ValueError if the device cannot run the kernels of a name; says what can."""
    platform, kind = device()
    kernels = load(name)
    if not kernels.runs_on(platform, kind):
        able = [other for other in ("tpu", "gpu") if load(other).runs_on(platform, kind)]
        raise ValueError(
            f"backend {name!r} needs {kernels.needs}, this is a {platform} device ({kind}), which can run "
            f"{', '.join(['auto', 'jnp', *able])}; {name}-interpret runs anywhere, slowly, for tests"
        )


def describe(backend: Backend) -> str:
    """What computes on the default device, in words; that kernels asked for by name cannot, where they cannot."""
    backend = backend.backend if isinstance(backend, Here) else backend
    name = known(backend.name if isinstance(backend, On) else backend)
    platform, kind = device()
    if name == "auto":
        from jaxcompress.pallas_kernels.measured import TABLE

        won = [f"{row.backend} for a {_WORDS[row.op]}" for row in TABLE if kind.startswith(row.kind)]
        able = [other for other in ("tpu", "gpu") if load(other).runs_on(platform, kind)]
        unmeasured = f" (kernels by name: {', '.join(able)}; not measured here)" if able and not won else ""
        return f"{', '.join([*won, 'jnp'])} on {platform}{unmeasured}"
    if name in ("tpu", "gpu"):
        try:
            check_device(name)
        except ValueError as error:
            return f"none: {error}"
    return f"{name} on {platform}"


def _share(call: Call, on: On) -> Call | str:
    """What one device of the mesh is asked, or why it cannot be shared out."""
    rows, heads = (1 if axis is None else on.mesh.shape[axis] for axis in (on.rows, on.heads))
    if call.batch % rows or call.kv_heads % heads:
        return f"{call.batch} rows and {call.kv_heads} kv heads cannot be spread over {rows} x {heads} devices"
    if heads > 1 and call.sets == 1 and call.rule is not None:
        return "heads that share a set are on different devices, and the rule takes their mean"
    sets = call.sets if call.sets == 1 else call.sets // heads
    return call._replace(batch=call.batch // rows, kv_heads=call.kv_heads // heads, sets=sets)


def stored_as(stored: Stored) -> str:
    """The name of a dtype, of `jaxcompress.storage.DTYPES`."""
    return stored.dtype if isinstance(stored, Quantised) else stored.dtype.name


@cache
def _say(message: str) -> None:
    """Once."""
    logging.getLogger("jaxcompress").warning(message)
