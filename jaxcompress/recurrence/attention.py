"""Attention of one token over the slots of a state, and the calls of all kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcompress.pallas_kernels import launch
from jaxcompress.pallas_kernels.by_device import by_device
from jaxcompress.pallas_kernels.dispatch import choose_kernel, describe
from jaxcompress.pallas_kernels.types import Backend, Chosen, Here, KernelCall, Op, stored_as
from jaxcompress.policies.summary import Summary
from jaxcompress.recurrence.quantised import code_scores, code_sum
from jaxcompress.recurrence.softmax import softmax_beside
from jaxcompress.state.attention_traits import PLAIN, AttentionTraits
from jaxcompress.state.eviction_rule import EvictionRule
from jaxcompress.state.precision import scores as scores_of
from jaxcompress.state.precision import weighted
from jaxcompress.state.shapes import Positions, SlotPositions
from jaxcompress.state.slots import write_slots
from jaxcompress.state.storage import Stored


class Extra(NamedTuple):
    """What attention over slots has beyond products and a softmax.

    Attributes:
      bias: [B, K or 1, S] float32, added by the policy to the scores of the slots, or None.
      summary: extra entries of the policy that queries see beside the slots, or None.
      traits: those of the layer.
    """

    bias: Float[Array, "B K S"] | None = None
    summary: Summary | None = None
    traits: AttentionTraits = PLAIN


NOTHING = Extra()


def slot_attention(
    q: Float[Array, "B K G D"],
    keys: Stored,
    values: Stored,
    visible: Bool[Array, "#B #K #G S"],
    present: Bool[Array, " B"],
    extra: Extra = NOTHING,
) -> tuple[Float[Array, "B K G D"], Float[Array, "B K G S"]]:
    """Attention of one query per row and head over the slots of one layer: the output, and each slot's probability.

    Args:
      keys, values: [B, K, S, D], as the state stores them.
      visible: the slots that a query sees; the others get probability zero.
      present: rows that have a query; the others (padding) give zeros.
      extra: what the policy adds, and the traits of the layer.
    """
    plain = isinstance(keys, jax.Array)
    scores = extra.traits.capped(scores_of("bkgd,bksd->bkgs", q, keys) if plain else code_scores(q, keys))
    if extra.bias is not None:
        scores += extra.bias[:, :, None]
    present = present[:, None, None, None]
    others = None if extra.summary is None else extra.summary.scores(q[:, None], extra.traits)[:, :, :, 0]
    weights, shares = softmax_beside(scores, visible, present, others, extra.traits.sinks_beside(scores))
    out = weighted("bkgs,bksd->bkgd", weights, values) if isinstance(values, jax.Array) else code_sum(weights, values)
    if extra.summary is not None and shares is not None:
        out += weighted("bkgm,bkmd->bkgd", shares, extra.summary.values)
    return out.astype(q.dtype), weights


def slot_step(  # nine parameters: the arrays of one kernel launch
    q: Float[Array, "B K G D"],
    new: tuple[Stored, Stored],
    stored: tuple[Stored, Stored],
    layer: Int[Array, ""] | int,
    index: Int[Array, "B P M"],
    visible: Bool[Array, "#B #K #G S"],
    present: Bool[Array, " B"],
    extra: Extra = NOTHING,
    *,
    backend: Backend = "auto",
) -> tuple[Float[Array, "B K G D"], Float[Array, "B K G S"], tuple[Stored, Stored]]:
    """A decoding step: writes new keys and values into their slots, then runs `slot_attention` over the layer.

    Args:
      new: key and value of one token per row (in a pool M), [B, K, M, D], as the state stores them.
      stored: stacks [L, B, K, S, D].
      index: the slots to write; S means none.
      visible: the slots that each query sees, including the slots just written.
      backend: the implementation (see `jaxcompress.pallas_kernels.types`).

    Returns:
      The output, the probability of each slot, and the updated stacks.

    Raises:
      ValueError: this device cannot run the kernels requested by name.
    """
    if not isinstance(backend, Here):
        run = lambda here: slot_step(q, new, stored, layer, index, visible, present, extra, backend=here)
        return by_device(run, backend, (q, stored))
    call = call_of(q[:, None], stored[0], index.shape[1])
    chosen = choose_kernel("step", call, backend, _beyond_kernels(index, visible, extra))
    if chosen is not None:
        return _kernel_step(chosen, q, new, stored, layer, index, visible, present)
    stored = write_slots(stored, new, layer, index)
    keys, values = jax.tree.map(lambda x: x[layer], stored)
    return *slot_attention(q, keys, values, visible, present, extra), stored


def _kernel_step(chosen: Chosen, q, new, stored, layer, index, visible, present):
    def run(q, new, stored, layer, index, visible, present):
        return launch.step(chosen, q, _only(new), stored, layer, index[..., 0], visible[:, :, 0], present)

    reference = partial(slot_step, backend=Here("jnp"))
    return _differentiable(run, reference)(q, new, stored, jnp.asarray(layer), index, visible, present)


def slot_step_by_rule(  # ten parameters: the arrays of one kernel launch
    chosen: Chosen,
    q: Float[Array, "B K G D"],
    new: tuple[Stored, Stored],
    stored: tuple[Stored, Stored],
    layer: Int[Array, ""] | int,
    index: Int[Array, "B P 1"],
    held: SlotPositions,
    numbers: Float[Array, "B P S"] | None,
    present: Bool[Array, " B"],
    rule: EvictionRule,
) -> tuple[Float[Array, "B K G D"], Float[Array, "B P S"] | None, Int[Array, "B P"], tuple[Stored, Stored]]:
    """A decoding step in which the kernel applies the policy's eviction rule itself (see `Kernels.step_evict`)."""

    def run(q, new, stored, layer, index, held, numbers, present):
        return launch.step_evict(chosen, q, _only(new), stored, layer, index[..., 0], held, numbers, present, rule)

    return _without_gradient(run, "a decoding step with eviction")(
        q, new, stored, jnp.asarray(layer), index, held, numbers, present
    )


def block_attention(
    chosen: Chosen,
    q: Float[Array, "B T K G D"],
    at: Positions,
    keys: Stored,
    values: Stored,
    held: SlotPositions,
    window: Int[Array, ""] | int | None,
) -> tuple[Float[Array, "B T K G D"], Float[Array, "B K G N"], Float[Array, "B K G N"]]:
    """Attention of a block of queries by a kernel, and the attention mass that policies observe (see
    `Kernels.block`)."""

    def run(q, at, keys, values, held, window):
        return launch.block(chosen, q, at, keys, values, held, window)

    window = None if window is None else jnp.asarray(window)
    return _without_gradient(run, "a block of queries")(q, at, keys, values, held, window)


def stream_attention(  # ten parameters: the arrays of one kernel launch
    chosen: Chosen,
    q: Float[Array, "B T K G D"],
    new: tuple[Stored, Stored],
    stored: tuple[Stored, Stored],
    layer: Int[Array, ""] | int,
    positions: Positions,
    held: SlotPositions,
    numbers: Float[Array, "B P S"] | None,
    window: Int[Array, ""] | int | None,
    rule: EvictionRule,
) -> tuple[Any, ...]:
    """The recurrence of a whole segment in one launch (see `Kernels.segment`)."""

    def run(q, new, stored, layer, positions, held, numbers, window):
        return launch.segment(chosen, q, new, stored, layer, positions, held, numbers, window, rule)

    window = None if window is None else jnp.asarray(window)
    return _without_gradient(run, "a streamed segment")(
        q, new, stored, jnp.asarray(layer), positions, held, numbers, window
    )


def no_kernel(op: Op, q: Float[Array, "B T K G D"], stored: Stored, sets: int, backend: Backend, why: str) -> None:
    """Reports once that no kernel supports this call, if a kernel backend was requested by name.

    Raises:
      ValueError: as `choose_kernel`.
    """
    choose_kernel(op, call_of(q, stored, sets), backend, why)


def call_of(q: Float[Array, "B T K G D"], stored: Stored, sets: int, rule: EvictionRule | None = None) -> KernelCall:
    """The static facts of a call.

    Args:
      stored: keys, [..., S, D].
    """
    b, t, k, g, d = q.shape
    slots = jax.tree.leaves(stored)[0].shape[-2]
    return KernelCall(b, k, g, slots, d, sets, t, stored_as(stored), q.dtype.name, rule)


def _beyond_kernels(index: Array, visible: Array, extra: Extra) -> str | None:
    """The reason why no kernel can do this decoding step; None if a kernel may."""
    if extra.bias is not None or extra.summary is not None:
        return "the policy adds to attention scores or shows stand-ins"
    if index.shape[-1] > 1 or visible.shape[2] > 1:
        return "heads share a pool of slots"
    return extra.traits.beyond_kernels


def _only(new: Any) -> Any:
    return jax.tree.map(lambda x: x[:, :, 0], new)


def _differentiable(run: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel whose gradient is that of its reference implementation."""
    function = jax.custom_vjp(run)

    def backward(saved: Any, cotangent: Any) -> Any:
        return jax.vjp(reference, *saved)[1](cotangent)

    function.defvjp(lambda *args: (run(*args), args), backward)
    return function


def _without_gradient(run: Callable[..., Any], what: str) -> Callable[..., Any]:
    """A kernel without a gradient: differentiating through it raises an error."""
    function = jax.custom_vjp(run)

    def forward(*args: Any) -> Any:
        raise ValueError(
            f"no gradient passes through the kernel for {what}: take it by death times, which kernels compute "
            "(`jaxcompress.recurrence.parallel.parallel_gradient`), or use backend='jnp'"
        )

    function.defvjp(forward, lambda saved, cotangent: ())
    return function


def decode_backend(backend: Backend = "auto") -> str:
    """The backend of a decoding step on the default device, in words."""
    return describe(backend)
